"""``plan.check()`` tells good estimates from bad ones, and changes nothing."""

import math

import pytest
import torch

import mlopt
from tests.helpers.bilevel import compiled, make
from tests.helpers.quadratics import program


def quadratic(estimator, spec=None, **options):
    problems = program(spec or {"lower": ["upper"], "upper": ["lower"]}, **options)
    for p in problems[:-1]:
        p.hypergradient = estimator
    return mlopt.compile(mlopt.Graph(problems), progress=False, strict=True), {p.name: p for p in problems}


def test_an_exact_estimate():
    plan, ps = quadratic(mlopt.CG(max_steps=30, rtol=1e-12))
    report = plan.check()
    (edge,), (total,) = report.edges, report.hypergradients
    assert edge.error < 1e-9
    assert edge.residual < 1e-10
    assert abs(edge.cosine - 1) < 1e-12
    assert total.error < 1e-9
    values = torch.linalg.eigvalsh(ps["lower"].A)
    assert abs(edge.smallest - values[0]) < 1e-9
    assert abs(edge.largest - values[-1]) < 1e-9
    gradient = torch.autograd.grad(ps["lower"].training_step(None), ps["lower"].module.w)[0]
    assert abs(edge.gradient_norm - gradient.norm()) < 1e-9


@pytest.mark.parametrize(
    "estimator", [mlopt.Neumann(num_terms=3, scale=0.3), mlopt.CG(max_steps=2), mlopt.FiniteDifference(exact=False)]
)
def test_errors_of_a_truncated_estimate(estimator):
    plan, ps = quadratic(estimator)
    report = plan.check()
    (edge,), (total,) = report.edges, report.hypergradients
    exact, _ = quadratic(mlopt.Dense())
    got, expected = plan.hypergradient("upper")["w"], exact.hypergradient("upper")["w"]
    assert abs(total.error - (got - expected).norm() / expected.norm()) < 1e-6
    direct = torch.autograd.grad(ps["upper"].training_step(None), ps["upper"].module.w)[0]
    assert abs(edge.error - (got - expected).norm() / (expected - direct).norm()) < 1e-6
    a, b = got - direct, expected - direct
    assert abs(edge.cosine - a @ b / (a.norm() * b.norm())) < 1e-6
    assert total.norm == pytest.approx(float(got.norm()))


def test_unconverged_lower_problem():
    """On a quadratic one Newton step is the optimum: the drift is the exact change of the hypergradient."""
    plan, ps = quadratic(mlopt.Dense())
    before = plan.hypergradient("upper")["w"]
    (total,) = (report := plan.check()).hypergradients
    lower = ps["lower"]
    g = torch.autograd.grad(lower.training_step(None), lower.module.w)[0]
    with torch.no_grad():
        lower.module.w -= torch.linalg.solve(lower.A, g)
    after = plan.hypergradient("upper")["w"]
    assert total.drift == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-6)
    assert total.drift > 0.1
    assert any("lower problem has not converged" in w and "off by" in w for w in report.warnings)
    converged = plan.check()
    assert converged.hypergradients[0].drift < 1e-9
    assert not converged.warnings


def test_every_edge_of_a_nested_program():
    spec = {"b": ["w", "u"], "w": ["b", "u"], "u": ["w", "b"]}
    plan, _ = quadratic(mlopt.CG(max_steps=30, rtol=1e-12), spec)
    report = plan.check()
    assert [(e.lower, e.upper) for e in report.edges] == [("b", "w"), ("b", "u"), ("w", "u"), ("b", "u")]
    assert all(e.error < 1e-8 for e in report.edges)
    assert all(h.error < 1e-8 for h in report.hypergradients)


def test_indefinite_curvature_is_named():
    plan, ps = quadratic(mlopt.CG(damping=3.0))
    with torch.no_grad():
        ps["lower"].A -= torch.eye(4, dtype=torch.float64)
    plan = mlopt.compile(mlopt.Graph(list(ps.values())), progress=False)
    report = plan.check()
    assert report.edges[0].smallest < 0
    assert math.isnan(report.hypergradients[0].drift)
    assert any("H is not positive definite (an eigenvalue of -" in w for w in report.warnings)


def test_zero_hypergradients_are_named():
    class Dead(mlopt.Problem):
        def training_step(self, batch):
            x, y = batch
            losses = torch.nn.functional.cross_entropy(self.module(x), y, reduction="none")
            return (torch.relu(self.reweight(losses.detach()[:, None]).squeeze(1) - 100) * losses).mean() + sum(
                p.square().sum() for p in self.module.parameters()
            )

    lower, upper = make(classifier=Dead, dtype=torch.float64)
    report = mlopt.compile(mlopt.Graph([lower, upper]), progress=False).check()
    assert report.hypergradients[0].indirect == 0
    assert any("reweight: the part of its hypergradient" in w and "numerically zero" in w for w in report.warnings)


def test_it_changes_nothing_and_prints():
    plan, lower, upper = compiled(dropout=0.2, batch_norm=True)
    plan.run(3)
    tensors = [t for p in (lower, upper) for t in p.module.state_dict().values()]
    before, random = [t.clone() for t in tensors], torch.get_rng_state()
    pointers = [p.data_ptr() for p in lower.module.parameters()]
    calls = dict(plan._executor.guesses)
    text = str(plan.check())
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert [p.data_ptr() for p in lower.module.parameters()] == pointers
    assert plan._executor.guesses.keys() == calls.keys()
    assert "classifier -> reweight  CG(max_steps=5, rtol=1e-06, damping=1.0" in text
    assert "relative error" in text
    assert "eigenvalues of H" in text


@pytest.mark.slow
def test_large_problems_are_checked_by_conjugate_gradients(monkeypatch):
    monkeypatch.setattr("mlopt.runtime.check.DENSE_SIZE", 2)
    plan, _ = quadratic(mlopt.Neumann(num_terms=400, scale=0.4))
    (edge,) = plan.check().edges
    assert edge.reference == "H"
    assert edge.error < 1e-6
    for damping, reference in ((3.0, "H + 3 I"), (0.1, "none")):
        plan, ps = quadratic(mlopt.CG(max_steps=20, damping=damping))
        with torch.no_grad():
            ps["lower"].A -= torch.eye(4, dtype=torch.float64)
        (edge,) = (report := mlopt.compile(mlopt.Graph(list(ps.values())), progress=False).check()).edges
        assert edge.reference == reference
        assert (edge.error < 1e-6) if reference != "none" else math.isnan(edge.error + report.hypergradients[0].error)


@pytest.mark.slow
def test_unrolled_and_adaptive_estimates():
    """Many steps of gradient descent on a quadratic come near the implicit gradient; few do not."""
    errors = []
    for steps in (2, 200):
        plan, _ = quadratic(mlopt.Unroll(steps), warmup_steps=1000)
        plan.run(steps)
        (edge,) = (report := plan.check()).edges
        assert edge.num_steps == steps
        assert math.isnan(edge.residual)
        assert "Unroll(steps=" in str(report)
        errors.append(edge.error)
    assert errors[0] > 0.1
    assert errors[1] < 1e-3
    plan, _ = quadratic(mlopt.SAMA())
    assert 0 < plan.check().edges[0].error < 10


def test_learned_settings_have_no_implicit_reference():
    from tests.hypergradient.test_unroll import tuned

    graph, *_ = tuned(lambda p: torch.optim.SGD(p, lr=1.0))
    plan = mlopt.compile(graph, progress=False)
    plan.run(3)
    report = plan.check()
    assert math.isnan(report.hypergradients[0].error)
    assert report.hypergradients[0].indirect > 0
