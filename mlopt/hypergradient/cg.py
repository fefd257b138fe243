"""Conjugate gradients on the lower problem's Hessian."""

from __future__ import annotations

import dataclasses

import torch

from mlopt.hypergradient.base import AbstractEstimator, check_count, check_curvature, check_number
from mlopt.hypergradient.nystrom import Nystrom
from mlopt.linalg import AbstractLinearOperator, DampedOperator, Solution, cg, preconditioned_cg


@dataclasses.dataclass(frozen=True, repr=False)
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
        preconditioner: A `mlopt.Nystrom` whose sketch of H preconditions the iteration (Frangella, Tropp and Udell
            2021, arXiv 2110.02820); its ``rank`` products pay where a few eigenvalues of H are much larger than the
            rest.
    """

    max_steps: int = 20
    rtol: float = 1e-6
    damping: float = 0.0
    warm_start: bool = False
    curvature: str = "hessian"
    preconditioner: Nystrom | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_count("CG", "max_steps", self.max_steps)
        check_number("CG", "rtol", self.rtol, positive=False)
        check_number("CG", "damping", self.damping, positive=False)
        check_curvature("CG", self.curvature)
        if self.preconditioner is not None and not isinstance(self.preconditioner, Nystrom):
            raise ValueError(
                f"CG, argument `preconditioner`: expected a mlopt.Nystrom or None, got {self.preconditioner!r}"
            )

    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Solve for q; see `mlopt.linalg.cg`."""
        if self.damping:
            operator = DampedOperator(operator, self.damping)
        if self.preconditioner is None:
            return cg(operator, cotangent, x0=guess, max_steps=self.max_steps, rtol=self.rtol)
        sketch, damping = self.preconditioner.approximate(operator), self.preconditioner.damping
        return preconditioned_cg(
            operator,
            cotangent,
            lambda r: sketch.precondition(r, damping),
            x0=guess,
            max_steps=self.max_steps,
            rtol=self.rtol,
        )

    def hvps_at_once(self, size: int) -> int:
        """Those of the preconditioner."""
        return 0 if self.preconditioner is None else self.preconditioner.hvps_at_once(size)

    def max_hvps(self, size: int) -> int:
        """One product per step, one for the residual of a warm start, and those of the preconditioner."""
        sketch = 0 if self.preconditioner is None else self.preconditioner.max_hvps(size)
        return self.max_steps + int(self.warm_start) + sketch
