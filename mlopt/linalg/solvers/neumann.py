"""Truncated Neumann series."""

from __future__ import annotations

import torch

from mlopt import ops
from mlopt.linalg.native import run_neumann
from mlopt.linalg.operator import AbstractLinearOperator
from mlopt.linalg.solution import Outcome, Solution


def neumann(operator: AbstractLinearOperator, b: torch.Tensor, *, num_terms: int, scale: float) -> Solution:
    """Approximate ``A^-1 b`` by exactly `num_terms` terms of its Neumann series.

    ``x = scale * sum_{k=0}^{K-1} (I - scale A)^k b``; it tends to ``A^-1 b`` for symmetric positive definite A with
    ``scale < 2 / (largest eigenvalue)``.

    Args:
        operator: A, acting on vectors of N elements.
        b: Right-hand side [N], or K of them as [K, N].
        num_terms: Number of terms; 1 gives ``scale * b`` and makes no product with A.
        scale: See above.

    Returns:
        The sum. ``relative_residual`` is the size of the last term, ``||(I - scale A)^{K-1} b|| / ||b||``, and an
        outcome is `DIVERGING` where it is above 1, else `CONVERGED`. (The terms are also the residuals:
        ``b - A x_{K-1} = (I - scale A)^{K-1} b``.)
    """
    term = b.clone(memory_format=torch.contiguous_format)
    total = term.clone()
    if operator.native is not None and ops.is_native(term):
        run_neumann(operator.native, term, total, num_terms, scale)
    else:
        for _ in range(num_terms - 1):
            product = operator.mv(term) if term.ndim == 1 else operator.mm(term)
            ops.neumann_step_(term, total, product, scale)
    return neumann_solution(total.mul_(scale), term, b, num_terms)


def neumann_solution(x: torch.Tensor, term: torch.Tensor, b: torch.Tensor, num_terms: int) -> Solution:
    """Return what a series came to.

    Args:
        x: The value.
        term: The last term.
        b: The right-hand side.
        num_terms: Number of terms.
    """
    size, start = ops.norm(term), ops.norm(b)
    ratio = torch.where(start > 0, size / start, torch.zeros_like(size))
    outcomes = torch.where(ratio > 1, int(Outcome.DIVERGING), int(Outcome.CONVERGED))
    outcomes = torch.where(torch.isfinite(size), outcomes, int(Outcome.NON_FINITE))
    return Solution(x, outcomes, torch.full_like(outcomes, num_terms), ratio)
