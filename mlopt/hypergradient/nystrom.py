"""A low-rank approximation of the Hessian."""

from __future__ import annotations

import dataclasses

import torch

from mlopt.hypergradient.base import AbstractEstimator, check_count, check_number
from mlopt.linalg import AbstractLinearOperator, NystromApproximation, Solution, nystrom, nystrom_approximation


@dataclasses.dataclass(frozen=True, repr=False)
class Nystrom(AbstractEstimator):
    """``q = (H_r + damping I)^-1 v`` with H_r a Nystrom approximation of H of rank r (Hataya and Yamada 2023).

    arXiv 2302.09726. Costs r Hessian products, made as one batch, and no iteration. Exact where H has rank r or less.
    Also a preconditioner: ``CG(preconditioner=Nystrom(rank, damping))``.

    Attributes:
        rank: r.
        damping: Positive: outside of the sketched space q is ``v / damping``.
        seed: Of the random sketch; the same state gives the same q.
    """

    rank: int = 10
    damping: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_count("Nystrom", "rank", self.rank)
        check_number("Nystrom", "damping", self.damping, positive=True)

    def approximate(self, operator: AbstractLinearOperator) -> NystromApproximation:
        """Sketch the operator."""
        return nystrom_approximation(operator, self.rank, seed=self.seed)

    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Solve for q; see `mlopt.linalg.nystrom`."""
        return nystrom(operator, cotangent, rank=self.rank, damping=self.damping, seed=self.seed)

    def hvps_at_once(self, size: int) -> int:
        """All of them."""
        return min(self.rank, size)

    def max_hvps(self, size: int) -> int:
        """One product per rank, at most N."""
        return min(self.rank, size)
