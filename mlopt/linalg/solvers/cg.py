"""Conjugate gradients."""

from __future__ import annotations

import functools
import math

import torch

from mlopt import ops
from mlopt.linalg.native import run_cg
from mlopt.linalg.operator import AbstractLinearOperator
from mlopt.linalg.solution import Details, Outcome, Solution

_OUTCOMES = {
    ops.CgState.RUNNING: Outcome.MAX_STEPS,
    ops.CgState.CONVERGED: Outcome.CONVERGED,
    ops.CgState.BREAKDOWN: Outcome.BREAKDOWN,
    ops.CgState.NON_FINITE: Outcome.NON_FINITE,
}


def cg(
    operator: AbstractLinearOperator,
    b: torch.Tensor,
    *,
    x0: torch.Tensor | None = None,
    max_steps: int = 100,
    rtol: float = 1e-6,
    check_every: int | None = None,
) -> Solution:
    """Solve ``A x = b`` for symmetric positive definite A (Hestenes and Stiefel 1952).

    Stops at ``||b - A x|| <= rtol ||b||``. Every right-hand side stops by itself: a converged or broken-down row gets
    zero steps from then on. At a breakdown (``p . Ap <= 0``: A is not positive definite) the iterate before it is
    returned.

    Args:
        operator: A, acting on vectors of N elements.
        b: Right-hand side [N], or K of them as [K, N].
        x0: First guess like `b`. Where its residual is larger than b, zero is the better guess and is used.
        max_steps: The most steps; each costs one product with A.
        rtol: Relative tolerance.
        check_every: Steps between looks at whether all rows have stopped, each of which waits for the device.
            Default: 1 on the CPU, 8 elsewhere.

    Returns:
        The solution, residuals by recurrence.
    """
    if check_every is None:
        check_every = cg_check_every(b)
    start = None
    if x0 is not None:
        start = x0, b - (operator.mv(x0) if b.ndim == 1 else operator.mm(x0))
    if operator.native is not None and ops.is_native(b):
        x, state, scale = run_cg(operator.native, b, start, rtol, max_steps, check_every)
    else:
        x, state, scale = _run(operator, b, start, rtol, max_steps, check_every)
    return cg_solution(x, state, scale)


def cg_check_every(b: torch.Tensor) -> int:
    """Return how many steps there are between looks at whether a solve has ended, where nothing else is asked for."""
    return 1 if b.device.type == "cpu" else 8


def cg_solution(x: torch.Tensor, state: torch.Tensor, scale: torch.Tensor) -> Solution:
    """Return what a solve came to.

    Args:
        x: The value.
        state: See `mlopt.ops.CgState`.
        scale: ``||b||``.
    """
    if state.ndim == 1 and state.device.type == "cpu":
        # Numbers are at hand, and tensor operations would take longer than a step.
        rr, _, status, _, _ = state.tolist()
        outcome = _OUTCOMES[int(status)] if math.isfinite(rr) else Outcome.NON_FINITE
        return Solution.deferred(x, lambda: _details(state, scale), outcome)
    return Solution(x, *_details(state, scale))


def _run(
    operator: AbstractLinearOperator,
    b: torch.Tensor,
    start: tuple[torch.Tensor, torch.Tensor] | None,
    rtol: float,
    max_steps: int,
    check_every: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the steps where there is no native loop; `cg_solve` of csrc/runtime/solvers.cpp does the same.

    Returns:
        x, the state (see `mlopt.ops.CgState`) and ``||b||``.
    """
    apply = operator.mv if b.ndim == 1 else operator.mm
    scale = ops.norm(b)
    if start is None:
        x, r = torch.zeros_like(b), b.clone(memory_format=torch.contiguous_format)
    else:
        x, r = _best_start(*start, b, scale)
    p = r.clone()
    state = ops.cg_init(r, rtol * scale)
    columns = ops.CgState(state)
    for step in range(max_steps):
        if step % check_every == 0 and not bool((columns.status == ops.CgState.RUNNING).any()):
            break
        ops.cg_step_(x, r, p, apply(p), state)
    return x, state, scale


def _details(state: torch.Tensor, scale: torch.Tensor) -> Details:
    columns = ops.CgState(state)
    outcomes = _outcome_of_status(state.device)[columns.status.to(torch.int64)]
    # A residual that is not finite before the first step is never "at or below tolerance" and keeps running.
    outcomes = torch.where(torch.isfinite(columns.rr), outcomes, int(Outcome.NON_FINITE))
    relative = torch.where(scale > 0, columns.rr.sqrt() / torch.where(scale > 0, scale, 1), 0)
    return Details(outcomes, columns.num_steps.to(torch.int64), relative)


@functools.cache
def _outcome_of_status(device: torch.device) -> torch.Tensor:
    """Return the table from `CgState.status` to `Outcome`."""
    return torch.tensor([int(_OUTCOMES[status]) for status in range(len(_OUTCOMES))], device=device)


def _best_start(
    x0: torch.Tensor, residual: torch.Tensor, b: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    good = (ops.norm(residual) <= scale)[..., None]  # False for a residual that is not finite
    x = torch.where(good, x0, torch.zeros_like(x0)).contiguous()
    return x, torch.where(good, residual, b).contiguous()
