"""A wrong compiled derivative is noticed, named, and replaced."""

import pytest
import torch
import torch.nn.functional as F

import mlopt
from mlopt.runtime import derivatives, verify
from tests.helpers.bilevel import Classifier, compiled, make


class StraightThrough(torch.autograd.Function):
    """A step function with the derivative of the identity: torch.export keeps its forward and loses its backward."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 5


class WithCustomFunction(Classifier):
    def training_step(self, batch):
        x, y = batch
        losses = torch.nn.functional.cross_entropy(StraightThrough.apply(self.module(x)), y, reduction="none")
        return (self.reweight(losses.detach()[:, None]).squeeze(1) * losses).mean()


def custom_function_backward_is_lost():
    module = torch.nn.Linear(2, 2)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return StraightThrough.apply(self.inner(x)).sum()

    exported = torch.export.export(Wrapper(), (torch.ones(1, 2),), strict=False).module()
    (got,) = torch.autograd.grad(exported(torch.ones(1, 2)), [exported.inner.bias])
    return bool((got == 2).all())


@pytest.fixture
def blind(monkeypatch):
    """Let capture overlook custom backwards, so that there is something wrong to notice."""
    monkeypatch.setattr(mlopt.capture.backward.BackwardWatcher, "note", lambda self, what: None)


def test_lost_custom_backward_falls_back(blind):
    assert custom_function_backward_is_lost(), "torch.export keeps custom backwards now: find another wrong capture"
    lower, upper = make(classifier=WithCustomFunction, dtype=torch.float64)
    with pytest.warns(
        mlopt.errors.VerificationWarning, match="'classifier': .*gradient: relative difference .*plain autograd"
    ):
        plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False)
    assert "eager islands" in plan.explain() and "gradient: relative difference" in plan.explain()
    # The fallback gives the right hypergradient, and steps.
    plan.run(2)
    theta, lam = list(lower.module.parameters()), list(upper.module.parameters())
    got = plan.hypergradient("reweight", batch=upper.data[0])
    v = torch.autograd.grad(upper.training_step(upper.data[0])["loss"], theta)
    gradient = torch.autograd.grad(lower.training_step(lower.data[1]), theta, create_graph=True)
    v = torch.cat([t.reshape(-1) for t in v])

    def unflat(q):
        return [part.reshape(t.shape) for part, t in zip(q.split([t.numel() for t in theta]), theta, strict=True)]

    def hvp(q):
        rows = torch.autograd.grad(gradient, theta, unflat(q), retain_graph=True)
        return torch.cat([r.reshape(-1) for r in rows])

    hessian = torch.stack([hvp(e) for e in torch.eye(len(v), dtype=v.dtype)])
    q = mlopt.linalg.cg(
        mlopt.linalg.DampedOperator(mlopt.linalg.MatrixOperator(hessian), 1.0), v.detach(), max_steps=5
    ).value
    expected = torch.autograd.grad(gradient, lam, unflat(q))
    for a, b in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(a, -b, rtol=1e-7, atol=1e-10)


def test_strict_raises(blind):
    lower, upper = make(classifier=WithCustomFunction)
    with pytest.raises(mlopt.errors.VerificationError, match="'classifier': a compiled derivative disagrees"):
        mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)


class BentGraph:
    """A lowered graph whose outputs are changed."""

    is_kernel = False

    def __init__(self, call, bend):
        self.call, self.bend = call, bend

    def __call__(self, *args):
        return [self.bend(o) for o in self.call(*args)]


@pytest.mark.parametrize("estimator", [mlopt.CG(max_steps=2), mlopt.FiniteDifference(exact=False)])
def test_every_product_is_compared(estimator, monkeypatch):
    """Bend each product in turn: verification names it."""
    bent = []

    def bend(name, value):
        bent.append(name)
        return value * 1.1

    plan, lower, _ = compiled(hypergradient=estimator, batch_norm=True)
    needs = plan.program.needs["classifier"]
    batch = plan._executor.states["classifier"].stream.peek()
    graphs = plan._executor.derivatives("classifier", batch)
    problems, layouts = plan.graph.problems, plan._executor.layouts
    layout = layouts["classifier"]
    reference = mlopt.runtime.reference.AutogradDerivatives(lower, problems, layouts, needs)
    assert isinstance(graphs, derivatives.GraphDerivatives)
    assert verify.find_disagreement(graphs, reference, lower, problems, layout, needs, batch) is None
    for name, call in list(graphs._call.items()):
        if name == "primal":
            continue  # hands over residuals, which the tangent halves read
        monkeypatch.setitem(graphs._call, name, BentGraph(call, lambda o, name=name: bend(name, o)))
        message = verify.find_disagreement(graphs, reference, lower, problems, layout, needs, batch)
        assert message is not None and "relative difference" in message, name
        monkeypatch.setitem(graphs._call, name, call)
    assert bent


NUM_ITERATIONS = 16


class Chaotic(Classifier):
    """Rounding in float32 grows past any fixed tolerance on its way through the logistic map."""

    def training_step(self, batch):
        x, y = batch
        p = torch.softmax(self.module(x), dim=1)
        for _ in range(NUM_ITERATIONS):
            p = 3.9 * p * (1 - p)
        losses = F.cross_entropy(p, y, reduction="none")
        return (self.reweight(losses.detach()[:, None]).squeeze(1) * losses).mean()


def perturbed(call, size):
    """Bend a graph's floating-point outputs, each by a relative error of `size`."""

    def bend(value):
        noise = torch.randn_like(value)
        return value + size * value.norm() / noise.norm() * noise

    return BentGraph(call, bend)


