"""What the runtime remembers of one problem between steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mlopt.capture.packing import unpack
from mlopt.runtime.data import Batch, BatchStream
from mlopt.runtime.rng import RandomState


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one evaluation of a loss saw besides parameters.

    Attributes:
        batch: The batch.
        random_state: The generators before it, so that another pass draws the same masks; None if it draws nothing.
    """

    batch: Batch
    random_state: RandomState | None = None

    def pack(self) -> dict[str, Any]:
        """Return it as plain data."""
        state = self.random_state
        return {"batch": self.batch.pack(), "random": None if state is None else [state.cpu, state.cuda]}

    @classmethod
    def unpack(cls, data: dict[str, Any], stream: BatchStream, device: torch.device) -> Sample:
        """Rebuild what `pack` returned, on the device of the problem."""
        batch = stream.flatten(unpack(data["batch"]))
        if data["random"] is None:
            return cls(batch)
        cpu, cuda = data["random"]
        return cls(batch, RandomState(cpu.cpu(), None if cuda is None else cuda.cpu(), device))


@dataclasses.dataclass
class ProblemState:
    """What the runtime remembers of one problem.

    Attributes:
        stream: Its batches.
        num_steps: Optimizer steps made.
        steps_seen: For each lower problem, its `num_steps` when this problem last stepped.
        samples: The micro-batches of the last step; empty before the first.
    """

    stream: BatchStream
    num_steps: int = 0
    steps_seen: dict[str, int] = dataclasses.field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
