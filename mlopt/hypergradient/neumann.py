"""Truncated Neumann series of the inverse Hessian."""

from __future__ import annotations

import dataclasses

import torch

from mlopt.hypergradient.base import AbstractEstimator, check_count, check_curvature, check_number
from mlopt.linalg import AbstractLinearOperator, Solution, neumann


@dataclasses.dataclass(frozen=True, repr=False)
class Neumann(AbstractEstimator):
    """``q = scale * sum_{k=0}^{K-1} (I - scale H)^k v`` (Lorraine, Vicol and Duvenaud 2020, arXiv 1911.02590).

    Attributes:
        num_terms: K, the exact number of terms summed; K = 1 gives ``scale * v`` and costs no Hessian product.
        scale: Converges to ``H^-1 v`` if ``0 < scale < 2 / (largest eigenvalue of H)`` and H is positive definite.
        curvature: ``"hessian"``, or ``"ggn"`` for the generalized Gauss-Newton matrix in place of H; see `CG`.
    """

    num_terms: int = 10
    scale: float = 0.1
    curvature: str = "hessian"

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_count("Neumann", "num_terms", self.num_terms)
        check_number("Neumann", "scale", self.scale, positive=True)
        check_curvature("Neumann", self.curvature)

    @property
    def uses_hvp(self) -> bool:  # type: ignore[override]
        """One term needs no product."""
        return self.num_terms > 1

    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Sum the series; see `mlopt.linalg.neumann`."""
        return neumann(operator, cotangent, num_terms=self.num_terms, scale=self.scale)

    def max_hvps(self, size: int) -> int:
        """Every term but the first costs one product."""
        return self.num_terms - 1
