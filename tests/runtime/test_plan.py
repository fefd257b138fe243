"""Stepping a plan: schedule, what is captured, what a step changes, randomness."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import mlopt
from tests.helpers.bilevel import Classifier, Reweight, compiled, data, make


def test_training_step_runs_a_constant_number_of_times():
    plan, lower, upper = compiled()
    after_compile = lower.num_calls, upper.num_calls
    assert 1 <= after_compile[0] <= 4
    plan.run(20)
    plan.hypergradient("reweight")
    assert (lower.num_calls, upper.num_calls) == after_compile


def test_five_batch_sizes_compile_once():
    plan, lower, _ = compiled(sizes=(12, 9, 7, 5, 3), batch_norm=True, dropout=0.1)
    calls = lower.num_calls
    plan.run(12)
    assert lower.num_calls == calls
    assert [len(c) for c in plan._report.graphs.values()] == [1, 1]


def num_free_sizes(plan):
    graph = plan._executor.derivatives("classifier", plan._executor.latest_batch("classifier")).graphs.gradient
    inputs = [n.meta["val"] for n in graph.traced.module.graph.nodes if n.op == "placeholder"]
    return sum(not isinstance(size, int) for value in inputs for size in value.shape)


@pytest.mark.parametrize("sizes", [(12,), pytest.param((12, 12), marks=pytest.mark.slow)], ids=["one", "two"])
def test_the_only_size_of_batches_is_fixed(sizes):
    """Another one, of a hypergradient say, is captured once more, for any size from then on."""
    plan, lower, _ = compiled(sizes=sizes, dtype=torch.float64)
    plan.run(6)
    calls = lower.num_calls
    plan.run(6)
    assert lower.num_calls == calls
    free, first, second = compiled(sizes=(12, 7), dtype=torch.float64)
    assert num_free_sizes(plan) == 0 < num_free_sizes(free)
    for mine, other in zip(plan.graph.problems.values(), (first, second), strict=True):
        other.module.load_state_dict(mine.module.state_dict())
    upper = plan.graph.problems["reweight"]
    for size in (7, 9, 5):
        batch = torch.randn(size, 6, dtype=torch.float64), torch.randint(0, 3, (size,))
        before = upper.num_calls
        got = plan.hypergradient("reweight", batch=batch)
        assert (upper.num_calls > before) == (size == 7)
        free._executor.states["classifier"].samples = plan._executor.states["classifier"].samples
        for key, value in free.hypergradient("reweight", batch=batch).items():
            torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-12)


def test_lower_steps_equal_ordinary_training():
    """A lowest problem steps exactly as the user's own loop would."""
    plan, lower, upper = compiled(dtype=torch.float64, sizes=(12, 7))
    net, weights = copy.deepcopy(lower.module), copy.deepcopy(upper.module)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    lower.unroll_steps = 1000  # no upper step
    for i in range(6):
        result = plan.step()
        x, y = lower.data[i % 2]
        losses = F.cross_entropy(net(x), y, reduction="none")
        loss = (weights(losses.detach()[:, None]).squeeze(1) * losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(result["classifier"]["loss"], loss.detach(), rtol=1e-12, atol=0)
    for a, b in zip(lower.module.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_upper_step_applies_the_hypergradient():
    plan, _, upper = compiled(dtype=torch.float64)
    twin = copy.deepcopy(upper.module)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.01)
    # One global step moves the lower problem first, so take the hypergradient in between.
    plan._executor.step("classifier")
    expected = plan.hypergradient("reweight")
    for name, parameter in twin.named_parameters():
        parameter.grad = expected[name]
    optimizer.step()
    plan._executor.step("reweight")
    for a, b in zip(upper.module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedule():
    plan, *_ = compiled(unroll_steps=3)
    stepped = ["reweight" in plan.step() for _ in range(9)]
    assert stepped == [False, False, True] * 3
    assert plan.num_steps == 9


def test_warm_up_holds_the_upper_back():
    plan, *_ = compiled(unroll_steps=2, warmup_steps=4)
    assert ["reweight" in plan.step() for _ in range(8)] == [False] * 5 + [True, False, True]


def test_scheduler_steps_with_its_problem():
    lower, upper = make()
    lower.scheduler = torch.optim.lr_scheduler.StepLR(lower.optimizer, step_size=2, gamma=0.1)
    mlopt.compile(mlopt.Graph([lower, upper]), progress=False).run(4)
    assert lower.optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_results_hold_losses_and_metrics():
    plan, *_ = compiled()
    result = plan.run(2)
    assert set(result) == {"classifier", "reweight"}
    assert result["classifier"]["loss"].shape == ()
    assert isinstance(result["reweight"]["acc"], float)  # the user said .item()


def test_hypergradient_changes_nothing_and_repeats():
    plan, lower, upper = compiled(dropout=0.5, batch_norm=True)
    plan.run(3)
    before = [t.clone() for p in (lower, upper) for t in p.module.state_dict().values()]
    generator = torch.get_rng_state()
    first, second = plan.hypergradient("reweight"), plan.hypergradient("reweight")
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(generator, torch.get_rng_state())
    after = [t for p in (lower, upper) for t in p.module.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_dropout_masks_agree_between_passes():
    """The central difference of a loss with dropout converges to the exact product only if both sides share masks."""

    class WithoutDetach(Classifier):  # a difference quotient sees through a detach, a derivative does not
        def training_step(self, batch):
            x, y = batch
            losses = F.cross_entropy(self.module(x), y, reduction="none")
            return (self.reweight(losses[:, None]).squeeze(1) * losses).mean()

    options = {"dropout": 0.3, "dtype": torch.float64, "classifier": WithoutDetach}
    exact, *_ = compiled(**options, hypergradient=mlopt.FiniteDifference(exact=True))
    exact.run(2)
    inexact, *_ = compiled(**options, hypergradient=mlopt.FiniteDifference(step=1e-3, exact=False))
    for name in ("classifier", "reweight"):  # the same state, batches and random numbers
        inexact.graph.problems[name].module.load_state_dict(exact.graph.problems[name].module.state_dict())
        mine, theirs = exact._executor.states[name], inexact._executor.states[name]
        theirs.samples = mine.samples
    batch = exact.graph.problems["reweight"].data[0]
    torch.manual_seed(1)  # the upper loss draws masks of its own
    expected = exact.hypergradient("reweight", batch=batch)
    torch.manual_seed(1)
    got = inexact.hypergradient("reweight", batch=batch)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-7)


def test_a_hypergradient_uses_the_masks_of_the_last_lower_step():
    plan, lower, upper = compiled(dropout=0.5, dtype=torch.float64, hypergradient=mlopt.FiniteDifference())
    plan._executor.step("classifier")
    state = plan._executor.states["classifier"]
    torch.manual_seed(3)
    got = plan.hypergradient("reweight")
    # The same by plain autograd: the upper loss first, then the lower one with the generator put back.
    torch.manual_seed(3)
    theta, lam = list(lower.module.parameters()), list(upper.module.parameters())
    v = torch.autograd.grad(upper.training_step(upper.data[0])["loss"], theta)
    torch.set_rng_state(state.samples[0].random_state.cpu)
    gradient = torch.autograd.grad(lower.training_step(lower.data[0]), theta, create_graph=True)
    expected = torch.autograd.grad(gradient, lam, v)
    for a, b in zip(got.values(), expected, strict=True):
        torch.testing.assert_close(a, -b, rtol=1e-10, atol=1e-12)


def test_batch_norm_moves_with_real_steps_only():
    plan, lower, _ = compiled(batch_norm=True, dtype=torch.float64, unroll_steps=1)
    norm = lower.module[1]
    mean = norm.running_mean.clone()
    assert norm.num_batches_tracked == 0  # compilation and verification left it alone
    plan._executor.step("classifier")
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.ne(mean).all()
    plan._executor.step("reweight")
    assert norm.num_batches_tracked == 2  # the upper loss runs the classifier in training mode, as the user wrote


def test_batch_norm_statistics_equal_pytorchs():
    plan, lower, _ = compiled(batch_norm=True, dtype=torch.float64, unroll_steps=1000)
    twin = copy.deepcopy(lower.module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    weights = plan.graph.problems["reweight"].module
    for i in range(3):
        plan.step()
        x, y = lower.data[i % 2]
        losses = F.cross_entropy(twin(x), y, reduction="none")
        optimizer.zero_grad()
        (weights(losses.detach()[:, None]).squeeze(1) * losses).mean().backward()
        optimizer.step()
    for (name, a), b in zip(lower.module.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=name)


def test_frozen_unheld_and_unused_parameters():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.unused = (torch.nn.Linear(6, 6), torch.nn.Linear(6, 3), torch.nn.Linear(2, 2))

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    net = Net()
    net.body.bias.requires_grad_(False)
    held = [*net.head.parameters(), net.body.bias, *net.unused.parameters()]  # body.weight is left out
    before = {k: v.clone() for k, v in net.state_dict().items()}
    lower, upper = make()
    lower = Classifier(
        "classifier", module=net, optimizer=torch.optim.SGD(held, lr=0.1, weight_decay=0.1), data=data((12,))
    )
    lower.hypergradient = mlopt.CG(max_steps=3, damping=1.0)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), strict=True, progress=False)
    plan.run(3)
    moved = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"head.weight", "head.bias"}
    assert net.unused.weight.grad is None  # as after an ordinary backward: weight decay must not move it


