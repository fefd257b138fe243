"""Steps that are not finite: what is said of them, what they leave behind, and the loss scale of fp16."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.errors import NonFiniteError, NonFiniteWarning
from mlopt.precision import LossScale
from mlopt.runtime.finite import all_finite, first_non_finite
from tests.helpers import bilevel
from tests.helpers.double_backward import flat
from tests.helpers.steps import GraphBackend, compiled


class Classifier(bilevel.Classifier):
    """The classifier with a factor on its loss that is a buffer, so that a test can set it between steps."""

    def training_step(self, batch):
        return super().training_step(batch) * self.module.factor


def make(**options):
    torch.manual_seed(0)
    lower, upper = bilevel.make(classifier=Classifier, batch_norm=True, **options)
    lower.module.register_buffer("factor", torch.ones(()))
    lower.scheduler = torch.optim.lr_scheduler.ExponentialLR(lower.optimizer, 0.9)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", strict=True, progress=False)
    return plan, lower, upper


def everything(*problems):
    """Copy all that a step changes."""
    found = [t.detach().clone() for p in problems for t in p.module.state_dict().values()]
    for p in problems:
        for state in p.optimizer.state.values():
            found += [t.detach().clone() if isinstance(t, torch.Tensor) else torch.tensor(t) for t in state.values()]
        found.append(torch.tensor([g["lr"] for g in p.optimizer.param_groups]))
    return found


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def poison(lower):
    """Give the third lower step a batch with a NaN."""
    x, y = lower.data[0]
    bad = x.clone()
    bad[2, 3] = torch.nan
    lower.data[:] = [(x, y), (x, y), (bad, y), (x, y), (x, y), (x, y)]


def test_all_finite():
    assert all_finite([]) and all_finite([None, torch.arange(3)])
    assert all_finite([torch.full((3,), 3e38), torch.zeros(0)])  # their sum is infinite
    assert not all_finite([torch.ones(2), torch.tensor([1.0, torch.inf, -torch.inf])])
    assert not all_finite([torch.tensor(torch.nan, dtype=torch.bfloat16)])
    named = [("a", torch.ones(2)), ("b", torch.tensor([torch.nan, torch.inf, torch.inf, 1.0]))]
    assert first_non_finite(iter(named)) == "b is not finite (1 NaN and 2 infinite of 4)"
    assert first_non_finite(iter(named[:1])) is None


def test_raise_names_problem_step_and_tensor_and_changes_nothing():
    lower, _ = make()[1:]
    poison(lower)
    plan = mlopt.compile(mlopt.Graph([lower, _]), backend="eager", strict=True, progress=False)
    plan.set_guard(mlopt.NonFiniteGuard("raise"))
    plan.run(2)
    before = everything(lower, _)
    message = r"problem 'classifier', step 3: tensor 0 of its batch is not finite \(1 NaN of 72\); nothing was changed"
    with pytest.raises(NonFiniteError, match=message):
        plan.step()
    assert same(before, everything(lower, _))


@pytest.mark.slow
def test_without_a_guard_the_step_is_made():
    lower, upper = make()[1:]
    poison(lower)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", strict=True, progress=False)
    plan.run(3)
    assert lower.module[0].weight.isnan().any()


def test_skip_equals_a_run_without_the_batch():
    """Training on [a, b, NaN, c] with "skip" is training on [a, b, c]; the upper problem does not step meanwhile."""
    found = []
    for poisoned in (True, False):
        lower, upper = make(unroll_steps=100)[1:]
        batches = bilevel.data((12, 12, 12))
        bad = (batches[0][0] * torch.nan, batches[0][1])
        lower.data[:] = [*batches[:2], bad, batches[2]] if poisoned else batches
        plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", strict=True, progress=False)
        guard = mlopt.NonFiniteGuard("skip")
        plan.set_guard(guard)
        if poisoned:
            with pytest.warns(
                NonFiniteWarning, match="problem 'classifier', step 3: tensor 0 of its batch .* left out"
            ):
                plan.run(4)
            assert guard.num_refused == {"classifier": 1}
        else:
            plan.run(3)
        found.append(everything(lower))
    assert same(*found)


@pytest.mark.slow
def test_a_skipped_lower_step_is_not_what_the_hypergradient_looks_at():
    plan, lower, upper = make()
    poison(lower)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", strict=True, progress=False)
    plan.set_guard(mlopt.NonFiniteGuard("skip"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plan.run(5)
    assert [w.category for w in seen] == [NonFiniteWarning]
    assert all_finite([*lower.module.parameters(), *upper.module.parameters()])
    assert all_finite(plan.hypergradient("reweight").values())


@pytest.mark.slow
def test_skip_gives_up():
    plan, lower, _ = make()
    plan.set_guard(mlopt.NonFiniteGuard("skip", patience=3))
    lower.data[0][0].fill_(torch.nan)
    lower.data[1][0].fill_(torch.nan)
    with pytest.warns(NonFiniteWarning), pytest.raises(NonFiniteError, match="step 4: .*the 4th step in a row"):
        plan.run(10)
    with torch.no_grad():
        lower.module[0].bias[1] = torch.inf
    plan.set_guard(mlopt.NonFiniteGuard("skip"))
    expected = (
        r"parameter '0.bias' of problem 'classifier' is not finite \(1 infinite of 8\): skipping steps cannot mend"
    )
    with pytest.raises(NonFiniteError, match=expected):
        plan.step()


@pytest.mark.parametrize(
    "estimator",
    [mlopt.CG(max_steps=3, damping=1.0, warm_start=True), pytest.param(mlopt.Unroll(2), marks=pytest.mark.slow)],
)
def test_roll_back_returns_to_the_snapshot(estimator):
    plan, lower, upper = make(hypergradient=estimator, unroll_steps=2)
    guard = mlopt.NonFiniteGuard("roll_back", snapshot_every=4)
    plan.set_guard(guard)
    plan.run(4)
    before = everything(lower, upper)
    plan.run(2)  # the snapshot was taken before step 5
    assert not same(before, everything(lower, upper))
    with torch.no_grad():
        lower.module[0].weight[0, 0] = torch.nan  # what an optimizer may do
    with pytest.warns(NonFiniteWarning, match="step 7: parameter '0.weight' .* back where they were before step 5"):
        plan.step()
    assert guard.num_refused == {"classifier": 1}
    assert same(before, everything(lower, upper))
    plan.run(6)
    assert all_finite([*lower.module.parameters(), *upper.module.parameters()])
    assert not same(before, everything(lower, upper))


@pytest.mark.slow
def test_roll_back_gives_up():
    plan, lower, _ = make()
    plan.set_guard(mlopt.NonFiniteGuard("roll_back", patience=2))
    plan.run(2)
    for x, _y in lower.data:
        x.fill_(torch.nan)
    with pytest.warns(NonFiniteWarning), pytest.raises(NonFiniteError, match="for the 3th time after .* to step 1"):
        plan.run(10)
    plan, lower, _ = make()
    lower.module[0].bias.data[1] = torch.nan
    plan.set_guard(mlopt.NonFiniteGuard("roll_back"))
    with pytest.raises(NonFiniteError, match="before step 1: there is no sound state to return to"):
        plan.step()


def test_names_what_of_the_hypergradient_is_not_finite():
    class Lower(mlopt.Problem):
        def training_step(self, batch):
            return (self.module(batch) ** 2).mean() + self.upper.module.weight.sum() * self.module.weight.sum()

    class Upper(mlopt.Problem):
        def training_step(self, batch):
            # Finite where the lower weight is 0, with an infinite derivative there.
            return self.lower.module.weight.abs().sum().sqrt() + self.module.weight.sum() * 0

    inner, outer = nn.Linear(3, 1, bias=False), nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(inner.weight)
    torch.nn.init.zeros_(outer.weight)
    sgd = torch.optim.SGD
    lower = Lower("lower", module=inner, optimizer=sgd(inner.parameters(), lr=0.1), data=[torch.randn(4, 3)])
    upper = Upper("upper", module=outer, optimizer=sgd(outer.parameters(), lr=0.1))
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", verify=False, progress=False)
    plan.set_guard(mlopt.NonFiniteGuard("raise"))
    expected = "'upper', step 1: the gradient of its loss with respect to problem 'lower' is not finite"
    with pytest.warns(mlopt.errors.SolverWarning), pytest.raises(NonFiniteError, match=expected):
        plan.step()


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_roll_back_problems_and_skipped_steps(policy):
    """A lower step that was left out is not repeated in the unroll of a problem with roll_back."""
    plan, lower, upper = make(unroll_steps=3)
    upper.roll_back = True
    poison(lower)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", strict=True, progress=False)
    plan.set_guard(mlopt.NonFiniteGuard(policy))
    with pytest.warns(NonFiniteWarning):
        plan.run(9)
    assert all_finite([*lower.module.parameters(), *upper.module.parameters()])


def test_bad_arguments():
    with pytest.raises(ValueError, match="argument `non_finite`: expected one of 'raise', 'skip', 'roll_back' or None"):
        mlopt.NonFiniteGuard("ignore")
    with pytest.raises(ValueError, match="argument `patience`: expected an integer >= 1, got 0"):
        mlopt.NonFiniteGuard("skip", patience=0)


class TestLossScale:
    def test_an_overflow_leaves_nothing_behind_but_a_smaller_scale(self):
        plan, lower, upper = make(precision="fp16")
        scale = lower.loss_scale
        lower.module.factor.fill_(1e6)
        before = everything(lower, upper)
        first = float(scale.value)
        plan._executor.step("classifier")
        assert float(scale.value) == first / 2 and scale.num_overflows == 1
        assert same(before, everything(lower, upper))
        while float(scale.value) > first / 2**12 and scale.num_overflows < 12:
            plan._executor.step("classifier")
        lower.module.factor.fill_(1.0)
        plan.run(3)
        assert not same(before, everything(lower, upper))
        assert all_finite([*lower.module.parameters(), *upper.module.parameters()])

    def test_training_settles_and_equals_float32(self):
        """With a loss so large that the first scales overflow, training is that of float32, some steps later."""
        found = []
        for precision in ("fp16", None):
            plan, lower, upper = make(precision=precision, unroll_steps=1000)
            lower.module.factor.fill_(300.0)
            for group in lower.optimizer.param_groups:
                group["lr"] = 1e-4
            lower.scheduler = None
            lower.data[:] = lower.data[:1]  # one batch, so that a skipped step does not shift the others
            plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", strict=True, progress=False)
            plan.run(20)
            if precision is not None:
                skipped = lower.loss_scale.num_overflows
                assert 0 < skipped < 12
                plan.run(skipped)
            found.append(flat(lower.module.parameters()).detach())
        start = flat(make()[1].module.parameters()).detach()
        assert (found[0] - found[1]).norm() < 1e-2 * (found[1] - start).norm()

    def test_an_overflow_of_products_lowers_the_scale_below(self):
        plan, lower, upper = make(precision="fp16")
        lower.module.factor.fill_(50.0)
        lower.hypergradient = mlopt.CG(max_steps=3, damping=50.0)
        first = float(lower.loss_scale.value)
        before = everything(upper)
        steps = 0
        while same(before, everything(upper)):
            plan._executor.step("reweight")  # alone: the gradients of the lower problem have no part in it
            steps += 1
            assert steps < 20
        assert float(lower.loss_scale.value) == first / 2 ** (steps - 1)
        assert steps > 1  # the test is about something
        assert all_finite([*upper.module.parameters()])

    def test_hypergradient_finds_a_scale_that_holds(self):
        plan, lower, _ = make(precision="fp16")
        lower.module.factor.fill_(50.0)
        got = flat(plan.hypergradient("reweight").values())
        full, lower32, _ = make()
        lower32.module.factor.fill_(50.0)
        expected = flat(full.hypergradient("reweight").values())
        assert float(lower.loss_scale.value) < 2**16
        assert (got - expected).norm() < 2e-2 * expected.norm()

    def test_an_overflow_that_no_scale_avoids_is_an_error(self):
        plan, lower, _ = make(precision="fp16")
        lower.module.factor.fill_(torch.inf)
        with pytest.raises(
            NonFiniteError, match="problem 'classifier': buffer 'factor' .* with the smallest loss scale"
        ):
            plan.run(100)
        plan, lower, _ = make(precision="fp16")
        plan.set_guard(mlopt.NonFiniteGuard("raise"))
        lower.data[0][0].fill_(torch.nan)
        with pytest.raises(NonFiniteError, match="problem 'classifier', step 1: tensor 0 of its batch"):
            plan.step()
        assert lower.loss_scale.num_overflows == 0  # a NaN in the data is no matter of the scale

    def test_growth_and_state(self):
        scale = LossScale(torch.device("cpu"), initial=8.0, growth_interval=3, smallest=4.0)
        for _ in range(2):
            scale.grow()
        other = LossScale(torch.device("cpu"), growth_interval=3)
        other.load_state_dict(scale.state_dict())
        other.grow()
        assert float(other.value) == 16.0 and float(scale.value) == 8.0
        assert scale.back_off() and float(scale.value) == 4.0
        assert not scale.back_off() and float(scale.value) == 4.0 and scale.num_overflows == 1
        for _ in range(3):
            scale.grow()
        assert float(scale.value) == 8.0
        scale.value.fill_(torch.finfo(torch.float32).max)
        for _ in range(3):
            scale.grow()
        assert torch.isfinite(scale.value)

    def test_the_scale_does_not_change_the_result(self):
        """Powers of two change no digit."""
        found = []
        for exponent in (4, 8):
            plan, lower, _ = make(precision="fp16")
            lower.loss_scale.value.fill_(2.0**exponent)
            plan.run(2)
            found.append(flat(plan.hypergradient("reweight").values()))
        torch.testing.assert_close(*found, rtol=1e-2, atol=1e-5)


def test_a_plain_loop_agrees_with_the_loss_scale_of_torch():
    """One fp16 problem against torch.amp.GradScaler on the same data: the same steps are left out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    twin.load_state_dict(net.state_dict())
    (batch,) = bilevel.data()

    class Alone(mlopt.Problem):
        def training_step(self, batch):
            return 2000 * F.cross_entropy(self.module(batch[0]), batch[1])

    alone = Alone("a", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=1e-4), data=[batch], precision="fp16")
    plan = mlopt.compile(mlopt.Graph([alone]), backend="eager", strict=True, progress=False)
    optimizer, scaler = torch.optim.SGD(twin.parameters(), lr=1e-4), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for _ in range(12):
        plan.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = 2000 * F.cross_entropy(twin(batch[0]), batch[1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert float(alone.loss_scale.value) == scaler.get_scale()
        torch.testing.assert_close(flat(net.parameters()), flat(twin.parameters()), rtol=1e-4, atol=1e-6)
    assert alone.loss_scale.num_overflows > 0


def test_compiled_steps_are_looked_at_too(monkeypatch):
    """A step that is one graph is made by itself again where it is not finite, which tells where that begins."""
    found = {}
    for name, backend in (("graphs", GraphBackend()), ("eager", "eager")):
        lower, upper = make(unroll_steps=2)[1:]
        poison(lower)
        plan = compiled([lower, upper], backend, monkeypatch)
        (derivatives,) = plan._report.graphs["classifier"]
        assert (derivatives.step is not None and derivatives.step.is_used()) == (name == "graphs")
        guard = mlopt.NonFiniteGuard("raise")
        plan.set_guard(guard)
        plan.run(2)
        before = everything(lower, upper)
        with pytest.raises(NonFiniteError, match=r"'classifier', step 3: tensor 0 of its batch"):
            plan.run(2)
        assert same(before, everything(lower, upper))
        plan.set_guard(mlopt.NonFiniteGuard("skip"))
        with pytest.warns(NonFiniteWarning):
            plan.run(4)
        found[name] = everything(lower, upper)
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)
