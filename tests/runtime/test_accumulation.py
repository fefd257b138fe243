"""Gradient accumulation, clipping and normalization."""

import pytest
import torch
import torch.nn.functional as F

import mlopt
from tests.helpers.bilevel import compiled, data
from tests.helpers.double_backward import flat, hypergradient


def joined(batches):
    return [tuple(torch.cat([b[i] for b in batches[k : k + 2]]) for i in (0, 1)) for k in range(0, len(batches), 2)]


def copies(problem):
    return [p.detach().clone() for p in problem.module.parameters()]


ESTIMATORS = [
    mlopt.CG(max_steps=5, damping=1.0),
    mlopt.Dense(damping=1.0),
    mlopt.FiniteDifference(),
    mlopt.FiniteDifference(exact=False),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_two_micro_batches_are_one_batch(estimator):
    """Steps and hypergradients with two micro-batches equal those with their union (no BatchNorm, mean losses)."""
    torch.manual_seed(0)
    batches = data((6, 6, 6, 6), dtype=torch.float64)
    plans = []
    for loader, count in ((batches, 2), (joined(batches), 1)):
        torch.manual_seed(1)
        plan, lower, upper = compiled(
            dtype=torch.float64, hypergradient=estimator, data=loader, gradient_accumulation=count
        )
        upper.data = joined(batches)
        plan._executor.states["reweight"].stream.__init__(upper)
        plan.run(3)
        plans.append((plan, lower, upper))
    (a, lower_a, upper_a), (b, lower_b, upper_b) = plans
    for x, y in zip(copies(lower_a) + copies(upper_a), copies(lower_b) + copies(upper_b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    for x, y in zip(a.hypergradient("reweight").values(), b.hypergradient("reweight").values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6 if not getattr(estimator, "exact", True) else 1e-9, atol=1e-12)


def test_d9_all_micro_batches_enter_the_hypergradient():
    """Against plain double backward on the mean over four micro-batches, with dropout masks drawn one after another."""
    plan, lower, upper = compiled(
        dtype=torch.float64,
        dropout=0.3,
        sizes=(5, 6, 7, 8),
        gradient_accumulation=4,
        hypergradient=mlopt.Neumann(num_terms=3, scale=0.5),
    )
    plan.step()
    state = plan._executor.states["classifier"]
    assert [len(s.batch.tensors[0]) for s in state.samples] == [5, 6, 7, 8]
    masks = [s.random_state.cpu for s in state.samples]
    assert len({m.numpy().tobytes() for m in masks}) == 4
    got = plan.hypergradient("reweight", batch=upper.data[0])
    now = torch.get_rng_state()

    def lower_loss():
        total = 0
        for sample, mask in zip(state.samples, masks, strict=True):
            torch.set_rng_state(mask)
            total = total + lower.training_step(sample.batch.tensors) / 4
        return total

    def upper_loss():
        torch.set_rng_state(now)
        return upper.training_step(upper.data[0])["loss"]

    def solve(hvp, v):
        term = total = v
        for _ in range(2):
            term = term - 0.5 * hvp(term)
            total = total + term
        return 0.5 * total

    theta, lam = list(lower.module.parameters()), list(upper.module.parameters())
    expected = hypergradient(lower_loss, upper_loss, theta, lam, solve)
    torch.testing.assert_close(flat(got.values()), expected, rtol=1e-8, atol=1e-12)


def test_buffers_move_from_micro_batch_to_micro_batch():
    plan, lower, _ = compiled(batch_norm=True, sizes=(5, 6), gradient_accumulation=2)
    norm = lower.module[1]
    expected = torch.nn.BatchNorm1d(8)
    with torch.no_grad():
        for x, _ in lower.data:
            expected(lower.module[0](x))
    plan._executor.step("classifier")
    torch.testing.assert_close(norm.running_mean, expected.running_mean)
    torch.testing.assert_close(norm.running_var, expected.running_var)
    assert int(norm.num_batches_tracked) == 2


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"clip_norm": 0.01}, 0.01),
        ({"normalize_gradient": True}, 1.0),
        ({"normalize_gradient": True, "clip_norm": 5.0}, 5.0),
    ],
)
def test_gradients_are_scaled(options, factor):
    plan, lower, _ = compiled(**options)
    plan._executor.step("classifier")
    norm = flat([p.grad for p in lower.module.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(factor))


def test_short_gradients_are_not_clipped():
    plain, lower, _ = compiled()
    torch.manual_seed(3)
    x, y = lower.data[0]
    loss = lower.training_step((x, y))
    expected = torch.autograd.grad(loss, list(lower.module.parameters()))
    lower.clip_norm = 1e6
    plain._executor.step("classifier")
    torch.testing.assert_close(flat([p.grad for p in lower.module.parameters()]), flat(expected))


@pytest.mark.parametrize("option", [{"gradient_accumulation": 0}, {"clip_norm": -1.0}, {"clip_norm": True}])
def test_bad_settings(option):
    with pytest.raises(mlopt.errors.ProblemError, match=next(iter(option))):
        compiled(**option)


def test_metrics_are_averaged():
    class WithMetric(mlopt.Problem):
        def training_step(self, batch):
            x, y = batch
            return {"loss": F.cross_entropy(self.module(x), y), "mean": x.mean(), "number": x.mean().item()}

    loader = data((6, 6))
    module = torch.nn.Linear(6, 3)
    problem = WithMetric(
        "p",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data=loader,
        gradient_accumulation=2,
    )
    result = mlopt.compile(mlopt.Graph([problem]), progress=False).step()["p"]
    expected = (loader[0][0].mean() + loader[1][0].mean()) / 2
    torch.testing.assert_close(result["mean"], expected)
    assert isinstance(result["number"], float)
    assert abs(result["number"] - float(expected)) < 1e-6
