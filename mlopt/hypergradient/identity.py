"""No Hessian at all."""

from __future__ import annotations

import dataclasses

import torch

from mlopt.hypergradient.base import AbstractEstimator, check_number
from mlopt.linalg import AbstractLinearOperator, Outcome, Solution


@dataclasses.dataclass(frozen=True, repr=False)
class Identity(AbstractEstimator):
    """``q = scale * v``: the inverse Hessian replaced by a multiple of the identity, the mixed product exact.

    T1-T2 of Luketina et al. 2016 (arXiv 1511.06727), where ``scale`` is the lower learning rate: the derivative of one
    step of gradient descent.

    Attributes:
        scale: Positive.
    """

    scale: float = 1.0

    uses_hvp = False

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_number("Identity", "scale", self.scale, positive=True)

    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Return ``scale * v``."""
        return scaled(cotangent, self.scale)


def scaled(cotangent: torch.Tensor, scale: float | torch.Tensor) -> Solution:
    """Return ``scale * v`` as a solution, whose residual nobody knows."""
    zero = torch.zeros(cotangent.shape[:-1], dtype=torch.int64, device=cotangent.device)
    return Solution(
        value=cotangent * scale,
        outcomes=zero + int(Outcome.CONVERGED),
        num_steps=zero,
        relative_residual=torch.full_like(zero, float("nan"), dtype=torch.float32),
    )
