"""The native backend: kernels in place of graphs, and of parts of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt import backends, linalg, ops
from mlopt.backends.native.skinny import lower_skinny_products
from mlopt.errors import BackendWarning, VerificationWarning
from mlopt.passes import GlmStructure

pytestmark = pytest.mark.skipif(not ops.available(), reason="the native extension is not built")

N, D, C = 700, 64, 5


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLOPT_CACHE_DIR", str(tmp_path))


class Lower(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        return (self.upper.module.c[: len(y)].sigmoid() * losses).mean() + 0.01 * self.module.weight.square().sum()


class Upper(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.lower(x), y)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(N))


def make(backend, sizes=(N,), estimator=None, **options):
    torch.manual_seed(0)
    net, weights = nn.Linear(D, C).double(), Weights().double()
    data = [(torch.randn(n, D, dtype=torch.float64), torch.randint(C, (n,))) for n in sizes]
    lower = Lower(
        "lower",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        data=data,
        hypergradient=estimator or mlopt.CG(max_steps=10, damping=0.1, rtol=1e-12),
        **options,
    )
    upper = Upper("upper", module=weights, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1), data=data)
    return mlopt.compile(mlopt.Graph([lower, upper]), backend=backend, progress=False)


def lowerings(plan):
    executor = plan._executor
    found = executor.derive("lower", executor.states["lower"].stream.peek())
    return found.lowerings()


@pytest.mark.parametrize(
    "estimator",
    [
        mlopt.CG(max_steps=10, damping=0.1, rtol=1e-12, warm_start=True),
        mlopt.Neumann(num_terms=8, scale=0.2),
        mlopt.Nystrom(rank=6, damping=0.5),
        mlopt.CG(max_steps=8, damping=0.1, rtol=1e-12, curvature="ggn"),
    ],
    ids=lambda e: type(e).__name__ + getattr(e, "curvature", ""),
)
def test_trains_as_the_eager_backend_does(estimator):
    results = []
    for backend in ("native", "eager"):
        plan = make(backend, estimator=estimator)
        assert (lowerings(plan)["hvp"].backend == "glm kernel") == (backend == "native")
        torch.manual_seed(1)
        plan.run(4)
        results.append([p.detach().clone() for problem in plan.graph.problems.values() for p in problem.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gradient_accumulation_averages_the_kernels():
    plans = [make(b, sizes=(N, N - 100), gradient_accumulation=2) for b in ("native", "eager")]
    for plan in plans:
        plan.run(2)
    values = [plan.hypergradient("upper") for plan in plans]
    for name, value in values[0].items():
        torch.testing.assert_close(value, values[1][name], rtol=1e-9, atol=1e-12)


def test_explain_says_what_was_matched():
    text = make("native").explain()
    assert "glm kernel" in text and "X [n, 64], 5 columns; f diagonal plus rank one per row; biases" in text
    assert "glm kernel" not in make("eager").explain()


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.delenv("MLOPT_BACKEND", raising=False)
    assert isinstance(backends.get_backend("auto"), backends.NativeBackend)
    monkeypatch.setenv("MLOPT_KERNELS", "0")
    assert not isinstance(backends.get_backend("auto"), backends.NativeBackend)


def test_the_choice_is_remembered(monkeypatch):
    first = lowerings(make("native"))
    monkeypatch.setattr("mlopt.backends.native.choice.least_time", lambda *args: pytest.fail("measured again"))
    assert lowerings(make("native")) == first


def test_the_graph_is_kept_where_it_is_faster(monkeypatch):
    times = iter([2.0, 1.0] * 20)
    monkeypatch.setattr("mlopt.backends.native.choice.least_time", lambda *args: next(times))
    plan = make("native")
    assert {low.backend for low in lowerings(plan).values()} == {"eager"}
    for name, value in plan.hypergradient("upper").items():
        torch.testing.assert_close(value, make("eager").hypergradient("upper")[name], rtol=1e-10, atol=1e-12)


def test_verification_covers_the_kernel(monkeypatch):
    curvature = GlmStructure.curvature
    monkeypatch.setattr(GlmStructure, "curvature", lambda self, residuals: 1.001 * curvature(self, residuals))
    with pytest.warns(VerificationWarning, match=r"Hessian-vector product.*they run eagerly"):
        plan = make("native")
    assert "glm kernel" not in plan.explain()
    for name, value in plan.hypergradient("upper").items():
        torch.testing.assert_close(value, make("eager").hypergradient("upper")[name], rtol=1e-10, atol=1e-12)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr("mlopt.backends.ops.available", lambda: False)
    with pytest.warns(BackendWarning, match="'native' cannot be used: the native extension"):
        assert backends.get_backend("native").name == "eager"


class TaskLower(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        penalty = (self.upper.module.c[:D, None].exp() * self.module.weight.T.square()).sum()
        return F.cross_entropy(self.module(x), y) + penalty


def test_tasks_run_side_by_side():
    results = []
    for backend in ("native", "eager"):
        torch.manual_seed(0)
        net, weights = nn.Linear(D, C).double(), Weights().double()
        data = [(torch.randn(4, 9, D, dtype=torch.float64), torch.randint(C, (4, 9)))]
        lower = TaskLower(
            "lower",
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            data=data,
            tasks=4,
            hypergradient=mlopt.CG(max_steps=15, damping=0.1, rtol=1e-6),
        )
        upper = Upper("upper", module=weights, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1), data=data)
        plan = mlopt.compile(mlopt.Graph([lower, upper]), backend=backend, strict=True, progress=False)
        if backend == "native":
            assert "X [T, n, 64]" in lowerings(plan)["hvp"].note
        plan.run(3)
        results.append(plan.hypergradient("upper"))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-8, atol=1e-10)


def operator(x, positions, *, size, bias=False, diagonal=None):
    import mlopt._C

    curvature = x.new_ones(*x.shape[:-1], len(positions))
    return mlopt._C.GlmOperator(x, "diagonal", curvature, torch.tensor(positions), size, bias, diagonal)


def test_operator_takes_any_layout_and_solves_in_cpp():
    """Parameters anywhere in the vector, columns without a bias, elements that X does not reach; all loops native."""
    x = torch.randn(20, 3, dtype=torch.float64)
    diagonal = torch.rand(10, dtype=torch.float64) + 0.5
    native = operator(x, [[8, 2, 1, -1], [0, 3, 7, 9]], size=10, bias=True, diagonal=diagonal)
    z = torch.cat([x, x.new_ones(20, 1)], 1)
    matrix = diagonal.diag()
    for columns in ([8, 2, 1], [0, 3, 7, 9]):
        part = z[:, : len(columns)]
        matrix[torch.tensor(columns)[:, None], torch.tensor(columns)] += part.T @ part
    b = torch.randn(4, 10, dtype=torch.float64)
    torch.testing.assert_close(native.apply(b[0]), matrix @ b[0])
    torch.testing.assert_close(native.apply_rows(b), b @ matrix)
    torch.testing.assert_close(native.apply_rows(b.T.contiguous().T), b @ matrix)
    linear = linalg.FunctionOperator(lambda v: pytest.fail("Python"), 10, dtype=b.dtype, native=native)
    damped = torch.linalg.inv(matrix + 0.1 * torch.eye(10, dtype=b.dtype))
    for rhs in (b[0], b):
        got = linalg.cg(linalg.DampedOperator(linear, 0.1), rhs, max_steps=100, rtol=1e-13).value
        torch.testing.assert_close(got, rhs @ damped, rtol=1e-9, atol=1e-11)


def test_operator_refuses_what_does_not_fit():
    x = torch.randn(5, 2, dtype=torch.float64)
    for positions in ([[0, 0]], [[0, 4]], [[0, -1]]):
        with pytest.raises(RuntimeError, match=r"expected each position in 0\.\.3 at most once"):
            operator(x, positions, size=4)
    with pytest.raises(RuntimeError, match=r"expected x \[n, 3\]"):
        operator(x, [[0, 1, 2]], size=4)
    with pytest.raises(RuntimeError, match="expected diagonal of shape"):
        operator(x, [[0, 1]], size=4, diagonal=torch.ones(3, dtype=torch.float64))
    good = operator(x, [[0, 1]], size=4)
    with pytest.raises(RuntimeError, match="expected vector of shape"):
        good.apply(torch.ones(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expected vector of shape"):
        good.apply(torch.ones(4))
    tasks = operator(x.expand(3, 5, 2), [[0, 1]], size=4)
    with pytest.raises(RuntimeError, match="got one vector"):
        tasks.apply(torch.ones(4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expected rows of shape"):
        tasks.apply_rows(torch.ones(2, 4, dtype=torch.float64))


def traced(function, *inputs):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, tracing_mode="fake")(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_products(dtype):
    x, w, b = torch.randn(N, D, dtype=dtype), torch.randn(D, C, dtype=dtype), torch.randn(C, dtype=dtype)
    r = torch.randn(N, C, dtype=dtype)

    def products(x, w, b, r):
        aten = torch.ops.aten
        return (
            aten.mm(x, w),
            aten.addmm(b, x, w),
            aten.addmm(b, x, aten.t(aten.clone(aten.t(w)))),
            aten.mm(aten.t(x), r),
            aten.mm(aten.t(r), x),
        )

    module = traced(products, x, w, b, r)
    lowered, count = lower_skinny_products(module)
    assert count == 5 and not any(n.target is torch.ops.aten.mm.default for n in lowered.graph.nodes)
    exact = module(*(t.double() for t in (x, w, b, r)))
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-11}[dtype]
    for got, same, expected in zip(lowered(x, w, b, r), module(x, w, b, r), exact, strict=True):
        assert got.stride() == same.stride() and got.dtype == same.dtype
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    again, none = lower_skinny_products(lowered)
    assert none == 0 and again is lowered


def test_other_products_are_left_alone():
    x = torch.randn(N, D)
    cases = [
        (x, torch.randn(D, 33)),  # too many columns
        (torch.randn(D, N).T, torch.randn(D, C)),  # rows not in memory order
        (torch.randn(8, D), torch.randn(D, C)),  # too small to matter
        (x.int(), torch.ones(D, C).int()),
    ]
    for a, b in cases:
        assert lower_skinny_products(traced(lambda p, q: p @ q, a, b))[1] == 0
    scaled = traced(lambda p, q, b: torch.addmm(b, p, q, beta=2), x, torch.randn(D, C), torch.randn(C))
    assert lower_skinny_products(scaled)[1] == 0
