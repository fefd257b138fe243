"""The last optimizer steps of a problem, kept so that they can be differentiated.

Per step: the micro-batches with their random numbers, the optimizer's settings, and what else went into the gradient.
States are kept at every ``sqrt(K)``-th step only; the ones between are computed again (Griewank 1992 gives the
logarithmic scheme; with two levels memory grows with sqrt(K) and every step is repeated once).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mlopt.autodiff.update import OptimizerState
from mlopt.problem import Problem
from mlopt.runtime.state import Sample


@dataclasses.dataclass(frozen=True)
class State:
    """A problem before one of its steps.

    Attributes:
        parameters: Values of the trained parameters in layout order.
        optimizer: State of the optimizer.
    """

    parameters: list[torch.Tensor]
    optimizer: OptimizerState


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one step used besides the problem's own state.

    Attributes:
        samples: Its micro-batches.
        settings: The optimizer's group settings (learning rates move).
        reads: ``id`` of a buffer, or of a parameter of another problem -> the value it had: anybody may write them
            between two steps. Shared between records until it changes.
        extra: What was added to the gradient of the own loss, in layout order; None for nothing.
    """

    samples: tuple[Sample, ...]
    settings: list[dict[str, Any]]
    reads: dict[int, torch.Tensor]
    extra: list[torch.Tensor | None] | None


class History:
    """Records of the last steps of one problem.

    Args:
        problem: The problem.
        peers: The problems whose tensors its steps read.
        num_steps: K, how many steps are kept.
    """

    def __init__(self, problem: Problem, peers: Sequence[Problem], num_steps: int) -> None:
        self._problem = problem
        self._reads: list[torch.Tensor] = [p for peer in peers for p in peer.module.parameters()]
        self._reads += [b for each in (problem, *peers) for b in each.module.buffers()]
        self._num_steps = num_steps
        self.interval = math.ceil(math.sqrt(num_steps))
        self._first = 0  # number of the first record
        self._records: collections.deque[StepRecord] = collections.deque()
        self._checkpoints: collections.deque[tuple[int, State]] = collections.deque()
        self._values: dict[int, tuple[tuple[int, int], torch.Tensor]] = {}

    @property
    def end(self) -> int:
        """Number of steps ever recorded; records carry the numbers before it."""
        return self._first + len(self._records)

    def record(self, samples: tuple[Sample, ...], extra: list[torch.Tensor | None] | None) -> None:
        """Record the step that the problem is about to make; call before its parameters change."""
        if self.end % self.interval == 0 or not self._checkpoints:
            self._checkpoints.append((self.end, self.present_state()))
        settings = [
            {k: _copied(v) for k, v in g.items() if k != "params"} for g in self._problem.optimizer.param_groups
        ]
        self._records.append(StepRecord(samples, settings, self._present_reads(), extra))
        oldest = self.end - self._num_steps
        while len(self._checkpoints) > 1 and self._checkpoints[1][0] <= oldest:
            self._checkpoints.popleft()
        while self._first < self._checkpoints[0][0]:
            self._records.popleft()
            self._first += 1

    def begin(self) -> None:
        """Forget all records: the problem was reset, so that earlier steps have no influence on later ones."""
        self._first = self.end
        self._records.clear()
        self._checkpoints.clear()

    def rewind(self, count: int) -> None:
        """Forget the last records: the steps are about to be made again."""
        for _ in range(min(count, len(self._records))):
            self._records.pop()
        while self._checkpoints and self._checkpoints[-1][0] >= self.end:
            self._checkpoints.pop()
        if not self._checkpoints:
            self._first = self.end
            self._records.clear()

    def segments(self, count: int) -> list[tuple[int, int, State]]:
        """Return (first, end, state before the first) of the stretches that hold the last `count` steps, in order."""
        start = max(self.end - count, self._first)
        bounds = [number for number, _ in self._checkpoints] + [self.end]
        found = []
        for i, (first, state) in enumerate(self._checkpoints):
            if bounds[i + 1] > start:
                found.append((first, bounds[i + 1], state))
        return found

    def __getitem__(self, number: int) -> StepRecord:
        """Return the record of a step."""
        return self._records[number - self._first]

    def start(self, count: int) -> int:
        """Return the number of the first of the last `count` steps that are known."""
        return max(self.end - count, self._first)

    def present_state(self) -> State:
        """Copy the problem's state."""
        trained = list(self._problem.trained_parameters().values())
        return State(
            [p.detach().clone() for p in trained],
            OptimizerState.of(self._problem.optimizer, trained),
        )

    def state_dict(self, names: Mapping[int, str]) -> dict[str, Any]:
        """Return everything that is kept as plain data.

        Args:
            names: ``id`` of a live parameter or buffer -> its name.
        """

        def named(values: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {names[key]: value for key, value in values.items()}

        return {
            "first": self._first,
            "records": [
                {
                    "samples": [s.pack() for s in r.samples],
                    "settings": r.settings,
                    "reads": named(r.reads),
                    "extra": r.extra,
                }
                for r in self._records
            ],
            "checkpoints": [
                {
                    "step": step,
                    "parameters": state.parameters,
                    "optimizer": vars(state.optimizer),
                }
                for step, state in self._checkpoints
            ],
        }

    def load_state_dict(
        self, state: dict[str, Any], ids: Mapping[str, int], sample: Callable[[dict[str, Any]], Sample]
    ) -> None:
        """Take over what `state_dict` returned.

        Args:
            state: The plain data.
            ids: Name of a live parameter or buffer -> its ``id``.
            sample: Unpacks a micro-batch.
        """

        def live(values: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
            return {ids[name]: value for name, value in values.items()}

        self._first, self._values = state["first"], {}
        self._records = collections.deque(
            StepRecord(tuple(sample(s) for s in r["samples"]), r["settings"], live(r["reads"]), r["extra"])
            for r in state["records"]
        )
        self._checkpoints = collections.deque(
            (c["step"], State(c["parameters"], OptimizerState(**c["optimizer"]))) for c in state["checkpoints"]
        )

    def _present_reads(self) -> dict[int, torch.Tensor]:
        for p in self._reads:
            version = (p._version, p.data_ptr())
            if id(p) not in self._values or self._values[id(p)][0] != version:
                self._values[id(p)] = (version, p.detach().clone())
        return {key: value for key, (_, value) in self._values.items()}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def point(record: StepRecord, state: State, trained: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return the values of all live tensors at a recorded step."""
    own = {id(p): value for p, value in zip(trained.values(), state.parameters, strict=True)}
    return {**record.reads, **own}
