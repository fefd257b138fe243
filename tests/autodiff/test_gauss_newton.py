"""Generalized Gauss-Newton products against dense ``J^T (d2 l/dz2) J`` by `torch.func`."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev

import mlopt
from mlopt.autodiff import FlatLayout, linearization_graphs
from mlopt.capture import capture_loss
from mlopt.planner import ProductNeeds
from mlopt.runtime.data import BatchStream
from mlopt.runtime.reference import AutogradDerivatives
from tests.capture.loss_kinds import KINDS
from tests.capture.test_loss_kinds import build
from tests.helpers.extras import extras

N, IN, OUT = 7, 5, 3
X = torch.randn(N, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
T = torch.rand(N, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def mlp(out=OUT):
    return nn.Sequential(nn.Linear(IN, 4), nn.Tanh(), nn.Linear(4, out)).double()


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(0.5 + torch.linspace(0, 1, N, dtype=torch.float64))

    def forward(self):
        return self.w


def problems(step, net):
    """Return a lower problem with loss ``step(problem, x, y, t)``, and an upper one with weights to read."""

    class Lower(mlopt.Problem):
        def training_step(self, batch):
            return step(self, *batch)

    class Upper(mlopt.Problem):
        def training_step(self, batch):
            return self.lower(batch[0]).square().mean() if isinstance(net, nn.Sequential) else self.upper().sum()

    weights = Weights()
    data = [(X, Y, T)]
    lower = Lower("lower", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), data=data)
    upper = Upper("upper", module=weights, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1), data=data)
    return lower, upper


def products(step, net, *, curvature="ggn", targets=(), fixed=False):
    """Return G as a dense matrix by the captured graph and by the eager reference, and the mixed products."""
    lower, upper = problems(step, net)
    by_name = {"lower": lower, "upper": upper}
    for p in by_name.values():
        p.bind(by_name)
    layouts = {name: FlatLayout.of(name, p.trained_parameters()) for name, p in by_name.items()}
    batch = BatchStream(lower).peek()
    loss = capture_loss(lower, list(by_name.values()), batch.tensors, batch.spec)
    inputs = loss.bind(batch.tensors)
    if fixed:  # recurrent layers cannot be differentiated with free sizes
        object.__setattr__(loss, "dynamic_dims", tuple(frozenset() for _ in loss.inputs))
    graphs = linearization_graphs(loss, inputs, layouts, hvp=True, targets=targets, curvature=curvature)
    needs = ProductNeeds(hvp=True, mixed=targets, curvature=curvature)
    state = torch.get_rng_state()
    residuals = [r.detach() if isinstance(r, torch.Tensor) else r for r in graphs.primal(*inputs)]
    torch.set_rng_state(state)
    eager = AutogradDerivatives(lower, by_name, layouts, needs).linearize(batch)
    basis = torch.eye(layouts["lower"].size, dtype=torch.float64)
    G = torch.stack([graphs.hvp(*residuals, v)[0] for v in basis])
    reference = torch.stack([eager.hvp(v) for v in basis])
    torch.testing.assert_close(G, reference, rtol=1e-9, atol=1e-11)
    mixed = [(graphs.mixed(*residuals, v), eager.mixed(v)) for v in basis] if targets else []
    for got, expected in mixed:
        for name, value in zip(targets, got, strict=True):
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11)
    return G


def dense(net, outputs, loss):
    """Return ``J^T (d2 l/dz2) J``; ``outputs(call)`` is z for a function that calls the network."""
    parameters = dict(net.named_parameters())
    shapes = [p.shape for p in parameters.values()]

    def z(flat):
        parts = flat.split([s.numel() for s in shapes])
        values = {name: part.reshape(s) for name, part, s in zip(parameters, parts, shapes, strict=True)}
        buffers = {k: v.clone() for k, v in net.named_buffers()}
        return outputs(lambda x: functional_call(net, {**values, **buffers}, (x,)))

    theta = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
    z0 = z(theta)
    J = jacrev(z)(theta).reshape(z0.numel(), -1)
    H = hessian(loss)(z0).reshape(z0.numel(), z0.numel())
    return J.T @ H @ J


# name -> (training step of (problem, x, y, t), loss as a function of the network outputs z)
LOSSES = {
    "cross_entropy": (lambda p, x, y, t: F.cross_entropy(p(x), y), lambda z: F.cross_entropy(z, Y)),
    "label_smoothing": (
        lambda p, x, y, t: F.cross_entropy(p(x), y, label_smoothing=0.2),
        lambda z: F.cross_entropy(z, Y, label_smoothing=0.2),
    ),
    "soft_targets": (
        lambda p, x, y, t: F.cross_entropy(p(x), t.softmax(1)),
        lambda z: F.cross_entropy(z, T.softmax(1)),
    ),
    "accumulated_in_place": (
        lambda p, x, y, t: sum_in_place(F.cross_entropy(p(x), y, reduction="none")),
        lambda z: 2 * F.cross_entropy(z, Y, reduction="sum"),
    ),
    "collected_in_place": (
        lambda p, x, y, t: collected_in_place(p(x), y),
        lambda z: F.cross_entropy(z[:3], Y[:3]) + 3 * F.cross_entropy(z[3:], Y[3:]),
    ),
    "focal": (
        lambda p, x, y, t: focal(F.cross_entropy(p(x), y, reduction="none")),
        lambda z: focal(F.cross_entropy(z, Y, reduction="none")),
    ),
    "mse": (lambda p, x, y, t: F.mse_loss(p(x), t), lambda z: F.mse_loss(z, T)),
    "rmse": (lambda p, x, y, t: F.mse_loss(p(x), t).sqrt(), lambda z: F.mse_loss(z, T).sqrt()),
    "smooth_l1": (lambda p, x, y, t: F.smooth_l1_loss(t, p(x)), lambda z: F.smooth_l1_loss(z, T)),
    "huber": (lambda p, x, y, t: F.huber_loss(p(x), t, delta=0.4), lambda z: F.huber_loss(z, T, delta=0.4)),
    "bce_logits": (
        lambda p, x, y, t: F.binary_cross_entropy_with_logits(p(x), t),
        lambda z: F.binary_cross_entropy_with_logits(z, T),
    ),
    "bce_sigmoid": (
        lambda p, x, y, t: F.binary_cross_entropy(p(x).sigmoid(), t),
        lambda z: F.binary_cross_entropy(z.sigmoid(), T),
    ),
    "soft_margin": (
        lambda p, x, y, t: F.soft_margin_loss(p(x), t.round() * 2 - 1),
        lambda z: F.softplus(-z * (T.round() * 2 - 1)).mean(),
    ),
    "poisson": (lambda p, x, y, t: F.poisson_nll_loss(p(x), t), lambda z: F.poisson_nll_loss(z, T)),
    "multilabel": (
        lambda p, x, y, t: F.multilabel_soft_margin_loss(p(x), t.round()),
        lambda z: F.multilabel_soft_margin_loss(z, T.round()),
    ),
    "nll_of_log_softmax": (
        lambda p, x, y, t: F.nll_loss(F.log_softmax(p(x), 1), y),
        lambda z: F.cross_entropy(z, Y),
    ),
    "kl": (
        lambda p, x, y, t: F.kl_div(F.log_softmax(p(x) / 2, 1), t.softmax(1), reduction="batchmean"),
        lambda z: F.kl_div(F.log_softmax(z / 2, 1), T.softmax(1), reduction="batchmean"),
    ),
    "gathered": (
        lambda p, x, y, t: -F.log_softmax(p(x), 1).gather(1, y[:, None]).mean(),
        lambda z: F.cross_entropy(z, Y),
    ),
    "logsumexp": (
        lambda p, x, y, t: logsumexp_loss(p(x), y),
        lambda z: logsumexp_loss(z, Y),
    ),
    "square": (lambda p, x, y, t: ((p(x) - t) ** 2).mean(), lambda z: ((z - T) ** 2).mean()),
    "times_itself": (lambda p, x, y, t: times_itself(p(x) - t).sum(), lambda z: ((z - T) ** 2).sum()),
    "squared_norm": (lambda p, x, y, t: torch.linalg.vector_norm(p(x) - t) ** 2, lambda z: ((z - T) ** 2).sum()),
    "softplus": (lambda p, x, y, t: F.softplus(-2 * p(x)).mean(), lambda z: F.softplus(-2 * z).mean()),
    "logsigmoid": (lambda p, x, y, t: -F.logsigmoid(p(x)).mean(), lambda z: -F.logsigmoid(z).mean()),
    "hard_examples": (
        lambda p, x, y, t: F.cross_entropy(p(x), y, reduction="none").topk(3)[0].mean(),
        lambda z: F.cross_entropy(z, Y, reduction="none").topk(3)[0].mean(),
    ),
}
INDEFINITE = {"focal"}


def sum_in_place(losses):
    total = losses.sum()
    total += losses.sum()
    return total


def collected_in_place(z, y):
    z *= 1
    out = torch.zeros(2, dtype=z.dtype)
    out[0] = F.cross_entropy(z[:3], y[:3])
    out[1] = F.cross_entropy(z[3:], y[3:])
    view = out[1:]
    view *= 3
    return out.sum()


def focal(losses):
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def logsumexp_loss(z, y):
    return (torch.logsumexp(z / 3, 1) - (z / 3)[torch.arange(len(y)), y]).mean()


def times_itself(r):
    return r * r


@pytest.mark.parametrize("name", extras(LOSSES, lambda name: list(LOSSES).index(name) % 2))
def test_against_dense(name):
    step, loss = LOSSES[name]
    net = mlp()
    G = products(step, net)
    expected = dense(net, lambda call: call(X), loss)
    torch.testing.assert_close(G, expected, rtol=1e-9, atol=1e-12)
    if name not in INDEFINITE:
        smallest = torch.linalg.eigvalsh((G + G.T) / 2).min()
        assert smallest > -1e-12 * G.norm()
    assert (products(step, net, curvature="hessian") - G).norm() > 1e-3 * G.norm()


def test_weights_of_another_problem():
    def step(p, x, y, t):
        losses = F.cross_entropy(p(x), y, reduction="none")
        return (p.upper() * losses.detach().sigmoid() * losses).mean()

    net = mlp()
    w = 0.5 + torch.linspace(0, 1, N, dtype=torch.float64)  # as `Weights` starts
    w = w * F.cross_entropy(net(X), Y, reduction="none").detach().sigmoid()
    G = products(step, net, targets=("upper",))
    expected = dense(net, lambda call: call(X), lambda z: (w * F.cross_entropy(z, Y, reduction="none")).mean())
    torch.testing.assert_close(G, expected, rtol=1e-9, atol=1e-12)


def test_outputs_that_read_another_problem():
    """The mixed products stay exact where the network outputs themselves read the upper parameters."""

    def step(p, x, y, t):
        h = p(x * p.upper()[:, None])
        return F.cross_entropy(h * p.upper()[:, None], y) + 0.1 * (p.upper().sum() * h).square().mean()

    products(step, mlp(), targets=("upper",))


def test_extra_penalties_are_exact():
    def penalty(parameters):
        a, *_ = parameters
        return sum((p**2).sum() for p in parameters) + 0.3 * torch.linalg.vector_norm(a) ** 2 + a.pow(4).mean().exp()

    def step(p, x, y, t):
        return F.cross_entropy(p(x), y) + 0.05 * penalty(list(p.parameters()))

    net = mlp()
    G = products(step, net)
    values = [p.detach() for p in net.parameters()]
    shapes = [p.shape for p in values]

    def of_flat(flat):
        parts = flat.split([s.numel() for s in shapes])
        return 0.05 * penalty([part.reshape(s) for part, s in zip(parts, shapes, strict=True)])

    exact = hessian(of_flat)(torch.cat([v.reshape(-1) for v in values]))
    expected = dense(net, lambda call: call(X), lambda z: F.cross_entropy(z, Y)) + exact
    torch.testing.assert_close(G, expected, rtol=1e-9, atol=1e-12)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(IN, 4), nn.Linear(4, OUT), nn.Linear(4, OUT)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return torch.stack([self.a(h), self.b(h)])


class Chained(TwoHeads):
    """The second head reads the first one's outputs (deep supervision)."""

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        first = self.a(h)
        return first, self.b(torch.cat([h, first], 1)[:, :4] * first.mean())


