"""Low-rank approximation of a symmetric operator from a few of its columns, and solves with it."""

from __future__ import annotations

import dataclasses

import torch

from mlopt import ops
from mlopt.linalg.operator import AbstractLinearOperator
from mlopt.linalg.solution import Outcome, Solution


@dataclasses.dataclass(frozen=True)
class NystromApproximation:
    """``A ~ U diag(eigenvalues) U^T`` with orthonormal U, eigenvalues falling.

    Attributes:
        basis: U, [N, r].
        eigenvalues: [r]; those of A's approximation, of either sign.
    """

    basis: torch.Tensor
    eigenvalues: torch.Tensor

    def inverse(self, b: torch.Tensor, damping: float) -> torch.Tensor:
        """Return ``(U diag(eigenvalues) U^T + damping I)^-1 b`` for b [N] or [K, N]."""
        inside = b @ self.basis
        return (b - inside @ self.basis.T) / damping + (inside / (self.eigenvalues + damping)) @ self.basis.T

    def precondition(self, b: torch.Tensor, damping: float) -> torch.Tensor:
        """Apply the preconditioner of Frangella, Tropp and Udell (2021, arXiv 2110.02820, eq. 1.3) to b [N] or [K, N].

        ``P^-1 = (l_r + damping) U (L + damping)^-1 U^T + (I - U U^T)`` with L the eigenvalues clipped at 0 and l_r
        the smallest: symmetric positive definite for any A.
        """
        clipped = self.eigenvalues.clamp_min(0)
        inside = b @ self.basis
        scaled = inside * ((clipped.min() + damping) / (clipped + damping))
        return b + (scaled - inside) @ self.basis.T


def nystrom_approximation(operator: AbstractLinearOperator, rank: int, *, seed: int = 0) -> NystromApproximation:
    """Approximate a symmetric operator: ``A ~ (A Q) (Q^T A Q)^+ (A Q)^T`` with Q [N, rank] random and orthonormal.

    Costs `rank` products with A, made at once. Exact for rank N or if A has no larger rank. A Gaussian sketch is used
    where Hataya and Yamada (2023, arXiv 2302.09726) take columns of A: same cost, and no column that the loss happens
    not to depend on spoils it. A may be indefinite.

    Args:
        operator: A, acting on vectors of N elements, without blocks.
        rank: Number of products; at most N of them are made.
        seed: Of the sketch: the same A gives the same bits.

    Returns:
        The approximation, of rank at most `rank`.

    Raises:
        ValueError: The operator has blocks.
    """
    if operator.blocks is not None:
        raise ValueError(
            "nystrom_approximation: expected an operator without blocks; use cg or dense for problems with tasks"
        )
    rank = min(rank, operator.size)
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(operator.size, rank, generator=generator, dtype=torch.float64)
    sketch = torch.linalg.qr(sketch).Q.to(operator.dtype).to(operator.device)
    columns = operator.mm(sketch.T.contiguous()).T  # A Q
    if not bool(torch.isfinite(columns).all()):
        return NystromApproximation(sketch, torch.full((rank,), float("nan"), device=sketch.device))
    basis, triangle = torch.linalg.qr(columns)  # A Q = U R
    core = sketch.T @ columns
    core = (core + core.T) / 2
    # Directions of the sketch that A maps to almost nothing would be divided by almost nothing.
    values, vectors = torch.linalg.eigh(core.double())
    kept = values.abs() > values.abs().max() * rank * torch.finfo(operator.dtype).eps
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T
    small = triangle.double() @ inverse @ triangle.double().T
    eigenvalues, rotation = torch.linalg.eigh((small + small.T) / 2)
    order = torch.argsort(eigenvalues, descending=True)
    return NystromApproximation(basis @ rotation[:, order].to(basis.dtype), eigenvalues[order].to(basis.dtype))


def nystrom(operator: AbstractLinearOperator, b: torch.Tensor, *, rank: int, damping: float, seed: int = 0) -> Solution:
    """Approximate ``(A + damping I)^-1 b`` by the Woodbury identity on a Nystrom approximation of A.

    Hataya and Yamada 2023, arXiv 2302.09726, section 3.

    Args:
        operator: A, acting on vectors of N elements, without blocks.
        b: Right-hand side [N], or K of them as [K, N].
        rank: Number of products with A.
        damping: Positive: outside of the sketched space it is all there is.
        seed: Of the sketch.

    Returns:
        The approximation; its residual is not known (NaN). `SINGULAR` where ``damping`` cancels an eigenvalue.
    """
    approximation = nystrom_approximation(operator, rank, seed=seed)
    value = approximation.inverse(b, damping)
    size = ops.norm(value)
    shifted = (approximation.eigenvalues + damping).abs().min() if rank else torch.ones((), device=b.device)
    cancelled = shifted <= operator.size * torch.finfo(b.dtype).eps * approximation.eigenvalues.abs().max().clamp_min(
        damping
    )
    outcomes = torch.where(torch.isfinite(size), int(Outcome.CONVERGED), int(Outcome.NON_FINITE))
    outcomes = torch.where(cancelled, int(Outcome.SINGULAR), outcomes)
    return Solution(value, outcomes, torch.zeros_like(outcomes), torch.full_like(size, float("nan")))
