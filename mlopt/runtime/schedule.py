"""Learning-rate schedulers: after a step, and run ahead of the steps that they are for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mlopt.problem import Problem
from mlopt.runtime.steps import CompiledStep


class ScheduleAhead:
    """The settings of the next steps of one problem, its scheduler being that many steps ahead.

    Attributes:
        rows: `CompiledStep.settings` of each step.
    """

    def __init__(self, problem: Problem) -> None:
        self.rows: list[list[float]] = []
        self._problem = problem
        self._state: Any = None
        self._groups: list[dict[str, Any]] = []
        self._stands_still = problem.scheduler is None

    @classmethod
    def of(cls, problem: Problem, step: CompiledStep, count: int) -> ScheduleAhead | None:
        """Look ahead over at most `count` steps; None if that cannot be done.

        It ends before a step of which the compiled one is no longer right. Call `settle` in any case.
        """
        ahead = cls(problem)
        scheduler = problem.scheduler
        if scheduler is None:
            ahead.rows = [step.settings()] * count
            return ahead
        learned = type(problem).optimizer_hyperparameters is not Problem.optimizer_hyperparameters
        if problem.scheduler_metric is not None:  # it moves between the runs that are asked of a plan
            ahead.rows = [step.settings()] * count
            ahead._stands_still = True
            return ahead
        looks_at_loss = isinstance(scheduler, ReduceLROnPlateau)
        if not isinstance(scheduler, LRScheduler) or looks_at_loss or step.changes_settings or learned:
            return None
        optimizer = problem.optimizer
        ahead._state = copy.deepcopy(scheduler.state_dict())
        ahead._groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        mark_stepped(optimizer)
        while len(ahead.rows) < count and step.accepts():
            ahead.rows.append(step.settings())
            scheduler.step()
        return ahead

    def settle(self, num_steps: int) -> None:
        """Put the scheduler where it is after this many of the steps."""
        scheduler = self._problem.scheduler
        if self._stands_still or num_steps == len(self.rows):
            return
        scheduler.load_state_dict(self._state)
        for group, saved in zip(self._problem.optimizer.param_groups, self._groups, strict=True):
            group.update({k: _copied(v) for k, v in saved.items()})
        for _ in range(num_steps):
            scheduler.step()


def step_scheduler(problem: Problem, loss: torch.Tensor) -> None:
    """Step a problem's scheduler after a step of its optimizer, if it has one that steps then.

    Args:
        problem: The problem.
        loss: That of the step, for a scheduler that looks at it; reading it waits for the device.
    """
    scheduler = problem.scheduler
    if scheduler is None or problem.scheduler_metric is not None:
        return
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(float(loss))
    else:
        scheduler.step()


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Tell schedulers, which wrap ``optimizer.step`` and warn if it was never called, that a step was made."""
    if hasattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched"):
        optimizer._opt_called = True  # type: ignore[attr-defined]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
