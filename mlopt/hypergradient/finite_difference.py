"""The identity in place of the inverse Hessian, as in DARTS."""

from __future__ import annotations

import dataclasses

import torch

from mlopt.hypergradient.base import AbstractEstimator, check_number
from mlopt.hypergradient.identity import scaled
from mlopt.linalg import AbstractLinearOperator, Solution


@dataclasses.dataclass(frozen=True, repr=False)
class FiniteDifference(AbstractEstimator):
    """``q = scale * v``, and the mixed product exactly or by a central difference (Liu, Simonyan and Yang 2019).

    With ``exact=False`` the mixed product is ``(dg/dlambda(theta + eps q) - dg/dlambda(theta - eps q)) / (2 eps)`` with
    ``eps = step / ||q||``, both sides with the same random numbers. With ``exact=True`` it is taken by automatic
    differentiation, which costs about the same, has no rounding error, and leaves theta alone. The two also differ
    where the loss detaches a value that depends on theta: a derivative stops there, a difference quotient does not.

    Attributes:
        step: Length of the step in the space of the lower parameters, used with ``exact=False``.
        scale: 1 is Betty's choice; the lower learning rate is that of the DARTS paper (arXiv 1806.09055, eq. 7).
        exact: See above.
    """

    step: float = 0.01
    scale: float = 1.0
    exact: bool = True

    uses_hvp = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_number("FiniteDifference", "step", self.step, positive=True)
        check_number("FiniteDifference", "scale", self.scale, positive=True)

    @property
    def mixed_step(self) -> float | None:  # type: ignore[override]
        """The step of the central difference, or None for the exact product."""
        return None if self.exact else self.step

    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Return ``scale * v``."""
        return scaled(cotangent, self.scale)
