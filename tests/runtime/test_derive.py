"""Modules are looked at once per global step, and again wherever code of the user's may have changed them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.errors import StateError
from mlopt.hypergradient import AbstractEstimator


class Lower(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.mse_loss(self.module(x), y) + (self.upper.module.weight.exp() * self.module.weight**2).sum()


class Upper(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.mse_loss(self.lower.module(x), y)


class Own(AbstractEstimator):
    """An estimator of the user's."""

    def solve(self, operator, rhs, guess=None):
        self.spoil()
        return mlopt.Identity().solve(operator, rhs, guess)


def make(lower=Lower, upper=Upper, data=None, scheduler=None, **options):
    torch.manual_seed(0)
    batch = torch.randn(8, 3), torch.randn(8, 2)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
    descent = torch.optim.SGD(first.parameters(), lr=0.1)
    below = lower(
        "lower",
        module=first,
        optimizer=descent,
        data=[batch] if data is None else data(batch),
        scheduler=None if scheduler is None else scheduler(descent),
        unroll_steps=3,
        **{"hypergradient": mlopt.CG(max_steps=2), **options},
    )
    above = upper("upper", module=second, optimizer=torch.optim.SGD(second.parameters(), lr=0.1), data=[batch])
    return mlopt.compile(mlopt.Graph([below, above]), backend="eager", progress=False), below, above


def overriding(base, method):
    """A class of problems whose method calls `spoil`, which a test sets once the plan is made."""

    def replaced(self, *args, **kwargs):
        getattr(self, "spoil", lambda: None)()
        return getattr(super(made, self), method)(*args, **kwargs)

    made = type("Own", (base,), {method: replaced, "step_hooks": base.step_hooks})
    return made


class Loader:
    """Batches that are made one by one."""

    def __init__(self, batch):
        self.batch = batch
        self.spoil = lambda: None

    def __iter__(self):
        for _ in range(2):
            self.spoil()
            yield self.batch


@pytest.mark.parametrize(
    "where",
    [
        *("lower.epoch_callback", "lower.on_inner_loop_start", "lower.grad_callback", "lower.param_callback"),
        *("lower.optimizer_step", "upper.param_callback", "upper.optimizer_step", "upper.epoch_callback"),
        *("loader", "scheduler", "estimator", "on_results"),
    ],
)
def test_a_change_by_the_users_code_is_noticed_in_the_same_run(where):
    """The parameter is frozen in the middle of a run of several global steps, which does not go on with it."""
    spoiler = {}
    options = {}
    if "." in where:
        level, method = where.split(".")
        options[level] = overriding(Lower if level == "lower" else Upper, method)
    elif where == "loader":
        options["data"] = lambda batch: spoiler.setdefault("object", Loader(batch))
    elif where == "scheduler":
        options["scheduler"] = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: spoiler.get("run", lambda: 1)())
    elif where == "estimator":
        spoiler["object"] = options["hypergradient"] = Own()
        spoiler["object"].spoil = lambda: None
    plan, lower, upper = make(**options)
    plan.run(3)
    before = None

    def spoil():
        nonlocal before
        if before is None and plan.steps_of("lower") >= (
            6 if where.startswith("upper") else 5
        ):  # the upper step is next
            before = plan.steps_of("upper")
            lower.module.weight.requires_grad_(False)
        return 1

    if "." in where:
        {"lower": lower, "upper": upper}[level].spoil = spoil
    elif where == "scheduler":
        spoiler["run"] = spoil
    elif where != "on_results":
        spoiler["object"].spoil = spoil
    with pytest.raises(StateError, match=r"parameter 'weight' is .*requires_grad=False"):
        plan.run(12, on_results=(lambda *_: spoil()) if where == "on_results" else None)
    finished = where in ("upper.param_callback", "upper.optimizer_step", "estimator")  # after its gradient was made
    assert plan.steps_of("upper") == before + finished


def test_modules_are_looked_at_once_where_nothing_else_runs(monkeypatch):
    plan, *_ = make()
    plan.run(3)
    guard = plan._executor.derive._derive.__self__.guard
    looks, modes = [], guard.modes
    monkeypatch.setattr(guard, "modes", lambda: (looks.append(1), modes())[1])
    plan.run(3)
    # For each of three global steps, and for the step above after one below: optimizers may be anybody's code.
    assert len(looks) == 4
