"""What a solve came to: numerical outcomes are data, not exceptions."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple

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


class Details(NamedTuple):
    """What a `Solution` has besides its value."""

    outcomes: torch.Tensor
    num_steps: torch.Tensor
    relative_residual: torch.Tensor


class Solution:
    """Result of a solve of ``A x = b`` for one or K right-hand sides.

    Args:
        value: See below, like the rest.
        outcomes: See below.
        num_steps: See below.
        relative_residual: See below.

    Attributes:
        value: x, [N] or [K, N].
        outcomes: One `Outcome` code per right-hand side, int tensor [] or [K], on the device.
        num_steps: Operator-solver steps made, [] or [K].
        relative_residual: ``||b - A x|| / ||b||`` by the solver's recurrence, [] or [K]; for a truncated series, the
            size of its last term over that of b. NaN where the solver does not know it.
    """

    def __init__(
        self,
        value: torch.Tensor,
        outcomes: torch.Tensor,
        num_steps: torch.Tensor,
        relative_residual: torch.Tensor,
    ) -> None:
        self.value = value
        self._details: Details | Callable[[], Details] = Details(outcomes, num_steps, relative_residual)
        self._outcome: Outcome | None = None

    @classmethod
    def deferred(cls, value: torch.Tensor, details: Callable[[], Details], outcome: Outcome | None = None) -> Solution:
        """Make one whose details are computed when somebody asks.

        A small solve takes a few microseconds, as does each tensor operation on its outcome.

        Args:
            value: x.
            details: Computes the rest; must not depend on anything that changes.
            outcome: The worst outcome, if it is known.
        """
        made = cls.__new__(cls)
        made.value, made._details, made._outcome = value, details, outcome
        return made

    @property
    def details(self) -> Details:
        """Outcomes, steps and residuals."""
        if not isinstance(self._details, Details):
            self._details = self._details()
        return self._details

    @property
    def outcomes(self) -> torch.Tensor:
        """See above."""
        return self.details.outcomes

    @property
    def num_steps(self) -> torch.Tensor:
        """See above."""
        return self.details.num_steps

    @property
    def relative_residual(self) -> torch.Tensor:
        """See above."""
        return self.details.relative_residual

    @property
    def outcome(self) -> Outcome:
        """The worst outcome over the right-hand sides (waits for the device)."""
        if self._outcome is None:
            codes = self.outcomes
            self._outcome = Outcome(int(codes.max())) if codes.numel() else Outcome.CONVERGED
        return self._outcome