@pytest.mark.parametrize("kind", [TwoHeads, Chained])
def test_two_losses(kind):
    def step(p, x, y, t):
        first, second = p(x)
        return F.cross_entropy(first, y) + 0.7 * F.mse_loss(second, t)

    net = kind().double()
    G = products(step, net)
    expected = dense(
        net, lambda call: torch.stack(list(call(X))), lambda z: F.cross_entropy(z[0], Y) + 0.7 * F.mse_loss(z[1], T)
    )
    torch.testing.assert_close(G, expected, rtol=1e-9, atol=1e-12)


def test_chained_outputs_with_mixed_products():
    def step(p, x, y, t):
        first, second = p(x * p.upper()[:, None])
        return (p.upper() * F.cross_entropy(first, y, reduction="none")).mean() + F.mse_loss(second, t)

    products(step, Chained().double(), targets=("upper",))


def test_batch_norm():
    net = nn.Sequential(nn.Linear(IN, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, OUT)).double()
    G = products(lambda p, x, y, t: F.cross_entropy(p(x), y), net)
    expected = dense(net, lambda call: call(X), lambda z: F.cross_entropy(z, Y))
    torch.testing.assert_close(G, expected, rtol=1e-9, atol=1e-12)


def test_dropout_draws_one_mask():
    """`products` compares with the eager reference, which draws the mask from the same generator state."""
    net = nn.Sequential(nn.Linear(IN, 6), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, OUT)).double()
    G = products(lambda p, x, y, t: F.cross_entropy(p(x), y), net)
    assert torch.linalg.eigvalsh(G).min() > -1e-12


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, OUT)

    def forward(self, x):
        return self.head(self.lstm(x[:, :4].reshape(-1, 2, 2))[0])[:, -1]


