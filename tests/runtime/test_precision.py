"""Problems in half precision, against hand-written autocast and double backward, and against float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.errors import ProblemError
from tests.helpers import bilevel
from tests.helpers.double_backward import cg, flat, grad, unflat
from tests.helpers.extras import extras

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 4


class Fixed(bilevel.Classifier):
    """The classifier with a factor on its loss, which tells the dtype it is computed in."""

    factor = 1.0
    dtypes: list

    def training_step(self, batch):
        x, y = batch
        logits = self.module(x)
        self.dtypes.append(logits.dtype)
        losses = F.cross_entropy(logits, y, reduction="none")
        weights = self.reweight(losses.detach()[:, None]).squeeze(1)
        return self.factor * (weights * losses).mean()


class Printing(Fixed):
    """The same, as an eager island."""

    def training_step(self, batch):
        print("", end="")
        return super().training_step(batch)


def program(precision, *, factor=1.0, kind=Fixed, curvature="hessian", **options):
    torch.manual_seed(0)
    cls = type("Classifier", (kind,), {"factor": factor, "dtypes": []})
    estimator = mlopt.CG(max_steps=STEPS, rtol=0.0, damping=factor, curvature=curvature)
    lower, upper = bilevel.make(classifier=cls, precision=precision, hypergradient=estimator, **options)
    return lower, upper


def compiled(precision, **options):
    lower, upper = program(precision, **options)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", progress=False, strict="kind" not in options)
    return plan, lower, upper


def by_hand(lower, upper, precision, scale=1.0):
    """Return the hypergradient by autocast and double backward of the scaled loss, at the first batches."""
    net, weights = lower.module, upper.module
    theta, lam = list(net.parameters()), list(weights.parameters())
    x, y = lower.data[0]

    def lower_loss():
        losses = F.cross_entropy(net(x), y, reduction="none")
        return lower.factor * (weights(losses.detach()[:, None]).squeeze(1) * losses).mean()

    x_upper, y_upper = upper.data[0]
    v = flat(grad(F.cross_entropy(net(x_upper), y_upper), theta))
    with torch.autocast("cpu", dtype=HALF.get(precision), enabled=precision is not None, cache_enabled=False):
        loss = lower_loss()
    assert loss.dtype == theta[0].dtype
    gradient = torch.autograd.grad(scale * loss, theta, create_graph=True)

    def product(vector, inputs):
        norm = vector.norm() if scale != 1 and vector.any() else 1.0
        return flat(grad(gradient, inputs, unflat(vector / norm, theta), retain_graph=True)) * norm / scale

    q = cg(lambda u: product(u, theta) + lower.factor * u, v, torch.zeros_like(v), STEPS, 0.0)
    return -product(q, lam)


def hypergradient(plan):
    return flat(plan.hypergradient("reweight").values())


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("batch_norm", extras([False, True], lambda bn: not bn), ids=["plain", "batch norm"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_hypergradient_is_that_of_autocast(precision, batch_norm):
    plan, lower, upper = compiled(precision, batch_norm=batch_norm)
    assert set(lower.dtypes) == {HALF[precision]}
    scale = 1.0 if lower.loss_scale is None else float(lower.loss_scale.value)
    got = hypergradient(plan)
    full = by_hand(*program(None, batch_norm=batch_norm), None)
    # The same half-precision operations in the same order; what is left is float32 arithmetic in the solver, and with
    # BatchNorm its statistics, which a graph computes in float32 from elementary operations.
    assert error(got, by_hand(lower, upper, precision, scale)) < (2e-2 if batch_norm else 1e-4)
    assert 1e-5 < error(got, full) < 5e-2  # it is not float32, and not far from it


@pytest.mark.parametrize("kind", ["graph", "island"])
@pytest.mark.parametrize("precision", extras(["bf16", "fp16"], lambda name: name == "bf16"))
def test_parameters_stay_as_they_are(precision, kind):
    options = {"kind": Printing} if kind == "island" else {}
    plan, lower, _ = compiled(precision, **options)
    assert ("classifier" in plan._report.islands) == (kind == "island")
    plan.run(3)
    assert {p.dtype for p in lower.module.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in lower.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", extras(["bf16", "fp16"], lambda name: name == "bf16"))
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_islands_agree_with_graphs(precision, curvature):
    graph, *_ = compiled(precision, curvature=curvature)
    island, *_ = compiled(precision, curvature=curvature, kind=Printing)
    tolerance = 1e-4 if curvature == "hessian" else 3e-2  # two formulas of Gauss-Newton round differently
    assert error(hypergradient(graph), hypergradient(island)) < tolerance
    for _ in range(5):
        a, b = graph.step(), island.step()
    torch.testing.assert_close(a["classifier"]["loss"], b["classifier"]["loss"], rtol=1e-3, atol=1e-5)


def test_training_equals_a_hand_written_autocast_loop():
    lower, _ = program("bf16")
    net = copy.deepcopy(lower.module)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    class Alone(mlopt.Problem):
        def training_step(self, batch):
            return F.cross_entropy(self.module(batch[0]), batch[1])

    problem = Alone("alone", module=lower.module, optimizer=lower.optimizer, data=lower.data, precision="bf16")
    plan = mlopt.compile(mlopt.Graph([problem]), backend="eager", strict=True, progress=False)
    for k in range(10):
        x, y = lower.data[k % len(lower.data)]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        got = plan.step()["alone"]["loss"]
        torch.testing.assert_close(got, loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(flat(lower.module.parameters()), flat(net.parameters()), rtol=1e-5, atol=1e-6)


# The smallest fp16 number is 6e-8: without a scale, gradients of a loss with this factor are zero.
TINY = 1e-7


@pytest.mark.parametrize("kind", [Fixed, Printing], ids=["graph", "island"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_fp16_keeps_tiny_derivatives(curvature, kind):
    plan, lower, _ = compiled("fp16", factor=TINY, curvature=curvature, kind=kind)
    exact, *_ = compiled(None, factor=TINY, curvature=curvature, dtype=torch.float64, kind=kind)
    with torch.no_grad():  # the same start, and the same batches
        ends = exact.graph.problems["classifier"], exact.graph.problems["reweight"]
        starts = plan.graph.problems["classifier"], plan.graph.problems["reweight"]
        for a, b in zip(ends, starts, strict=True):
            for p, q in zip(a.module.parameters(), b.module.parameters(), strict=True):
                p.copy_(q)
            for (x, y), (u, v) in zip(a.data, b.data, strict=True):
                x.copy_(u)
                y.copy_(v)
    unscaled = by_hand(lower, starts[1], "fp16") if curvature == "hessian" else None
    assert unscaled is None or not error(unscaled, hypergradient(exact)) < 0.5  # the test can fail
    assert error(hypergradient(plan), hypergradient(exact)) < 2e-2
    plan.step()
    exact.step()
    got, expected = (flat([p.grad for p in end[0].module.parameters()]) for end in (starts, ends))
    assert error(got, expected) < 1e-2


@pytest.mark.parametrize("kind", [Fixed, Printing], ids=["graph", "island"])
@pytest.mark.parametrize("length", extras([0.0, 1e-12, 1e-6, 1e6, 1e12], lambda length: abs(length - 1) < 2e6))
def test_fp16_products_do_not_depend_on_the_length_of_the_vector(length, kind):
    plan, *_ = compiled("fp16", kind=kind)
    executor = plan._executor
    linearization = executor.linearize("classifier")
    vector = torch.randn(executor.layouts["classifier"].size)
    one, product = linearization.hvp(vector), linearization.hvp(length * vector)
    assert torch.isfinite(product).all()
    if length == 0:
        assert not product.any()
    else:
        assert error(product / length, one) < 2e-3
        mixed, one = (linearization.mixed(v)["reweight"] for v in (length * vector, vector))
        assert error(mixed / length, one) < 2e-3


@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [
        (mlopt.Unroll(2), 1e-2),
        (mlopt.SAMA(exact=True), 1e-2),
        (mlopt.Nystrom(4, 1.0), 1e-2),
        (mlopt.Neumann(4, 0.1), 1e-2),
        (mlopt.FiniteDifference(exact=False), 0.2),  # a difference of two gradients of 4 digits each
    ],
    ids=lambda x: type(x).__name__,
)
def test_other_estimators(estimator, tolerance):
    found = []
    for precision in (None, "fp16", "bf16"):
        torch.manual_seed(0)
        lower, upper = bilevel.make(precision=precision, hypergradient=estimator, unroll_steps=2)
        plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", strict=True, progress=False)
        plan.run(2)
        found.append(hypergradient(plan))
    exact, half, brain = found
    assert 0 < error(half, exact) < tolerance
    assert 0 < error(brain, exact) < 8 * tolerance  # 3 bits less


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_tasks(precision):
    class Task(mlopt.Problem):
        def training_step(self, batch):
            return F.mse_loss(self.module(batch), self.upper.module.weight.sum(0).expand(len(batch), 2))

    class Upper(mlopt.Problem):
        def training_step(self, batch):
            return self.task(batch).square().mean()

    found = []
    for chosen in (precision, None):
        torch.manual_seed(0)
        inner, outer = nn.Linear(3, 2), nn.Linear(2, 2)
        task = Task(
            "task",
            module=inner,
            optimizer=torch.optim.SGD(inner.parameters(), lr=0.1),
            data=[torch.randn(4, 5, 3)],
            tasks=4,
            hypergradient=mlopt.CG(max_steps=3, damping=0.1),
            precision=chosen,
        )
        upper = Upper(
            "upper", module=outer, optimizer=torch.optim.SGD(outer.parameters(), lr=0.1), data=[torch.randn(4, 5, 3)]
        )
        plan = mlopt.compile(mlopt.Graph([task, upper]), backend="eager", strict=True, progress=False)
        plan.run(2)
        found.append(flat(plan.hypergradient("upper").values()))
    assert 0 < error(*found) < 5e-2


def test_bad_precision():
    with pytest.raises(
        ProblemError, match="problem 'classifier', argument `precision`: expected one of 'bf16', 'fp16'"
    ):
        bilevel.make(precision="int8")
    with pytest.raises(ProblemError, match=r"parameters in full precision, but '0.weight' is torch.float16"):
        bilevel.make(precision="fp16", dtype=torch.float16)
