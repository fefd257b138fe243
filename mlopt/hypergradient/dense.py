"""The Hessian as a matrix, for small lower problems."""

from __future__ import annotations

import dataclasses

import torch

from mlopt.hypergradient.base import AbstractEstimator, check_count, check_number
from mlopt.linalg import ROWS_AT_ONCE, AbstractLinearOperator, DampedOperator, Solution, dense


@dataclasses.dataclass(frozen=True, repr=False)
class Dense(AbstractEstimator):
    """Solve ``(H + damping I) q = v`` exactly: H from N batched Hessian products, then Cholesky or eigenvalues.

    For small lower problems and for checking other estimators: N products, O(N^3) arithmetic and N^2 numbers of memory
    per solve. H may be indefinite; where it is singular the solution of least norm is returned, and a warning says so.

    Attributes:
        damping: Added to the diagonal of H.
        max_size: The largest N accepted.
    """

    damping: float = 0.0
    max_size: int = 5000

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_number("Dense", "damping", self.damping, positive=False)
        check_count("Dense", "max_size", self.max_size)

    def check(self, problem: str, size: int) -> None:
        """Refuse a problem that is too large.

        Raises:
            ValueError: N is above `max_size`.
        """
        if size > self.max_size:
            raise ValueError(
                f"problem {problem!r}, argument `hypergradient`: {self!r} would make a matrix of [{size}, {size}] "
                f"({size**2 * 4 / 2**30:.1f} GiB in float32); use mlopt.CG or mlopt.Nystrom, or raise max_size"
            )

    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Solve for q; see `mlopt.linalg.dense`."""
        if self.damping:
            operator = DampedOperator(operator, self.damping)
        return dense(operator, cotangent)

    def hvps_at_once(self, size: int) -> int:
        """As many rows of the unit matrix as `AbstractLinearOperator.as_matrix` takes."""
        return min(ROWS_AT_ONCE, size)

    def max_hvps(self, size: int) -> int:
        """One product per parameter."""
        return size
