"""Conjugate gradients on the lower problem's Hessian."""

from __future__ import annotations

import dataclasses

import torch

from mlopt.hypergradient.base import AbstractEstimator, check_count, check_curvature, check_number
from mlopt.linalg import AbstractLinearOperator, DampedOperator, Solution, cg


@dataclasses.dataclass(frozen=True)
class CG(AbstractEstimator):
    """Solve ``(H + damping I) q = v`` by conjugate gradients (Hestenes and Stiefel 1952).

    Attributes:
        max_steps: The most iterations; each costs one Hessian product.
        rtol: Stop when ``||r|| <= rtol ||v||``.
        damping: Added to the diagonal of H. Needed where H is indefinite, as it is for networks away from a minimum.
        warm_start: Start from the previous q of the same place in the program instead of zero.
        curvature: ``"hessian"``, or ``"ggn"`` to solve with the generalized Gauss-Newton matrix in place of H: positive
            semi-definite for losses that are convex functions of network outputs, and cheaper per product (Martens
            2020, arXiv 1412.1193). The mixed products stay exact.
    """

    max_steps: int = 20
    rtol: float = 1e-6
    damping: float = 0.0
    warm_start: bool = False
    curvature: str = "hessian"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_count("CG", "max_steps", self.max_steps)
        check_number("CG", "rtol", self.rtol, positive=False)
        check_number("CG", "damping", self.damping, positive=False)
        check_curvature("CG", self.curvature)

    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Solve for q; see `mlopt.linalg.cg`."""
        if self.damping:
            operator = DampedOperator(operator, self.damping)
        return cg(operator, cotangent, x0=guess, max_steps=self.max_steps, rtol=self.rtol)

    @property
    def max_hvps(self) -> int:
        """One product per step, and one for the residual of a warm start."""
        return self.max_steps + int(self.warm_start)
