"""Which optimizer steps are descent on a linear model, and which only look like it; what is found makes the steps."""

import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import mlopt
from mlopt.passes import GlmFitKind
from mlopt.runtime.whole_step import add_updates
from tests.helpers.extras import extras
from tests.passes.test_glm_structure import MISSES, C, D, Frozen, N, Weights

SOFTMAX, LOGISTIC, LINEAR = GlmFitKind.SOFTMAX, GlmFitKind.LOGISTIC, GlmFitKind.LINEAR


class Lower(mlopt.Problem):
    def training_step(self, batch):
        return self.loss(self, *batch)


class Upper(mlopt.Problem):
    def training_step(self, batch):
        p, u = self.lower, self.module
        return sum((q - 0.1).square().sum() for q in p.parameters() if q.requires_grad) + u.c.sum() + u.t


class Variables(nn.Module):
    """A weight per sample (some are 0), a decay per parameter, a temperature that is 1 at first."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.rand(N) * (torch.arange(N) % 3 > 0))
        self.decay = nn.Parameter(torch.rand(D, C))
        self.t = nn.Parameter(torch.zeros(()))


def weighted(p, losses):
    return (p.upper.module.c * losses).mean()


def entropy(p, x, y, **options):
    return weighted(p, F.cross_entropy(p(x), y, reduction="none", **options))


def sgd(parameters):
    return optim.SGD(parameters, lr=0.3)


def with_momentum(parameters):
    return optim.SGD(parameters, lr=0.3, momentum=0.9)


def with_all(parameters):
    return optim.SGD(parameters, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.02)


def damped(parameters):
    return optim.SGD(parameters, lr=0.1, momentum=0.8, dampening=0.3, maximize=True)


class Cubic(optim.SGD):
    """Steps by the gradient, and a little by its third power."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad + 1e-11 * p.grad.pow(3))


def by_groups(parameters):
    first, *others = parameters
    return optim.SGD([{"params": [first], "lr": 0.05, "weight_decay": 0.1}, {"params": others}], lr=0.3)


MATCHES = {
    "cross entropy": (SOFTMAX, lambda: nn.Linear(D, C), entropy, sgd),
    "momentum": (SOFTMAX, lambda: nn.Linear(D, C), entropy, with_momentum),
    "nesterov and decay": (SOFTMAX, lambda: nn.Linear(D, C), entropy, with_all),
    "dampening, upwards": (SOFTMAX, lambda: nn.Linear(D, C, bias=False), entropy, damped),
    "groups": (SOFTMAX, lambda: nn.Linear(D, C), entropy, by_groups),
    "a mean": (
        SOFTMAX,
        lambda: nn.Linear(D, C, bias=False),
        lambda p, x, y: F.cross_entropy(p(x), y) + 0 * p.upper.module.c.sum(),
        sgd,
    ),
    "label smoothing": (
        SOFTMAX,
        lambda: nn.Linear(D, C),
        lambda p, x, y: entropy(p, x, y, label_smoothing=0.1),
        sgd,
    ),
    "ignored labels": (SOFTMAX, lambda: nn.Linear(D, C), lambda p, x, y: entropy(p, x, y, ignore_index=1), sgd),
    "class weights": (
        SOFTMAX,
        lambda: nn.Linear(D, C),
        lambda p, x, y: entropy(p, x, y, weight=torch.arange(1, C + 1).double()),
        sgd,
    ),
    "soft targets": (
        SOFTMAX,
        lambda: nn.Linear(D, C),
        lambda p, x, y: entropy(p, x, F.one_hot(y, C).to(x) * 0.8 + 0.1),
        sgd,
    ),
    "written out": (
        SOFTMAX,
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, p(x).logsumexp(1) - p(x).gather(1, y[:, None])[:, 0]),
        sgd,
    ),
    "masked rows": (
        SOFTMAX,
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none") * (x[:, 0] > 0)),
        sgd,
    ),
    "decay per parameter": (
        SOFTMAX,
        lambda: Weights(D, C, bias=True),
        lambda p, x, y: (
            F.cross_entropy(x @ p.module.w + p.module.b, y)
            + (p.upper.module.decay.exp() * p.module.w.square()).sum()
            + 0 * p.upper.module.c.sum()
        ),
        with_momentum,
    ),
    "proximal": (
        SOFTMAX,
        lambda: Weights(D, C),
        lambda p, x, y: (
            weighted(p, F.cross_entropy(x @ p.module.w, y, reduction="none"))
            + (p.module.w - p.upper.module.decay).square().sum()
        ),
        sgd,
    ),
    "functional linear": (
        SOFTMAX,
        lambda: Weights(C, D),
        lambda p, x, y: weighted(p, F.cross_entropy(F.linear(x, p.module.w), y, reduction="none")),
        sgd,
    ),
    "a flat weight": (
        SOFTMAX,
        lambda: Weights(D * C),
        lambda p, x, y: weighted(p, F.cross_entropy(x @ p.module.w.view(D, C), y, reduction="none")),
        sgd,
    ),
    "frozen features": (SOFTMAX, Frozen, entropy, with_momentum),
    "logistic, a vector": (
        LOGISTIC,
        lambda: Weights(D),
        lambda p, x, y: weighted(
            p, F.binary_cross_entropy_with_logits(x @ p.module.w, (y > 0).to(x), reduction="none")
        ),
        sgd,
    ),
    "logistic, one column": (
        LOGISTIC,
        lambda: nn.Linear(D, 1),
        lambda p, x, y: weighted(
            p, F.binary_cross_entropy_with_logits(p(x).squeeze(1), (y > 0).to(x), reduction="none")
        ),
        with_all,
    ),
    "several logits, positive weights": (
        LOGISTIC,
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(
            p,
            F.binary_cross_entropy_with_logits(
                p(x), F.one_hot(y, C).to(x), reduction="none", pos_weight=torch.arange(1, C + 1).double()
            ).sum(1),
        ),
        sgd,
    ),
    "least squares": (
        LINEAR,
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, (p(x) - F.one_hot(y, C)).square().sum(1)),
        with_momentum,
    ),
    "mse_loss": (
        LINEAR,
        lambda: nn.Linear(D, C),
        lambda p, x, y: F.mse_loss(p(x), F.one_hot(y, C).to(x)) + 0 * p.upper.module.c.sum(),
        sgd,
    ),
}

