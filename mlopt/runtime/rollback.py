"""Roll-back: after an upper problem's step the problems below it repeat their unroll with its new parameters.

The state at the start of the unroll is copied; every step of a problem below is logged with its micro-batches and
random numbers. After the upper step the copies are put back and *all* logged steps are made again, in their order.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from mlopt.problem import Problem
from mlopt.runtime.state import Sample


class Snapshot:
    """A copy of everything that a step of one problem changes: parameters, buffers, optimizer, scheduler."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        tensors = (*problem.module.parameters(), *problem.module.buffers())
        self._tensors = [(t, t.detach().clone()) for t in tensors]
        optimizer = problem.optimizer
        self._state = {p: {k: _copied(v) for k, v in state.items()} for p, state in optimizer.state.items()}
        self._groups = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        scheduler = problem.scheduler
        self._scheduler = None if scheduler is None else copy.deepcopy(scheduler.state_dict())

    def restore(self) -> None:
        """Put the copies back into the live objects, which stay the same objects."""
        with torch.no_grad():
            for live, value in self._tensors:
                live.copy_(value)
            optimizer = self._problem.optimizer
            for parameter in list(optimizer.state):
                if parameter not in self._state:
                    del optimizer.state[parameter]
            for parameter, saved in self._state.items():
                state = optimizer.state[parameter]
                for key in [k for k in state if k not in saved]:
                    del state[key]
                for key, value in saved.items():
                    if isinstance(value, torch.Tensor) and isinstance(state.get(key), torch.Tensor):
                        state[key].copy_(value)
                    else:
                        state[key] = _copied(value)
            for group, saved_group in zip(optimizer.param_groups, self._groups, strict=True):
                group.update({k: _copied(v) for k, v in saved_group.items()})
        if self._scheduler is not None:
            self._problem.scheduler.load_state_dict(copy.deepcopy(self._scheduler))

    def state_dict(self) -> dict[str, Any]:
        """Return the copies as plain data: tensors by position, optimizer state by the parameter's position."""
        position = {id(p): i for i, p in enumerate(_held(self._problem))}
        return {
            "problem": self._problem.name,
            "tensors": [value for _, value in self._tensors],
            "optimizer": {position[id(p)]: state for p, state in self._state.items()},
            "groups": self._groups,
            "scheduler": self._scheduler,
        }

    @classmethod
    def of_state_dict(cls, problem: Problem, state: dict[str, Any]) -> Snapshot:
        """Rebuild what `state_dict` returned."""
        snapshot, held = cls(problem), _held(problem)
        snapshot._tensors = [(t, value) for (t, _), value in zip(snapshot._tensors, state["tensors"], strict=True)]
        snapshot._state = {held[i]: entries for i, entries in state["optimizer"].items()}
        snapshot._groups, snapshot._scheduler = state["groups"], state["scheduler"]
        return snapshot


@dataclasses.dataclass
class Unroll:
    """The steps below one upper problem since its last step.

    Attributes:
        snapshots: The problems below as they were before the first logged step.
        steps: (problem, micro-batches) of every step, in order.
    """

    snapshots: list[Snapshot] = dataclasses.field(default_factory=list)
    steps: list[tuple[str, tuple[Sample, ...]]] = dataclasses.field(default_factory=list)

    def restore(self) -> None:
        """Return to the start."""
        for snapshot in self.snapshots:
            snapshot.restore()


def _held(problem: Problem) -> list[torch.Tensor]:
    return [p for group in problem.optimizer.param_groups for p in group["params"]]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