def test_lstm():
    net = Recurrent().double()
    G = products(lambda p, x, y, t: F.cross_entropy(p(x), y), net, fixed=True)
    parameters = list(net.parameters())
    z = net(X)
    rows = [torch.autograd.grad(z.reshape(-1)[i], parameters, retain_graph=True) for i in range(z.numel())]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    H = hessian(lambda z: F.cross_entropy(z, Y))(z.detach()).reshape(z.numel(), -1)
    torch.testing.assert_close(G, J.T @ H @ J, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "square", "logsumexp", "bce_logits", "poisson"])
def test_equals_the_hessian_of_a_linear_model(name):
    step, _ = LOSSES[name]
    net = nn.Linear(IN, OUT).double()
    torch.testing.assert_close(products(step, net), products(step, net, curvature="hessian"), rtol=1e-9, atol=1e-12)


REFUSED = {
    "no loss function": lambda p, x, y, t: torch.tanh(p(x)).mean(),
    "negative convex": lambda p, x, y, t: -F.softplus(p(x)).mean(),
    "maximized likelihood": lambda p, x, y, t: F.log_softmax(p(x), 1).mean(),
    "detached outputs": lambda p, x, y, t: F.cross_entropy(p(x).detach(), y) + torch.tanh(p(x)).mean(),
    "only a metric": lambda p, x, y, t: {"loss": torch.sin(p(x)).sum(), "ce": F.cross_entropy(p(x), y)},
    "only a penalty": lambda p, x, y, t: torch.sin(p(x)).sum() + sum((q**2).sum() for q in p.parameters()),
}