NEAR_MISSES = {
    **{name: (module, loss, sgd, {}) for name, (module, loss) in MISSES.items()},
    "poisson": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, (p(x).exp() - F.one_hot(y, C) * p(x)).sum(1)),
        sgd,
        {},
    ),
    "huber": (
        lambda: nn.Linear(D, 1),
        lambda p, x, y: weighted(p, F.huber_loss(p(x)[:, 0], y.to(x), reduction="none", delta=50.0)),
        sgd,
        {},
    ),
    "logits that are cut off": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x).clamp(-1e3, 1e3), y, reduction="none")),
        sgd,
        {},
    ),
    "a temperature that is 1 now": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x) * p.upper.module.t.exp(), y, reduction="none")),
        sgd,
        {},
    ),
    "another power of the loss": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none").square()),
        sgd,
        {},
    ),
    "a lasso": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: entropy(p, x, y) + p.module.weight.abs().sum(),
        sgd,
        {},
    ),
    "a regularizer of columns": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: entropy(p, x, y) + p.module.weight.sum(0).square().sum(),
        sgd,
        {},
    ),
    "a quartic": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: entropy(p, x, y) + p.module.weight.pow(4).sum(),
        sgd,
        {},
    ),
    "a sum of losses": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: entropy(p, x, y) + weighted(p, p(x).square().sum(1)),
        sgd,
        {},
    ),
    "a soft cap far away": (
        lambda: nn.Linear(D, 1),
        lambda p, x, y: F.mse_loss(2e6 * (p(x)[:, 0] / 2e6).tanh(), 1e6 * y.to(x)) + 0 * p.upper.module.c.sum(),
        sgd,
        {},
    ),
    "a cubic far away": (
        lambda: nn.Linear(D, 1),
        lambda p, x, y: weighted(p, (p(x)[:, 0] - y).square() + 1e-14 * p(x)[:, 0].pow(3)),
        sgd,
        {},
    ),
    "a logarithm with a floor": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, -(p(x).softmax(1) + 1e-60).log().gather(1, y[:, None])[:, 0]),
        sgd,
        {},
    ),
    "a barrier": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: entropy(p, x, y) + weighted(p, (p(x) - 110).exp().sum(1)),
        sgd,
        {},
    ),
    "a small quartic": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: entropy(p, x, y) + 1e-11 * p.module.weight.pow(4).sum(),
        sgd,
        {},
    ),
    "an optimizer with a cubic": (lambda: nn.Linear(D, C), entropy, Cubic, {}),
    "adam": (lambda: nn.Linear(D, C), entropy, lambda q: optim.Adam(q, lr=0.1), {}),
    "rprop": (lambda: nn.Linear(D, C), entropy, lambda q: optim.Rprop(q, lr=0.1), {}),
    "a clipped gradient": (lambda: nn.Linear(D, C), entropy, sgd, {"clip_norm": 1e6}),
    "a normalized gradient": (lambda: nn.Linear(D, C), entropy, sgd, {"normalize_gradient": True}),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(D, C)), entropy, sgd, {}),
}


