"""What is known of a step while it is made, and after it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mlopt.linalg import Solution
from mlopt.runtime.derivatives import AbstractDerivatives, AbstractLinearization, GradientResult
from mlopt.runtime.state import Sample


@dataclasses.dataclass
class Pass:
    """The slots of one run of a problem's instructions."""

    slots: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    linearizations: dict[str, AbstractLinearization] = dataclasses.field(default_factory=dict)
    solutions: dict[str, Solution] = dataclasses.field(default_factory=dict)
    result: GradientResult | None = None
    samples: tuple[Sample, ...] = ()
    derivatives: AbstractDerivatives | None = None  # of the problem's own loss

    def add(self, slot: str, value: torch.Tensor) -> None:
        """Add a vector into a slot; an empty slot takes it over."""
        present = self.slots.get(slot)
        self.slots[slot] = value if present is None else present + value


@dataclasses.dataclass
class Made:
    """What became of one step.

    Attributes:
        results: Loss and metrics.
        interrupt: Ctrl-C, if it came when the step was made.
        left_out: It was not finite, and changed nothing.
    """

    results: dict[str, Any]
    interrupt: BaseException | None = None
    left_out: bool = False
