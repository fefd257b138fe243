"""The digits program of the demo: `plan.hypergradient` against plain double backward, float64."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mlopt
from tests.helpers.double_backward import cg, flat, hypergradient, unflat

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("sklearn")
import digits
import reweighting


def program(estimator, steps):
    torch.set_default_dtype(torch.float64)
    try:
        graph = reweighting.make_program(digits.load(0, dtype=torch.float64), 0, estimator)
    finally:
        torch.set_default_dtype(torch.float32)
    plan = mlopt.compile(graph, strict=True, progress=False)
    plan.run(steps)
    return plan, graph


class Recorder:
    """Remembers the batches that a loader yields."""

    def __init__(self, data):
        self.data, self.seen = data, []

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        for batch in self.data:
            self.seen.append(batch)
            yield batch


def reference(graph, solve, lower_batch, upper_batch):
    net, weights = graph.problems["classifier"].module, graph.problems["reweight"].module

    def lower():
        x, y = lower_batch
        losses = F.cross_entropy(net(x), y, reduction="none")
        return (weights(losses.detach()[:, None]).squeeze(1) * losses).mean()

    def upper():
        x, y = upper_batch
        return F.cross_entropy(net(x), y)

    return hypergradient(lower, upper, list(net.parameters()), list(weights.parameters()), solve)


DAMPING = 1.0
CASES = {
    "cg": (
        mlopt.CG(max_steps=10, rtol=1e-10, damping=DAMPING),
        lambda hvp, v: cg(lambda x: hvp(x) + DAMPING * x, v, torch.zeros_like(v), 10, 1e-10),
    ),
    "neumann": (
        mlopt.Neumann(num_terms=5, scale=0.1),
        lambda hvp, v: 0.1 * sum(power(hvp, v, k) for k in range(5)),
    ),
    "finite difference, exact": (mlopt.FiniteDifference(scale=0.3), lambda hvp, v: 0.3 * v),
}


def power(hvp, v, k):
    for _ in range(k):
        v = v - 0.1 * hvp(v)
    return v


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [0, 7])
def test_equals_plain_double_backward(name, steps, monkeypatch):
    estimator, solve = CASES[name]
    monkeypatch.setattr(digits, "Batches", lambda *a: Recorder(_Batches(*a)))
    plan, graph = program(estimator, steps)
    lower_batch = graph.problems["classifier"].data.seen[max(steps - 1, 0)]
    upper_batch = graph.problems["reweight"].data.seen[plan._executor.states["reweight"].num_steps]
    got = plan.hypergradient("reweight")
    expected = reference(graph, solve, lower_batch, upper_batch)
    difference = (flat(got.values()) - expected).norm() / expected.norm()
    assert difference < 1e-8
    assert list(got) == [n for n, _ in graph.problems["reweight"].module.named_parameters()]


def test_central_difference_follows_its_definition(monkeypatch):
    monkeypatch.setattr(digits, "Batches", lambda *a: Recorder(_Batches(*a)))
    plan, graph = program(mlopt.FiniteDifference(step=0.01, exact=False), 3)
    net, weights = graph.problems["classifier"].module, graph.problems["reweight"].module
    (x, y), (mx, my) = graph.problems["classifier"].data.seen[2], graph.problems["reweight"].data.seen[0]
    theta, lam = list(net.parameters()), list(weights.parameters())
    v = flat(torch.autograd.grad(F.cross_entropy(net(mx), my), theta))
    eps = 0.01 / v.norm()
    start = flat([p.detach() for p in theta])
    sides = []
    for sign in (1, -1):
        values = dict(zip(dict(net.named_parameters()), unflat(start + sign * eps * v, theta), strict=True))
        losses = F.cross_entropy(torch.func.functional_call(net, values, (x,)), y, reduction="none")
        loss = (weights(losses.detach()[:, None]).squeeze(1) * losses).mean()
        sides.append(flat(torch.autograd.grad(loss, lam)))
    expected = -(sides[0] - sides[1]) / (2 * eps)
    got = flat(plan.hypergradient("reweight").values())
    assert (got - expected).norm() / expected.norm() < 1e-8


_Batches = digits.Batches