def joined(module, loss, optimizer, dtype=torch.float64, **options):
    """The graphs of the lower problem with its step, and a batch."""
    torch.manual_seed(0)
    batch = torch.randn(N, D).to(dtype), torch.randint(C, (N,))
    module, upper = module().to(dtype), Variables().to(dtype)
    if isinstance(module, Frozen):
        module.eval()  # in training mode, running statistics are part of the state
    trained = [p for p in module.parameters() if p.requires_grad]
    lower = Lower(
        "lower",
        module=module,
        optimizer=optimizer(trained),
        data=[batch],
        hypergradient=mlopt.CG(damping=0.5),
        unroll_steps=10,
        **options,
    )
    lower.loss = loss
    upper = Upper("upper", module=upper, optimizer=optim.SGD(upper.parameters(), lr=0.1), data=[batch])
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", strict=True, progress=False)
    executor = plan._executor
    stream = executor.states["lower"].stream
    graphs = executor.derive("lower", stream.peek()).graphs
    made = add_updates(graphs, lower, executor.layouts["lower"], plan.program["lower"], stream, has_kernels=True)
    return made, stream.peek()


def inputs_of(graphs, batch, seed=1):
    """Those of a step, with a random state."""
    step, torch_state = graphs.step, torch.Generator().manual_seed(seed)
    inputs = [t.detach().clone() for t in graphs.loss.bind(batch.tensors)]
    nodes = [n for n in step.module.graph.nodes if n.op == "placeholder"][len(inputs) :]
    for x, node in zip(step.settings, nodes, strict=True):
        known = x.role.name == "HYPERPARAMETER"
        inputs.append(step.update.live(x) if known else node.meta["val"].new_zeros(node.meta["val"].shape))
    for _, position in step.feedback:
        like = inputs[position]
        inputs[position] = torch.randn(like.shape, generator=torch_state, dtype=torch.float64).to(like.dtype)
    return inputs


def one_by_one(step, inputs, count):
    inputs = list(inputs)
    for _ in range(count):
        results = step.module(*inputs)
        for output, position in step.feedback:
            inputs[position] = results[output]
    return [inputs[position] for _, position in step.feedback]


def by_kernel(graphs, inputs, count):
    extension = pytest.importorskip("mlopt._C")
    s = graphs.descent.structure
    *tables, holds = graphs.descent.module(*inputs)
    steps = extension.GlmSteps(s.kind.value, s.positions, s.size, s.bias, len(s.states))
    order = [k for state in s.states for k in state]
    made = steps.run(*tables, [inputs[graphs.step.feedback[k][1]] for k in order], count)
    assert made.num_steps == count
    fed = dict(zip(order, made.fed, strict=True))
    return [fed[k] for k in range(len(order))], bool(holds)


@pytest.mark.parametrize("name", extras(MATCHES, lambda name: list(MATCHES).index(name) % 3))
def test_found_and_right(name):
    kind, *made = MATCHES[name]
    graphs, batch = joined(*made)
    assert graphs.descent is not None and graphs.descent.structure.kind is kind
    inputs = inputs_of(graphs, batch)
    for count in (1, 3, 8):  # few are made by sweeps over rows, several by blocks of few features
        got, holds = by_kernel(graphs, inputs, count)
        assert holds
        for a, b in zip(got, one_by_one(graphs.step, inputs, count), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["nesterov and decay", "logistic, one column"])
