"""Extreme eigenvalues of a symmetric operator."""

from __future__ import annotations

import torch

from mlopt import ops
from mlopt.linalg.operator import AbstractLinearOperator


def extreme_eigenvalues(
    operator: AbstractLinearOperator, *, num_steps: int = 30, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate the smallest and the largest eigenvalue by the Lanczos method (Lanczos 1950).

    With full reorthogonalization; exact after N steps. Estimates lie inside of the spectrum, so a negative smallest
    one proves that the operator is not positive semidefinite.

    Args:
        operator: Symmetric, acting on vectors of N elements; with T blocks the extremes are over all of them.
        num_steps: Products with the operator, at most N are made.
        seed: Of the random start.

    Returns:
        Smallest and largest eigenvalue, 0-d tensors in float64; NaN if a product is not finite.
    """
    shape = (operator.size,) if operator.blocks is None else (operator.blocks, operator.size)
    apply = operator.mv if operator.blocks is None else operator.mm
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator, dtype=torch.float64).to(operator.dtype).to(operator.device)
    basis = [start / ops.norm(start)[..., None]]
    diagonal: list[torch.Tensor] = []
    off: list[torch.Tensor] = []
    largest = torch.zeros_like(ops.norm(start))
    for _ in range(min(num_steps, operator.size)):
        w = apply(basis[-1])
        diagonal.append(ops.dot(basis[-1], w))
        for _ in range(2):  # once is not enough in float32
            for vector in basis:
                w = w - ops.dot(vector, w)[..., None] * vector
        size = ops.norm(w)
        largest = torch.maximum(largest, diagonal[-1].abs() + size)
        # Where the space is exhausted the next vector would be rounding; zero decouples the rest of the matrix.
        alive = size > operator.size * torch.finfo(operator.dtype).eps * largest
        off.append(torch.where(alive, size, 0))
        basis.append(torch.where(alive[..., None], w / torch.where(alive, size, 1)[..., None], 0))
    alpha, beta = torch.stack(diagonal, -1).double(), torch.stack(off, -1).double()[..., :-1]
    matrix = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    if not bool(torch.isfinite(matrix).all()):
        nan = torch.full((), float("nan"), dtype=torch.float64)
        return nan, nan
    values, vectors = torch.linalg.eigh(matrix)
    # Zero vectors of an exhausted space give eigenvalues that the operator need not have.
    weights = torch.stack([torch.ones_like(alpha[..., 0]), *torch.stack(off, -1)[..., :-1].double().unbind(-1)], -1)
    real = (vectors.square() * (weights.cumprod(-1) > 0)[..., None]).sum(-2) > 0.5
    infinity = torch.full_like(values, float("inf"))
    return torch.where(real, values, infinity).min(), torch.where(real, values, -infinity).max()