def test_param_groups_and_optimizer_state_are_kept():
    lower, upper = make()
    first, *rest = lower.module.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.5}, {"params": rest}], lr=0.01, momentum=0.9)
    lower.optimizer = optimizer
    plan = mlopt.compile(mlopt.Graph([lower, upper]), strict=True, progress=False)
    plan.run(2)
    assert plan.graph.problems["classifier"].optimizer is optimizer
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.01]
    assert len(optimizer.state) == len([first, *rest])


def test_unknown_problem():
    plan, *_ = compiled()
    with pytest.raises(KeyError, match="unknown problem 'nobody'"):
        plan.hypergradient("nobody")


def test_explain_names_everything():
    plan, *_ = compiled(unroll_steps=2)
    text = plan.explain()
    for part in (
        "2 problems, 2 edges",
        "level 2  reweight",
        "steps after 2 of classifier",
        "classifier -> reweight  lower_to_upper",
        "reweight -> classifier  upper_to_lower",
        "H q[classifier] = v[classifier] by CG(max_steps=5",
        "at most 5 Hessian products",
        "hypergradient -= (d2g/dreweight dclassifier)^T q[classifier]",
    ):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 170


def test_a_problem_may_be_compiled_again_in_another_graph():
    lower, upper = make()
    mlopt.compile(mlopt.Graph([lower, upper]), progress=False).run(1)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False)
    assert "reweight" in plan.run(1)