def test_in_single_precision(name):
    _, *made = MATCHES[name]
    graphs, batch = joined(*made, dtype=torch.float32)
    inputs = inputs_of(graphs, batch)
    got, holds = by_kernel(graphs, inputs, 8)
    assert holds
    exact = [t.double() if t.is_floating_point() else t for t in inputs]
    double, _ = joined(*made)
    for a, b in zip(got, one_by_one(double.step, exact, 8), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", extras(NEAR_MISSES, lambda name: name in MISSES))
def test_near_misses_are_not_taken(name):
    module, loss, optimizer, options = NEAR_MISSES[name]
    graphs, _ = joined(module, loss, optimizer, **options)
    assert graphs.step is not None and graphs.descent is None


def test_a_small_decay_keeps_its_digits():
    """1 - lr * decay has few of them in float32; the increment has all."""
    optimizer = lambda q: optim.SGD(q, lr=1e-3, weight_decay=3e-5)  # noqa: E731
    graphs, batch = joined(lambda: nn.Linear(D, C, bias=False), entropy, optimizer, dtype=torch.float32)
    coefficients = graphs.descent.module(*inputs_of(graphs, batch))[3]
    torch.testing.assert_close(coefficients[0, 1], torch.full((D * C,), -3e-8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_large_targets_keep_their_digits(offset):
    """A scale that is read off a difference of nearby values would have the rounding of the targets in it."""
    loss = lambda p, x, y: F.mse_loss(p(x), F.one_hot(y, C).to(x) + offset) + 0 * p.upper.module.c.sum()  # noqa: E731
    graphs, batch = joined(lambda: nn.Linear(D, C), loss, sgd, dtype=torch.float32)
    scales = graphs.descent.module(*inputs_of(graphs, batch))[1]
    torch.testing.assert_close(scales, torch.full((N, C), 2 / (N * C)), rtol=1e-6, atol=0)


def test_what_does_not_hold_any_more_is_noticed():
    """The tables are compared with the step whenever they are made: here, with one that was found for another loss."""
    _, *made = MATCHES["cross entropy"]
    graphs, batch = joined(*made)
    inputs = inputs_of(graphs, batch)
    model = graphs.descent.structure._model
    model._middle = lambda *given: [given[-1].tanh().T if model._turned else given[-1].tanh(), given[-1].tanh()]
    *_, holds = graphs.descent.structure.tables(inputs)
    assert not bool(holds)


def test_ctrl_c_ends_it_after_whole_steps():
    extension = pytest.importorskip("mlopt._C")
    steps = extension.GlmSteps("linear", torch.arange(60).view(1, 60), 60, False, 1)
    x, table = torch.randn(2000, 60, dtype=torch.float64), torch.full((2000, 1), 1e-4, dtype=torch.float64)
    coefficients = torch.zeros(1, 3, 60, dtype=torch.float64)
    coefficients[0, 2] = -0.01
    arguments = x, table, table, coefficients, [torch.zeros(60, dtype=torch.float64)]

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        result = steps.run(*arguments, 10_000_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert 0 < result.num_steps < 10_000_000
    with pytest.raises(KeyboardInterrupt):
        result.raise_error()
    again = steps.run(*arguments, result.num_steps)
    assert torch.equal(again.fed[0], result.fed[0])


def test_wrong_arguments():
    extension = pytest.importorskip("mlopt._C")
    positions = torch.arange(6).view(2, 3)
    steps = extension.GlmSteps("softmax", positions, 6, False, 1)
    x, table, w = torch.randn(5, 3), torch.rand(5, 2), torch.randn(2, 3)
    good = (x, table, table, torch.zeros(1, 3, 6), [w], 2)
    assert steps.run(*good).num_steps == 2
    for position, wrong, message in (
        (0, torch.randn(5, 4), "expected x"),
        (1, torch.rand(5, 3), "scales"),
        (2, table.double(), "targets"),
        (3, torch.zeros(2, 3, 6), "coefficients"),
        (4, [w, w], "elements"),
        (5, -1, "num_steps"),
    ):
        bad = [*good]
        bad[position] = wrong
        with pytest.raises(RuntimeError, match=message):
            steps.run(*bad)
    for arguments, message in (
        (("cauchy", positions, 6, False, 1), "kind"),
        (("softmax", positions, 6, False, 3), "states"),
        (("softmax", positions * 0, 6, False, 1), "at most once"),
        (("softmax", positions, 7, False, 1), "a position for each"),
        (("softmax", positions[:, :0], 0, False, 1), "at least one"),
    ):
        with pytest.raises(RuntimeError, match=message):
            extension.GlmSteps(*arguments)
