"""Reverse-mode differentiation through the optimizer steps that were made."""

from __future__ import annotations

import dataclasses

import torch

from mlopt.hypergradient.base import AbstractEstimator, check_count
from mlopt.linalg import AbstractLinearOperator, Solution


@dataclasses.dataclass(frozen=True, repr=False)
class Unroll(AbstractEstimator):
    """The derivative of the last `steps` optimizer steps, instead of that of an optimum.

    With ``theta_{t+1} = U(theta_t, dg/dtheta(theta_t, lambda), ...)`` and U the step of the problem's own optimizer
    (momentum, second moments, weight decay, the learning rates it had), a cotangent of the last theta is sent back
    step by step to lambda (Maclaurin, Duvenaud and Adams 2015, arXiv 1502.03492; truncated: Shaban et al. 2019, arXiv
    1810.10667). It assumes nothing about convergence. Steps are made again from checkpoints, so memory is that of about
    ``2 sqrt(steps)`` copies of parameters and optimizer state; a step costs three times a forward and backward, one
    Hessian product and one mixed product.

    Parameters that changed within the unrolled steps count as one: the result is the derivative with respect to moving
    all their values alike. What the optimizer was given besides the gradient of the problem's own loss (at a middle
    level, the indirect gradient) is held constant.

    Attributes:
        steps: How many of the last steps are differentiated; fewer if fewer have been made.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_count("Unroll", "steps", self.steps)

    @property
    def unrolled_steps(self) -> int | None:  # type: ignore[override]
        """The number of steps."""
        return self.steps

    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Never called: there is no system to solve."""
        raise AssertionError("Unroll solves no system")

    def max_hvps(self, size: int) -> int:
        """One product per step."""
        return self.steps