def test_breakdown_is_said_once():
    class Saddle(Classifier):
        def training_step(self, batch):
            return -super().training_step(batch)  # concave: p.Hp < 0

    lower, upper = make(classifier=Saddle, hypergradient=mlopt.CG(max_steps=5))
    plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False)
    with pytest.warns(mlopt.errors.SolverWarning, match="breakdown.*non-positive curvature") as seen:
        plan.run(3)
    assert len(seen) == 1


def test_diverging_neumann_series_is_said():
    lower, upper = make(hypergradient=mlopt.Neumann(num_terms=20, scale=5.0))
    plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False)
    with pytest.warns(mlopt.errors.SolverWarning, match="diverging.*lower scale"):
        plan.run(1)


def test_user_estimator():
    """A new estimator is one class; nothing is registered."""

    class Steepest(mlopt.AbstractEstimator):
        max_hvps = 1

        def solve(self, operator, cotangent, guess):
            product = operator.mv(cotangent)
            q = cotangent * (cotangent @ cotangent) / (cotangent @ product)
            return mlopt.linalg.Solution(q, *(torch.tensor(0) for _ in range(2)), torch.tensor(0.0))

    lower, upper = make(hypergradient=Steepest())
    plan = mlopt.compile(mlopt.Graph([lower, upper]), strict=True, progress=False)
    assert all(torch.isfinite(v).all() for v in plan.hypergradient("reweight").values())
    assert Reweight.num_calls == 0


def test_plans_are_not_pickled_or_copied(tmp_path):
    """A copy would step objects that nobody has; what to do instead is said."""
    plan, *_ = compiled()
    for copied in (pickle.dumps, copy.copy, copy.deepcopy, lambda p: torch.save(p, tmp_path / "plan.pt")):
        with pytest.raises(TypeError, match=r"cannot be pickled or copied.*plan.state_dict\(\).*plan.save\(folder\)"):
            copied(plan)
    torch.save(plan.state_dict(), tmp_path / "state.pt")