def test_rounding_is_told_from_mistakes(monkeypatch):
    """Where one rounding error per parameter does more than the tolerance, so may the graph; not 100 times as much."""
    plan, lower, _ = compiled(classifier=Chaotic, dtype=torch.float32)
    assert not plan._report.islands
    problems, layouts, needs = plan.graph.problems, plan._executor.layouts, plan.program.needs["classifier"]
    layout = layouts["classifier"]
    reference = mlopt.runtime.reference.AutogradDerivatives(lower, problems, layouts, needs)
    batch = plan._executor.states["classifier"].stream.peek()
    graphs = plan._executor.derivatives("classifier", batch)
    parameters = list(lower.module.parameters())
    storages = [p.data_ptr() for p in parameters]
    values = [p.detach().clone() for p in parameters]
    noisy = verify._with_noise(0, reference, lower, problems, layout, needs, batch)["Hessian-vector product"]
    assert [p.data_ptr() for p in parameters] == storages
    assert all(torch.equal(p, v) for p, v in zip(parameters, values, strict=True))
    product = verify._evaluate(reference, lower, batch, layout, needs)["Hessian-vector product"]
    rounding = float((noisy - product).norm() / product.norm())
    assert rounding > 2e-4, "the loss is not chaotic enough for this test"
    for error, agrees in ((2 * rounding, True), (100 * rounding, False)):
        with monkeypatch.context() as patch:
            patch.setitem(graphs._call, "hvp", perturbed(graphs._call["hvp"], error))
            message = verify.find_disagreement(graphs, reference, lower, problems, layout, needs, batch)
        assert (message is None) == agrees, (error, message)


def test_small_losses_are_compared_too(monkeypatch):
    """A loss scaled by 1e-7 has products below any absolute floor; a mistake in them is still one."""

    class Small(Classifier):
        def training_step(self, batch):
            return 1e-7 * super().training_step(batch)

    plan, lower, _ = compiled(classifier=Small, dtype=torch.float32)
    problems, layouts, needs = plan.graph.problems, plan._executor.layouts, plan.program.needs["classifier"]
    layout = layouts["classifier"]
    reference = mlopt.runtime.reference.AutogradDerivatives(lower, problems, layouts, needs)
    batch = plan._executor.states["classifier"].stream.peek()
    graphs = plan._executor.derivatives("classifier", batch)
    assert verify.find_disagreement(graphs, reference, lower, problems, layout, needs, batch) is None
    monkeypatch.setitem(graphs._call, "gradient", perturbed(graphs._call["gradient"], 0.01))
    assert "relative difference" in verify.find_disagreement(graphs, reference, lower, problems, layout, needs, batch)
