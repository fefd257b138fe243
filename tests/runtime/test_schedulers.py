"""Every learning-rate scheduler of torch: the same rates as in a loop without mlopt, also resumed and run ahead."""

import inspect
import io
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as schedulers

import mlopt
from mlopt.errors import ProblemError
from mlopt.runtime.schedule import ScheduleAhead
from tests.helpers.bilevel import compiled


def sequential(optimizer):
    warm = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=3)
    return schedulers.SequentialLR(optimizer, [warm, schedulers.CosineAnnealingLR(optimizer, T_max=7)], milestones=[3])


def chained(optimizer):
    return schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer, 0.5, 4), schedulers.ExponentialLR(optimizer, 0.9)], optimizer=optimizer
    )


KINDS = {
    "StepLR": lambda o: schedulers.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.25, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.2, 1.0, 6),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9 if epoch % 2 else 0.8),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2"),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.2, total_steps=20),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1, threshold=0.02),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
}
STEPS = 12
each = pytest.mark.parametrize("make_scheduler", KINDS.values(), ids=KINDS)


class Regression(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.mse_loss(self.module(x), y)


def parts(make_scheduler, seed=0):
    torch.manual_seed(seed)
    batches = [(torch.randn(8, 3), torch.randn(8, 2)) for _ in range(4)]
    net = nn.Linear(3, 2)
    groups = [{"params": [net.weight], "lr": 0.1}, {"params": [net.bias], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return batches, net, optimizer, make_scheduler(optimizer)


def problem_with(make_scheduler, **options):
    batches, net, optimizer, scheduler = parts(make_scheduler)
    return Regression("fit", module=net, optimizer=optimizer, scheduler=scheduler, data=batches, **options)


def program(make_scheduler, **options):
    problem = problem_with(make_scheduler, **options)
    return mlopt.compile(mlopt.Graph([problem]), verify=False, strict=True, progress=False), problem


def settings(optimizer):
    return [(group["lr"], group["momentum"]) for group in optimizer.param_groups]


def trajectory(plan, problem, count):
    found = []
    for _ in range(count):
        plan.step()
        found.append(settings(problem.optimizer))
    return found


def test_all_schedulers_are_here():
    present = {
        name
        for name, kind in vars(schedulers).items()
        if inspect.isclass(kind) and issubclass(kind, schedulers.LRScheduler) and not name.startswith("_")
    }
    assert present - {"LRScheduler", "LambdaLR"} == set(KINDS) - {"LambdaLR"}


@each
def test_like_a_plain_loop(make_scheduler):
    batches, net, optimizer, scheduler = parts(make_scheduler)
    expected = []
    for step in range(STEPS):
        x, y = batches[step % len(batches)]
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(loss.item())
        else:
            scheduler.step()
        expected.append(settings(optimizer))
    assert len({tuple(s) for s in expected}) > 1  # it does something
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of schedulers stepped before their optimizer
        plan, problem = program(make_scheduler)
        assert trajectory(plan, problem, STEPS) == expected
    torch.testing.assert_close(problem.module.weight, net.weight)


@each
def test_resumed(make_scheduler):
    plan, problem = program(make_scheduler)
    plan.run(5)
    file = io.BytesIO()
    torch.save(plan.state_dict(), file)
    expected = trajectory(plan, problem, STEPS - 5)
    other, other_problem = program(make_scheduler)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert trajectory(other, other_problem, STEPS - 5) == expected
    assert torch.equal(problem.module.weight, other_problem.module.weight)


class AnyStep:
    """Stands for a compiled step that takes all settings as they are."""

    changes_settings = False

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def settings(self):
        return [value for pair in settings(self.optimizer) for value in pair]

    def accepts(self):
        return True


@each
@pytest.mark.parametrize("made", [0, 3, 7])
def test_run_ahead(make_scheduler, made):
    """The rows for a native loop of 7 steps of which `made` are made, then single ones."""
    problem = problem_with(make_scheduler)
    step = AnyStep(problem.optimizer)
    ahead = ScheduleAhead.of(problem, step, 7)
    if isinstance(problem.scheduler, schedulers.ReduceLROnPlateau):
        assert ahead is None  # it needs the loss of each step
        return
    plain = problem_with(make_scheduler)
    plain.optimizer.step()
    expected = [AnyStep(plain.optimizer).settings()]
    for _ in range(STEPS):
        plain.scheduler.step()
        expected.append(AnyStep(plain.optimizer).settings())
    assert ahead.rows == expected[:7]
    ahead.settle(made)
    assert step.settings() == expected[made]
    for number in range(made + 1, STEPS):
        problem.scheduler.step()
        assert step.settings() == expected[number]


def plateau(optimizer):
    return schedulers.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)


def test_plateau_of_a_validation_metric():
    plan, problem = program(plateau, scheduler_metric="acc/top1")
    values = iter([0.5, 0.7, 0.7, 0.6, 0.1])
    engine = mlopt.Engine(
        plan, 9, validate=lambda: {"acc": {"top1": next(values)}}, validate_every=2, log_every=1, progress=False
    )
    rates = []

    class Watch(mlopt.Callback):
        def on_log(self, engine, values):
            rates.append(problem.optimizer.param_groups[0]["lr"])

    engine._callbacks = (Watch(),)
    engine.run()  # the validation after the last step, at 9, is none of the scheduler's
    assert rates == [0.1] * 6 + [0.05] * 2 + [0.025]


def test_plateau_of_a_metric_stands_still_between_validations():
    plan, problem = program(plateau, scheduler_metric="acc")
    step = AnyStep(problem.optimizer)
    ahead = ScheduleAhead.of(problem, step, 4)
    assert ahead.rows == [step.settings()] * 4
    ahead.settle(2)
    plan.run(4)
    assert problem.scheduler.last_epoch == 0


def test_bad_metrics():
    with pytest.raises(ProblemError, match=r"`scheduler_metric`: .*ReduceLROnPlateau, the scheduler is StepLR"):
        program(KINDS["StepLR"], scheduler_metric="acc")
    plan, _ = program(plateau, scheduler_metric="acc")
    with pytest.raises(ValueError, match="the scheduler of 'fit' looks at a number of `validate`, which is not given"):
        mlopt.Engine(plan, 2)
    engine = mlopt.Engine(plan, 2, validate=lambda: {"other": 1}, validate_every=1, progress=False)
    with pytest.raises(ValueError, match=r"the scheduler of problem 'fit': `validate` returned no number named 'acc'"):
        engine.run()


def test_a_compiled_update_that_fails(monkeypatch):
    """The update of a problem above others is then made by torch, and its scheduler stepped once."""
    weights, given_up = [], []
    for fails in (False, True):
        torch.manual_seed(0)
        plan, _, upper = compiled(unroll_steps=2)
        upper.scheduler = KINDS["ExponentialLR"](upper.optimizer)
        if fails:

            def run(own, indirect):
                raise RuntimeError("no memory")

            update = types.SimpleNamespace(is_used=lambda: True, accepts=lambda: True, run=run, give_up=given_up.append)
            evaluate = plan._executor._run

            def with_update(*args, evaluate=evaluate, update=update, **options):
                found = evaluate(*args, **options)
                found.derivatives = types.SimpleNamespace(update=update)
                return found

            monkeypatch.setattr(plan._executor, "_run", with_update)
        plan.run(4)
        assert upper.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.8**2)
        weights.append(upper.module[0].weight.detach().clone())
    assert torch.equal(*weights) and given_up == ["no memory"] * 2