def compile_with(step, **options):
    torch.manual_seed(0)
    net = mlp()

    class Lower(mlopt.Problem):
        def training_step(self, batch):
            return step(self, *batch)

    class Upper(mlopt.Problem):
        def training_step(self, batch):
            return F.cross_entropy(self.lower(batch[0]), batch[1])

    # the hypergradient passes through a weighted penalty, so that any loss above has an edge
    weights = Weights()
    estimator = options.pop("estimator", mlopt.CG(max_steps=60, rtol=1e-13, damping=0.1, curvature="ggn"))
    sgd = torch.optim.SGD
    data = [(X, Y, T)]
    lower = Lower("lower", module=net, optimizer=sgd(net.parameters(), lr=0.1), data=data, hypergradient=estimator)
    upper = Upper("upper", module=weights, optimizer=sgd(weights.parameters(), lr=0.1), data=data)
    return mlopt.compile(mlopt.Graph([lower, upper]), progress=False, **options), net, weights


def weighted(step):
    def with_edge(p, x, y, t):
        result = step(p, x, y, t)
        extra = (p.upper() * torch.tanh(p(x)).sum(1)).mean()
        return {**result, "loss": result["loss"] + extra} if isinstance(result, dict) else result + extra

    return with_edge


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(mlopt.errors.LossError, match=r"'lower'.*curvature='hessian'"):
        compile_with(weighted(REFUSED[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_an_island(name):
    def branching(p, x, y, t):
        result = REFUSED[name](p, x, y, t)
        loss = result["loss"] if isinstance(result, dict) else result
        return loss * 2 if loss > 0 else loss

    with (
        pytest.warns(mlopt.errors.IslandWarning),
        pytest.raises(mlopt.errors.LossError, match=r"'lower'.*curvature='hessian'"),
    ):
        compile_with(weighted(branching))


def test_refuses_writes_it_cannot_follow():
    def step(p, x, y, t):
        z = p(x)
        part = z[:, 1:]
        loss = F.cross_entropy(part, y % 2)
        z *= 2
        return (p.upper() * z.square().sum(1)).mean() + loss * part.mean()

    with pytest.raises(mlopt.errors.LossError, match="in-place mul_"):
        compile_with(step)


def test_refuses_cuts_inside_a_transform():
    def step(p, x, y, t):
        return (p.upper() * torch.func.vmap(F.cross_entropy)(p(x), y)).mean() + torch.func.vmap(torch.sum)(
            p(x)
        ).square().mean()

    with pytest.raises(mlopt.errors.LossError, match=r"torch\.func"):
        compile_with(step)


def reweighted(p, x, y, t):
    return (p.upper() * F.cross_entropy(p(x), y, reduction="none")).mean()


def branching_reweighted(p, x, y, t):
    loss = reweighted(p, x, y, t)
    return loss if loss > 0 else 2 * loss


def dense_hypergradient(net, weights, damping):
    w = weights.w.detach()
    G = dense(net, lambda call: call(X), lambda z: (w * F.cross_entropy(z, Y, reduction="none")).mean())
    theta = list(net.parameters())

    def flat(tensors):
        return torch.cat([t.reshape(-1) for t in tensors])

    v = flat(torch.autograd.grad(F.cross_entropy(net(X), Y), theta))
    q = torch.linalg.solve(G + damping * torch.eye(len(v), dtype=torch.float64), v)
    loss = (weights.w * F.cross_entropy(net(X), Y, reduction="none")).mean()
    gradient = flat(torch.autograd.grad(loss, theta, create_graph=True))
    return -torch.autograd.grad(gradient @ q, weights.w)[0]


def test_hypergradient_against_a_dense_solve():
    plan, net, weights = compile_with(reweighted, strict=True)
    got = plan.hypergradient("upper")["w"]
    torch.testing.assert_close(got, dense_hypergradient(net, weights, 0.1), rtol=1e-8, atol=1e-12)
    assert "curvature='ggn'" in plan.explain() and "Gauss-Newton products" in plan.explain()


def test_hypergradient_of_an_island():
    with pytest.warns(mlopt.errors.IslandWarning):
        plan, net, weights = compile_with(branching_reweighted)
    got = plan.hypergradient("upper")["w"]
    torch.testing.assert_close(got, dense_hypergradient(net, weights, 0.1), rtol=1e-8, atol=1e-12)


def test_neumann():
    estimator = mlopt.Neumann(num_terms=4000, scale=0.5, curvature="ggn")
    plan, net, weights = compile_with(
        lambda p, x, y, t: reweighted(p, x, y, t) + 0.1 * sum((q**2).sum() for q in p.parameters()),
        estimator=estimator,
        strict=True,
    )
    got = plan.hypergradient("upper")["w"]
    torch.testing.assert_close(got, dense_hypergradient(net, weights, 0.2), rtol=1e-8, atol=1e-12)


def test_verification_catches_a_wrong_cut(monkeypatch):
    def hidden(loss):
        return [n for n in loss.module.graph.nodes if "tanh" in str(n.target)][:1]

    monkeypatch.setattr("mlopt.autodiff.gauss_newton.network_outputs", hidden)
    with pytest.raises(mlopt.errors.VerificationError, match="Gauss-Newton-vector product"):
        compile_with(reweighted, strict=True)


@pytest.mark.slow
def test_positive_where_the_hessian_is_not():
    step, _ = LOSSES["cross_entropy"]
    smallest = {c: [] for c in ("ggn", "hessian")}
    for seed in range(3):
        torch.manual_seed(seed)
        net = mlp()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(3)
        for curvature, values in smallest.items():
            values.append(torch.linalg.eigvalsh(products(step, net, curvature=curvature)).min().item())
    assert min(smallest["ggn"]) > -1e-13 and min(smallest["hessian"]) < -1e-3


COMPILED = [name for name, kind in KINDS.items() if kind.status == "compiled"]


@pytest.mark.parametrize("name", extras(COMPILED, lambda name: COMPILED.index(name) % 10))
def test_kinds_of_losses_are_verified_or_refused(name):
    """With strict=True the compiled product must agree with the eager one, which finds z by itself."""
    lower, upper = build(KINDS[name], torch.float64)
    lower.hypergradient = mlopt.Neumann(num_terms=3, scale=0.1, curvature="ggn")
    with contextlib.suppress(mlopt.errors.LossError):
        plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)
        plan.run(1)


@pytest.mark.parametrize("estimator", [mlopt.CG, mlopt.Neumann])
def test_unknown_curvature(estimator):
    with pytest.raises(ValueError, match="argument `curvature`: expected 'hessian' or 'ggn', got 'fisher'"):
        estimator(curvature="fisher")
