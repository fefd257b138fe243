"""Conjugate gradients with a preconditioner."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mlopt import ops
from mlopt.linalg.operator import AbstractLinearOperator
from mlopt.linalg.solution import Outcome, Solution


def preconditioned_cg(
    operator: AbstractLinearOperator,
    b: torch.Tensor,
    preconditioner: Callable[[torch.Tensor], torch.Tensor],
    *,
    x0: torch.Tensor | None = None,
    max_steps: int = 100,
    rtol: float = 1e-6,
) -> Solution:
    """Solve ``A x = b`` for symmetric positive definite A; see `mlopt.linalg.cg` for stopping, breakdown and guesses.

    Concus, Golub and O'Leary 1976; Saad 2003, algorithm 9.1. A separate loop, since the one-pass updates of the plain
    method take the residual itself for the preconditioned one.

    Args:
        operator: A, acting on vectors of N elements.
        b: Right-hand side [N], or K of them as [K, N].
        preconditioner: ``P^-1``, symmetric positive definite, on vectors like `b`.
        x0: First guess like `b`; zero is used where that is better.
        max_steps: The most steps; each costs one product with A.
        rtol: Stop at ``||b - A x|| <= rtol ||b||`` (the residual itself, not the preconditioned one).

    Returns:
        The solution, residuals by recurrence.
    """
    apply = operator.mv if b.ndim == 1 else operator.mm
    scale = ops.norm(b)
    x, r = torch.zeros_like(b), b.clone()
    if x0 is not None:
        residual = b - apply(x0)
        good = (ops.norm(residual) <= scale)[..., None]
        x, r = torch.where(good, x0, x), torch.where(good, residual, r)
    z = preconditioner(r)
    p, rz = z, ops.dot(r, z)
    zero = torch.zeros_like(rz, dtype=torch.int64)
    num_steps, broken = zero.clone(), torch.zeros_like(rz, dtype=torch.bool)
    finite = torch.isfinite(rz)
    running = finite & (ops.norm(r) > rtol * scale)
    for _ in range(max_steps):
        if not bool(running.any()):
            break
        ap = apply(p)
        pap = ops.dot(p, ap)
        finite &= torch.isfinite(pap) | ~running
        broken |= running & finite & (pap <= 0)
        running = running & finite & ~broken
        alpha = torch.where(running, rz / torch.where(running, pap, 1), 0)[..., None]
        x, r = x + alpha * p, r - alpha * ap
        num_steps += running
        z = preconditioner(r)
        following = ops.dot(r, z)
        beta = torch.where(running, following / torch.where(running, rz, 1), 0)[..., None]
        p, rz = z + beta * p, torch.where(running, following, rz)
        running = running & (ops.norm(r) > rtol * scale)
    size = ops.norm(r)
    relative = torch.where(scale > 0, size / torch.where(scale > 0, scale, 1), 0)
    outcomes = torch.where(size <= rtol * scale, int(Outcome.CONVERGED), int(Outcome.MAX_STEPS))
    outcomes = torch.where(broken, int(Outcome.BREAKDOWN), outcomes)
    outcomes = torch.where(finite & torch.isfinite(size), outcomes, int(Outcome.NON_FINITE))
    return Solution(x, outcomes, num_steps, relative)
