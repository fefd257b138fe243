"""What a solve came to: numerical outcomes are data, not exceptions."""

from __future__ import annotations

import dataclasses
import enum

import torch


class Outcome(enum.IntEnum):
    """How a solve of one right-hand side ended, in order of severity; `advice` says what to do about it."""

    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGING = 2
    BREAKDOWN = 3
    NON_FINITE = 4
    SINGULAR = 5

    @property
    def advice(self) -> str:
        """What the outcome means and what to do."""
        return _ADVICE[self]


_ADVICE = {
    Outcome.CONVERGED: "the residual is at or below the requested tolerance",
    Outcome.MAX_STEPS: "the step limit came before the requested tolerance; raise max_steps or damping if the "
    "accuracy matters",
    Outcome.DIVERGING: "the terms of the series grow: scale is larger than 2 / (largest eigenvalue of H), or H is "
    "indefinite; lower scale or use CG with damping",
    Outcome.BREAKDOWN: "a direction of non-positive curvature was met (p.Hp <= 0): the lower problem is not at a "
    "minimum; raise damping, or train the lower problem further",
    Outcome.NON_FINITE: "the right-hand side or a product with the operator is NaN or infinite; look at the lower "
    "loss and its learning rate",
    Outcome.SINGULAR: "the matrix is singular: parameters that the lower loss does not determine; add damping",
}


@dataclasses.dataclass(frozen=True)
class Solution:
    """Result of a solve of ``A x = b`` for one or K right-hand sides.

    Attributes:
        value: x, [N] or [K, N].
        outcomes: One `Outcome` code per right-hand side, int tensor [] or [K], on the device.
        num_steps: Operator-solver steps made, [] or [K].
        relative_residual: ``||b - A x|| / ||b||`` by the solver's recurrence, [] or [K]; for a truncated series, the
            size of its last term over that of b. NaN where the solver does not know it.
    """

    value: torch.Tensor
    outcomes: torch.Tensor
    num_steps: torch.Tensor
    relative_residual: torch.Tensor

    @property
    def outcome(self) -> Outcome:
        """The worst outcome over the right-hand sides (waits for the device)."""
        return Outcome(int(self.outcomes.max())) if self.outcomes.numel() else Outcome.CONVERGED
