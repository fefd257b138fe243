"""Direct solution of the materialized system."""

from __future__ import annotations

import torch

from mlopt import ops
from mlopt.linalg.operator import AbstractLinearOperator
from mlopt.linalg.solution import Outcome, Solution


def dense(operator: AbstractLinearOperator, b: torch.Tensor, *, chunk_size: int = 256) -> Solution:
    """Solve ``A x = b`` for symmetric A by materializing it: Cholesky, or eigenvalues where A is not positive definite.

    Costs N products with A and O(N^3) arithmetic; memory for [N, N], per block.

    Args:
        operator: A, acting on vectors of N elements.
        b: Right-hand side [N], K of them as [K, N], or one per block as [T, N].
        chunk_size: How many products with A are made at once.

    Returns:
        The solution with its true residual. An outcome is `SINGULAR` where A has no inverse; x is then the solution of
        least norm.
    """
    matrix = operator.as_matrix(chunk_size)
    matrix = (matrix + matrix.mT) / 2  # rounding makes products of a symmetric map slightly unsymmetric
    blocks = operator.blocks is not None
    columns = b[..., None] if blocks or b.ndim == 1 else b.T  # [T, N, 1], [N, 1] or [N, K]
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    rounding = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    definite = (failed == 0) & (pivots.amin(-1) > rounding * pivots.amax(-1))
    singular = torch.zeros_like(definite)
    if bool(definite.all()):
        x = torch.cholesky_solve(columns, factor)
    else:  # indefinite or singular: eigenvalues tell which
        values, vectors = torch.linalg.eigh(torch.nan_to_num(matrix))
        kept = values.abs() > rounding * values.abs().amax(-1, keepdim=True)
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1), 0)
        x = vectors @ (inverse[..., None] * (vectors.mT @ columns))
        singular = ~kept.all(-1)
    value = x[..., 0] if blocks or b.ndim == 1 else x.mT.contiguous()
    remainder = columns - matrix @ x
    residual = remainder[..., 0] if blocks or b.ndim == 1 else remainder.mT
    scale = ops.norm(b)
    relative = torch.where(scale > 0, ops.norm(residual.contiguous()) / torch.where(scale > 0, scale, 1), 0)
    outcomes = torch.where(singular, int(Outcome.SINGULAR), int(Outcome.CONVERGED)).expand(relative.shape)
    outcomes = torch.where(torch.isfinite(relative), outcomes, int(Outcome.NON_FINITE))
    return Solution(value, outcomes, torch.zeros_like(outcomes), relative)
