"""`Unroll` and `SAMA` against plain autograd through functional updates, float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import mlopt
from mlopt.runtime import unroll
from tests.helpers.bilevel import compiled, data, make
from tests.helpers.double_backward import flat
from tests.helpers.extras import extras
from tests.helpers.quadratics import program

ROOT = Path(__file__).parents[2]


def adam(w, g, s, t, lr=0.05, betas=(0.9, 0.999), eps=1e-8, decay=0.0):
    """Kingma and Ba 2015, with decoupled weight decay."""
    m, v = s or (torch.zeros_like(w), torch.zeros_like(w))
    w = w * (1 - lr * decay)
    m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    return w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps), (m, v)


def momentum(w, g, s, t, lr=0.1, nesterov=False, decay=0.0):
    g = g + decay * w
    buffer = g if s is None else 0.9 * s + g
    return w - lr * (g + 0.9 * buffer if nesterov else buffer), buffer


def rmsprop(w, g, s, t, lr=0.01):
    s = 0.01 * g * g if s is None else 0.99 * s + 0.01 * g * g
    return w - lr * g / (s.sqrt() + 1e-8), s


def adagrad(w, g, s, t, lr=0.05):
    s = g * g if s is None else s + g * g
    return w - lr * g / (s.sqrt() + 1e-10), s


OPTIMIZERS = {
    "sgd": (lambda p: optim.SGD(p, lr=0.1), lambda w, g, s, t: (w - 0.1 * g, None)),
    "momentum": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), momentum),
    "nesterov": (
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.02),
        lambda *a: momentum(*a, nesterov=True, decay=0.02),
    ),
    "adam": (lambda p: optim.Adam(p, lr=0.05), adam),
    "adamw": (lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.1), lambda *a: adam(*a, decay=0.1)),
    "rmsprop": (lambda p: optim.RMSprop(p, lr=0.01), rmsprop),
    "adagrad": (lambda p: optim.Adagrad(p, lr=0.05), adagrad),
}


class Reference:
    """The training run as one differentiable function of the upper parameters."""

    def __init__(self, lower, upper, step):
        self.lower, self.upper, self.step = lower, upper, step
        self.start = [p.detach().clone() for p in lower.module.parameters()]

    def hypergradient(self, batches, upper_batch, lam, scale=None):
        names = [n for n, _ in self.lower.module.named_parameters()]
        net, weights = self.lower.module, self.upper.module
        lam = [x.detach().clone().requires_grad_() for x in lam]
        upper_names = [n for n, _ in weights.named_parameters()]
        theta = [p.clone().requires_grad_() for p in self.start]
        states = [None] * len(theta)
        for t, (x, y) in enumerate(batches, 1):
            logits = torch.func.functional_call(net, dict(zip(names, theta, strict=True)), (x,))
            losses = F.cross_entropy(logits, y, reduction="none")
            w = torch.func.functional_call(
                weights, dict(zip(upper_names, lam, strict=True)), (losses.detach()[:, None],)
            ).squeeze(1)
            gradients = torch.autograd.grad((w * losses).mean(), theta, create_graph=True)
            if scale is not None:
                gradients = scale(gradients)
            pairs = [self.step(p, g, s, t) for p, g, s in zip(theta, gradients, states, strict=True)]
            theta, states = [p for p, _ in pairs], [s for _, s in pairs]
        x, y = upper_batch
        loss = F.cross_entropy(torch.func.functional_call(net, dict(zip(names, theta, strict=True)), (x,)), y)
        return flat(torch.autograd.grad(loss, lam)), [p.detach() for p in theta]


def prepared(name, num_steps, **options):
    make_optimizer, step = OPTIMIZERS[name]
    torch.manual_seed(0)
    sizes = options.pop("sizes", (12,) * max(num_steps, 2))
    lower, upper = make(dtype=torch.float64, sizes=sizes, **options)
    lower.optimizer = make_optimizer(lower.module.parameters())
    return lower, upper, Reference(lower, upper, step)


@pytest.mark.parametrize("num_steps", extras([1, 3, 20], lambda n: n == 1))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unroll_equals_autograd_through_the_run(name, num_steps):
    lower, upper, reference = prepared(name, num_steps, hypergradient=mlopt.Unroll(num_steps))
    plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)
    for _ in range(num_steps):
        plan._executor.step("classifier")
    lam = list(upper.module.parameters())
    expected, theta = reference.hypergradient(lower.data[:num_steps], upper.data[0], lam)
    for p, value in zip(lower.module.parameters(), theta, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-10, atol=1e-12)
    got = flat(plan.hypergradient("reweight", batch=upper.data[0]).values())
    assert expected.norm() > 0
    assert (got - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_truncation_takes_the_last_steps(num_steps):
    """Steps before the last `num_steps` are constants."""
    total = 10
    lower, upper, reference = prepared("momentum", total, hypergradient=mlopt.Unroll(num_steps))
    plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)
    for _ in range(total):
        plan._executor.step("classifier")
    lam = list(upper.module.parameters())
    # The reference starts at the state before the last steps.
    start, states = reference.start, None
    before = total - num_steps
    again, upper_again, _ = prepared("momentum", total, hypergradient=mlopt.Unroll(1))
    plan_again = mlopt.compile(mlopt.Graph([again, upper_again]), progress=False, strict=True)
    for _ in range(before):
        plan_again._executor.step("classifier")
    start = [p.detach().clone() for p in again.module.parameters()]
    states = [again.optimizer.state[p].get("momentum_buffer") for p in again.module.parameters()]
    initial = iter([s if s is None else s.clone() for s in states])
    first = {}

    def step(w, g, s, t):
        if t == 1 and len(first) < len(start):
            first[len(first)] = s = next(initial)
        return momentum(w, g, s, t)

    reference.start, reference.step = start, step
    expected, _ = reference.hypergradient(lower.data[before:total], upper.data[0], lam)
    got = flat(plan.hypergradient("reweight", batch=upper.data[0]).values())
    assert (got - expected).norm() <= 1e-9 * expected.norm()


def test_dropout_batch_norm_and_micro_batches():
    """Replayed steps see the masks, statistics and micro-batches of the real ones: checked by finite differences."""
    options = {"dropout": 0.3, "batch_norm": True, "gradient_accumulation": 2, "sizes": (6, 7, 8) * 4}
    found = {}
    for eps in (0.0, 1e-5, -1e-5):
        torch.manual_seed(0)
        lower, upper = make(dtype=torch.float64, hypergradient=mlopt.Unroll(6), **options)
        # Without the weights' dependence on a detached loss, the run's derivative is that of the finite difference.
        lower.training_step = lambda batch, lower=lower: (
            lower.reweight(batch[0][:, :1]).squeeze(1)
            * F.cross_entropy(lower.module(batch[0]), batch[1], reduction="none")
        ).mean()
        direction = [torch.randn_like(p) for p in upper.module.parameters()]
        with torch.no_grad():
            for p, d in zip(upper.module.parameters(), direction, strict=True):
                p += eps * d
        lower.optimizer = optim.Adam(lower.module.parameters(), lr=0.02)
        plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)
        torch.manual_seed(3)
        for _ in range(6):
            plan._executor.step("classifier")
        if eps == 0.0:
            torch.manual_seed(11)
            gradients = plan.hypergradient("reweight", batch=upper.data[0])
            slope = sum((g * d).sum() for g, d in zip(gradients.values(), direction, strict=True))
        torch.manual_seed(11)
        found[eps] = upper.training_step(upper.data[0])["loss"].item()
    difference = (found[1e-5] - found[-1e-5]) / 2e-5
    assert abs(float(slope) - difference) < 1e-5 * max(1e-3, abs(difference)) + 1e-9


def test_clipping_and_schedule_are_differentiated():
    def scale(gradients):
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        return [g * (0.2 / norm).clamp(max=1) for g in gradients]

    lower, upper, reference = prepared("sgd", 5, hypergradient=mlopt.Unroll(5), clip_norm=0.2)
    lower.scheduler = optim.lr_scheduler.StepLR(lower.optimizer, step_size=2, gamma=0.5)
    reference.step = lambda w, g, s, t: (w - 0.1 * 0.5 ** ((t - 1) // 2) * g, None)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)
    for _ in range(5):
        plan._executor.step("classifier")
    expected, _ = reference.hypergradient(lower.data[:5], upper.data[0], list(upper.module.parameters()), scale)
    got = flat(plan.hypergradient("reweight", batch=upper.data[0]).values())
    assert (got - expected).norm() <= 1e-9 * expected.norm()


class Detached(mlopt.Problem):
    """The weights enter with and without derivative."""

    def training_step(self, batch):
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        return (self.reweight(x[:, :1]).squeeze(1) * losses).mean() * self.other.module.weight.detach().exp().sum()


class Other(mlopt.Problem):
    def training_step(self, batch):
        return (self.module.weight - 1).square().sum()


def test_unrolled_steps_see_the_past_values_of_everything():
    """Also of a problem that no derivative leads to, and that moves with every step."""
    torch.manual_seed(0)
    lower, upper = make(classifier=Detached, dtype=torch.float64, sizes=(12,) * 6, hypergradient=mlopt.Unroll(5))
    net = nn.Linear(1, 1, bias=False).double()
    other = Other("other", module=net, optimizer=optim.SGD(net.parameters(), lr=0.2))
    lower.warmup_steps = 100
    plan = mlopt.compile(mlopt.Graph([other, lower, upper]), progress=False, strict=True)
    assert plan.graph.reads("classifier").keys() == {"reweight"}
    plan.run(5)
    replayed(plan, lower)


def replayed(plan, problem):
    """Make the recorded steps again: they end in the present parameters."""
    executor, history = plan._executor, plan._executor.histories[problem.name]
    first, _, state = history.segments(10**6)[0]
    reversal = unroll.Reversal(problem, executor.problems, executor.layouts, history, executor, lambda g: g)
    for number in range(first, history.end):
        state = reversal._advance(history[number], state)
    for p, value in zip(problem.module.parameters(), state.parameters, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-13)


def test_unroll_through_upper_steps():
    """More steps than between two upper steps: every step is made again with the upper parameters it had."""
    plan, lower, _ = compiled(dtype=torch.float64, sizes=(12,) * 9, unroll_steps=2, hypergradient=mlopt.Unroll(6))
    plan.run(7)
    replayed(plan, lower)


@pytest.mark.slow
def test_every_level():
    """A chain and a nested program, every problem unrolled: against finite differences of the whole run."""
    for spec in ({"a": ["c"], "b": ["a"], "c": ["b"]}, {"a": ["u"], "b": ["a", "u"], "u": ["a", "b"]}):
        top = list(spec)[-1]

        def run(shift, spec=spec, top=top):
            problems = program(spec, hypergradient=mlopt.Unroll(1), warmup_steps=10**6)
            by_name = {p.name: p for p in problems}
            with torch.no_grad():
                by_name[top].module.w += shift
            plan = mlopt.compile(mlopt.Graph(problems), progress=False, strict=True)
            for name in list(spec)[:-1]:
                plan._executor.plan  # noqa: B018
                own_step(plan, name)
            return plan, by_name[top]

        def own_step(plan, name):
            plan._executor.step(name)

        plan, _ = run(0.0)
        got = plan.hypergradient(top)["w"]
        assert torch.isfinite(got).all()
        if "b" in spec and "b" in dict(spec).get("u", ()):
            # No problem below the top reads one above itself but the top: steps are those of own losses alone.
            expected = torch.zeros_like(got)
            for i in range(len(got)):
                e = torch.zeros_like(got)
                e[i] = 1e-6
                plus, minus = (float(p[1].training_step(None)) for p in (run(e), run(-e)))
                expected[i] = (plus - minus) / 2e-6
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


class Tuner(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_lr = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        self.decay = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))


class Trained(mlopt.Problem):
    def training_step(self, batch):
        return F.cross_entropy(self.module(batch[0]), batch[1])

    def optimizer_hyperparameters(self):
        return {"lr": self.tuner.module.log_lr.exp(), "weight_decay": self.tuner.module.decay}


class Validation(mlopt.Problem):
    def training_step(self, batch):
        return F.cross_entropy(self.trained(batch[0]), batch[1])


def tuned(make_optimizer, shift=None, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    tuner = Tuner()
    if shift is not None:
        with torch.no_grad():
            for p, d in zip(tuner.parameters(), shift, strict=True):
                p += d
    trained = Trained(
        "trained",
        module=net,
        optimizer=make_optimizer(net.parameters()),
        data=data((12,) * 8, dtype=torch.float64),
        **{"hypergradient": mlopt.Unroll(8), "unroll_steps": 8, **options},
    )
    validation = Validation(
        "tuner",
        module=tuner,
        optimizer=optim.Adam(tuner.parameters(), lr=0.1),
        data=data((12,), dtype=torch.float64),
    )
    return mlopt.Graph([trained, validation]), trained, validation


@pytest.mark.parametrize(
    "make_optimizer", [lambda p: optim.SGD(p, lr=1.0, momentum=0.9), lambda p: optim.AdamW(p, lr=1.0)]
)
def test_learned_learning_rate_and_weight_decay(make_optimizer):
    """Against finite differences of the validation loss after the whole run."""

    def validation_loss(shift):
        graph, trained, validation = tuned(make_optimizer, shift)
        plan = mlopt.compile(graph, progress=False)
        for _ in range(8):
            plan._executor.step("trained")
        return plan, trained, validation, float(validation.training_step(validation.data[0]))

    plan, trained, _, _ = validation_loss(None)
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(float(torch.tensor(-2.0).double().exp()))
    assert plan.graph.reads("trained") == {"tuner": ("log_lr", "decay")}
    got = plan.hypergradient("tuner")
    for i, name in enumerate(("log_lr", "decay")):
        shift = [torch.tensor(0.0), torch.tensor(0.0)]
        sides = []
        for sign in (1, -1):
            shift[i] = torch.tensor(sign * 1e-6, dtype=torch.float64)
            sides.append(validation_loss(shift)[3])
        assert float(got[name]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5)


def test_learned_settings_train():
    graph, _, validation = tuned(lambda p: optim.SGD(p, lr=1.0))
    before = validation.module.log_lr.item()
    plan = mlopt.compile(graph, progress=False)
    plan.run(24)
    assert validation.module.log_lr.item() != before
    assert "unroll" in plan.explain()


def test_learned_settings_need_an_unroll():
    graph, *_ = tuned(lambda p: optim.SGD(p, lr=1.0), hypergradient=mlopt.CG())
    with pytest.raises(mlopt.errors.ProblemError, match="'trained'.*no influence; use hypergradient=mlopt.Unroll"):
        mlopt.compile(graph, progress=False)
    graph, trained, _ = tuned(lambda p: optim.SGD(p, lr=1.0))
    trained.optimizer_hyperparameters = lambda: {"learning_rate": torch.tensor(1.0)}
    with pytest.raises(
        mlopt.errors.ProblemError, match=r"0-d tensors under the names of the optimizer's settings \(lr,"
    ):
        mlopt.compile(graph, progress=False)


@pytest.mark.slow
def test_memory_grows_with_the_square_root_of_the_steps():
    """Peak of live tensors above what the program itself needs, at 100 steps against 10; in a process of its own."""
    command = [sys.executable, "-m", "tests.hypergradient.unroll_memory", "10", "100"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    few, many = map(int, result.stdout.split())
    assert few > 4 * 40_000  # at least one state of Adam and its gradient
    assert many < 3 * few, (few, many)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adamw", "rmsprop"])
def test_sama_is_the_factor_of_the_next_update(name, exact):
    make_optimizer, step = OPTIMIZERS[name]
    torch.manual_seed(0)
    lower, upper = make(dtype=torch.float64, sizes=(12,) * 4)
    lower.optimizer = make_optimizer(lower.module.parameters())
    lower.hypergradient = mlopt.SAMA(exact=exact, step=1e-5)
    lower.training_step = lambda batch: (
        lower.reweight(batch[0][:, :1]).squeeze(1) * F.cross_entropy(lower.module(batch[0]), batch[1], reduction="none")
    ).mean()
    plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)
    for _ in range(3):
        plan._executor.step("classifier")
    theta, lam = list(lower.module.parameters()), list(upper.module.parameters())
    gradient = torch.autograd.grad(lower.training_step(lower.data[2]), theta, create_graph=True)
    states = []
    for p in theta:
        s = lower.optimizer.state.get(p, {})
        states.append(
            {"sgd": None, "adamw": (s.get("exp_avg"), s.get("exp_avg_sq")), "rmsprop": s.get("square_avg")}[name]
        )
    v = torch.autograd.grad(upper.training_step(upper.data[0])["loss"], theta)
    q = []
    for p, g, s, c in zip(theta, gradient, states, v, strict=True):
        x = g.detach().requires_grad_()
        updated, _ = step(p.detach(), x, s, 4)
        q.append(-torch.autograd.grad(updated.sum(), x)[0] * c)
    expected = -flat(torch.autograd.grad(gradient, lam, q))
    got = flat(plan.hypergradient("reweight", batch=upper.data[0]).values())
    assert (got - expected).norm() <= (1e-9 if exact else 1e-6) * expected.norm()


@pytest.mark.parametrize("estimator", [mlopt.SAMA(), mlopt.Unroll(3)])
def test_unsupported_optimizers_are_refused_at_compile_time(estimator):
    class Closure(optim.SGD):
        def step(self, closure):
            closure()

    lower, upper = make(hypergradient=estimator)
    lower.optimizer = Closure(lower.module.parameters(), lr=0.1)
    with pytest.raises(mlopt.errors.UpdateError, match="'classifier'.*Closure"):
        mlopt.compile(mlopt.Graph([lower, upper]), progress=False)


def test_unroll_after_roll_back():
    """The replayed steps are the ones that are differentiated."""
    torch.manual_seed(0)
    lower, upper = make(dtype=torch.float64, sizes=(12,) * 6, unroll_steps=3, hypergradient=mlopt.Unroll(3))
    upper.roll_back = True
    plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)
    plan.run(3)
    history = plan._executor.histories["classifier"]
    assert history.end == 3
    values = [history[i].reads[id(next(upper.module.parameters()))] for i in range(3)]
    assert all(torch.equal(v, next(upper.module.parameters())) for v in values)
    assert flat(plan.hypergradient("reweight").values()).norm() > 0
