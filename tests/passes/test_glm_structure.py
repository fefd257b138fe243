"""Which losses have GLM structure, and which only look like it; what is found computes the product."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.autodiff import linearization
from mlopt.passes import GlmRowKind, find_glm
from tests.helpers.extras import extras

N, D, C = 11, 6, 3


class Weights(nn.Module):
    """A plain matrix [D, C], with a bias where asked for."""

    def __init__(self, *shape, bias=False):
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(*shape))
        self.b = nn.Parameter(torch.randn(shape[1:])) if bias else None


class Frozen(nn.Module):
    """A linear head on features of a network that is not trained."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Tanh()).requires_grad_(False)
        self.head = nn.Linear(8, C)

    def forward(self, x):
        return self.head(self.body(x))


class Twice(nn.Module):
    """One matrix in two layers."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(D, D))

    def forward(self, x):
        return torch.tanh(x @ self.w) @ self.w


class TwoLayers(nn.Sequential):
    """Features that depend on trained parameters."""

    def __init__(self):
        super().__init__(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))


class Normed(nn.Sequential):
    """BatchNorm on the logits."""

    def __init__(self):
        super().__init__(nn.Linear(D, C), nn.BatchNorm1d(C, affine=False))


class Lower(mlopt.Problem):
    def training_step(self, batch):
        return self.loss(self, *batch)


class Upper(mlopt.Problem):
    def training_step(self, batch):
        return sum((p - 0.1).square().sum() for p in self.lower.parameters() if p.requires_grad) + self.module.c.sum()


class Scalars(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.rand(N))
        self.decay = nn.Parameter(torch.rand(D, C))


def derivatives(module, loss, batch=None, backend="eager", dtype=torch.float64, **options):
    """A plan, and the derivatives of the lower problem at its first batch."""
    x, y = torch.randn(N, D), torch.randint(C, (N,))
    batch = batch or (x.to(dtype), y)
    module, upper = module.to(dtype), Scalars().to(dtype)
    trained = [p for p in module.parameters() if p.requires_grad]
    lower = Lower(
        "lower",
        module=module,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        data=[batch],
        hypergradient=mlopt.CG(max_steps=30, damping=0.5, rtol=1e-12),
        **options,
    )
    lower.loss = loss
    upper = Upper("upper", module=upper, optimizer=torch.optim.SGD(upper.parameters(), lr=0.1), data=[batch])
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend=backend, strict=True, progress=False)
    executor = plan._executor
    return plan, executor.derive("lower", executor.states["lower"].stream.peek())


def weighted(p, losses):
    return (p.upper.module.c * losses).mean()


def with_decay(p, loss, w):
    return loss + (p.upper.module.decay.exp() * w.square()).sum()


MATCHES = {
    "cross entropy": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none")),
        GlmRowKind.RANK_ONE,
    ),
    "cross entropy, mean": (
        lambda: nn.Linear(D, C, bias=False),
        lambda p, x, y: F.cross_entropy(p(x), y) + 0 * p.upper.module.c.sum(),
        GlmRowKind.RANK_ONE,
    ),
    "label smoothing": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none", label_smoothing=0.1)),
        GlmRowKind.RANK_ONE,
    ),
    "ignored labels": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none", ignore_index=1)),
        GlmRowKind.RANK_ONE,
    ),
    "per-parameter decay": (
        lambda: Weights(D, C, bias=True),
        lambda p, x, y: with_decay(p, F.cross_entropy(x @ p.module.w + p.module.b, y), p.module.w),
        GlmRowKind.RANK_ONE,
    ),
    "einsum": (
        lambda: Weights(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(torch.einsum("nd,dc->nc", x, p.module.w), y, reduction="none")),
        GlmRowKind.RANK_ONE,
    ),
    "functional linear": (
        lambda: Weights(C, D),
        lambda p, x, y: weighted(p, F.cross_entropy(F.linear(x, p.module.w), y, reduction="none")),
        GlmRowKind.RANK_ONE,
    ),
    "logistic, a vector": (
        lambda: Weights(D),
        lambda p, x, y: weighted(
            p, F.binary_cross_entropy_with_logits(x @ p.module.w, (y > 0).double(), reduction="none")
        ),
        GlmRowKind.DIAGONAL,
    ),
    "logistic, one column": (
        lambda: nn.Linear(D, 1),
        lambda p, x, y: weighted(p, F.softplus(p(x).squeeze(1)) - (y > 0) * p(x).squeeze(1)),
        GlmRowKind.DIAGONAL,
    ),
    "several logits": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(
            p, F.binary_cross_entropy_with_logits(p(x), F.one_hot(y, C).double(), reduction="none").sum(1)
        ),
        GlmRowKind.DIAGONAL,
    ),
    "least squares": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, (p(x) - F.one_hot(y, C)).square().sum(1)),
        GlmRowKind.DIAGONAL,
    ),
    "poisson": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, (p(x).exp() - F.one_hot(y, C) * p(x)).sum(1)),
        GlmRowKind.DIAGONAL,
    ),
    "a loss of its own": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, (p(x).softmax(1) ** 2).sum(1) * p(x).tanh().sum(1).exp()),
        GlmRowKind.BLOCK,
    ),
    "a mixed head": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(
            p, F.cross_entropy((p(x) @ torch.ones(C, C).tril().double()).tanh(), y, reduction="none")
        ),
        GlmRowKind.BLOCK,
    ),
    "masked rows": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none") * (x[:, 0] > 0)),
        GlmRowKind.RANK_ONE,
    ),
    "frozen features": (
        Frozen,
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none")),
        GlmRowKind.RANK_ONE,
    ),
    "dropout on X": (
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(D, C)),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none")),
        GlmRowKind.RANK_ONE,
    ),
}

MISSES = {
    "a weight in two layers": (Twice, lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none"))),
    "a weight on two inputs": (
        lambda: Weights(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(x @ p.module.w + (x * x) @ p.module.w, y, reduction="none")),
    ),
    "data scaled by a parameter": (
        lambda: Weights(D, C, bias=True),
        lambda p, x, y: weighted(p, F.cross_entropy((x * p.module.b[0]) @ p.module.w, y, reduction="none")),
    ),
    "batch norm on the logits": (Normed, lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none"))),
    "softmax over the batch": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, p(x).softmax(0).square().sum(1)),
    ),
    "contrastive": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x) @ p(x).T, torch.arange(len(x)), reduction="none")),
    ),
    "a mean over the batch inside": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, (p(x) - p(x).mean(0)).square().sum(1)),
    ),
    "rows in another order": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, (p(x) * p(x).flip(0)).exp().sum(1)),
    ),
    "rows next to each other": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: (p(x)[1:] * p(x)[:-1]).exp().sum() + p.upper.module.c.sum(),
    ),
    "trained features": (TwoLayers, lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none"))),
    "a transposed X": (
        lambda: Weights(N, C),
        lambda p, x, y: F.softplus(x.T @ p.module.w).sum() + p.upper.module.c.sum(),
    ),
    "a regularizer that couples parameters": (
        lambda: nn.Linear(D, C),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none")) + p.module.weight.sum() ** 4,
    ),
    "a bias that is also a scale": (
        lambda: Weights(D, C, bias=True),
        lambda p, x, y: weighted(p, F.cross_entropy(x @ p.module.w * p.module.b, y, reduction="none")),
    ),
    "too many columns": (
        lambda: nn.Linear(D, 33),
        lambda p, x, y: weighted(p, F.cross_entropy(p(x), y, reduction="none")),
    ),
    "a bias per row": (
        lambda: Weights(N, 1, bias=True),
        lambda p, x, y: weighted(p, F.softplus(x.sum(1) * p.module.w[:, 0] + p.module.b)),
    ),
    "no matrix product": (
        lambda: Weights(D),
        lambda p, x, y: weighted(p, F.softplus((x * p.module.w).sum(1))),
    ),
    "part of a matrix": (
        lambda: Weights(D, 2 * C),
        lambda p, x, y: weighted(p, F.cross_entropy(x @ p.module.w[:, :C] + p.module.w[0, C:], y, reduction="none")),
    ),
}


def operator_and_graph(found):
    """The native operator of what was found, and the graph it stands for, as functions of v."""
    linearization = found.graphs.linearization
    batch = found.batch
    torch.manual_seed(5)
    residuals = linearization.primal(*found.graphs.loss.bind(batch.tensors))
    structure = find_glm(linearization.hvp)
    extension = pytest.importorskip("mlopt._C")
    operator = extension.GlmOperator(
        structure.matrix(residuals).contiguous(),
        structure.kind.value,
        structure.curvature(residuals),
        structure.positions,
        structure.size,
        structure.bias,
        structure.diagonal(residuals),
    )
    return operator, lambda v: linearization.hvp(*residuals, v)[0]


@pytest.mark.parametrize("name", MATCHES)
def test_found_and_right(name):
    module, loss, kind = MATCHES[name]
    plan, found = derivatives(module(), loss)
    structure = find_glm(found.graphs.linearization.hvp)
    assert structure is not None and structure.kind is kind
    found.batch = plan._executor.states["lower"].stream.peek()
    operator, graph = operator_and_graph(found)
    for _ in range(3):
        v = torch.randn(structure.size, dtype=torch.float64)
        torch.testing.assert_close(operator.apply(v), graph(v), rtol=1e-11, atol=1e-12)
    rows = torch.randn(4, structure.size, dtype=torch.float64)
    torch.testing.assert_close(operator.apply_rows(rows), torch.stack([graph(v) for v in rows]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", MISSES)
def test_near_misses_are_not_taken(name):
    module, loss = MISSES[name]
    _, found = derivatives(module(), loss)
    assert find_glm(found.graphs.linearization.hvp) is None


@pytest.mark.parametrize("name", extras(MATCHES, lambda name: list(MATCHES).index(name) % 3))
def test_a_plan_uses_it(name):
    """Verified against plain autograd (strict), and the same hypergradient as by the eager backend."""
    module, loss, _ = MATCHES[name]
    results = []
    for backend in ("native", "eager"):
        torch.manual_seed(3)
        plan, found = derivatives(module(), loss, backend=backend)
        uses = found.lowerings()["hvp"].backend == "glm kernel"
        assert uses == (backend == "native")
        torch.manual_seed(4)
        results.append(plan.hypergradient("upper"))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_an_x_of_halves_is_handed_over_as_it_is_stored(half, monkeypatch):
    """The kernel widens it: to the bit what the loss does, which keeps twice the bytes for it."""
    loss = lambda p, x, y: weighted(p, F.cross_entropy(p(x.float()), y, reduction="none"))  # noqa: E731
    batch = torch.randn(N, D).to(half), torch.randint(C, (N,))
    found, results = [], []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(linearization, "_READS_HALVES", devices)
        torch.manual_seed(3)
        plan, derived = derivatives(nn.Linear(D, C), loss, batch, "native", torch.float32)
        found.append((derived.graphs.linearization.residual_bytes, find_glm(derived.graphs.linearization.hvp).dtype))
        assert derived.lowerings()["hvp"].backend == "glm kernel"
        torch.manual_seed(4)
        results.append(plan.hypergradient("upper"))
    assert found[0][0] == found[1][0] - 4 * N * D and found[0][1] == torch.float32
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key])
