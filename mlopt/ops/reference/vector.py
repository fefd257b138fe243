"""Reference of the family `vector`; documented at `mlopt.ops.vector`."""

from __future__ import annotations

import torch

from mlopt.ops.state import CgState
from mlopt.precision import wide_dtype


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row-wise ``a . b``."""
    return (_wide(a) * _wide(b)).sum(-1)


def norm(a: torch.Tensor) -> torch.Tensor:
    """Row-wise Euclidean norm."""
    return dot(a, a).sqrt()


def cg_step_(x: torch.Tensor, r: torch.Tensor, p: torch.Tensor, ap: torch.Tensor, state: torch.Tensor) -> None:
    """One step of conjugate gradients on every running row."""
    columns = CgState(state)
    pap = dot(p, ap)
    running = columns.status == CgState.RUNNING
    finite = torch.isfinite(pap) & torch.isfinite(columns.rr)
    steps = running & finite & (pap > 0)
    one = torch.ones_like(pap)
    alpha = torch.where(steps, columns.rr / torch.where(steps, pap, one), 0)
    moved = steps[..., None]
    x.copy_(torch.where(moved, x + alpha[..., None].to(x.dtype) * p, x))
    r.copy_(torch.where(moved, r - alpha[..., None].to(r.dtype) * ap, r))
    rr = dot(r, r)
    beta = rr / torch.where(steps, columns.rr, one)
    p.copy_(torch.where(moved, r + beta[..., None].to(p.dtype) * p, p))
    columns.pap.copy_(torch.where(running, pap, columns.pap))
    columns.num_steps.add_(steps)
    columns.rr.copy_(torch.where(steps, rr, columns.rr))
    status = columns.status.clone()
    status[running & ~finite] = CgState.NON_FINITE
    status[running & finite & ~steps] = CgState.BREAKDOWN
    status[steps & (rr <= columns.tolerance2)] = CgState.CONVERGED
    status[steps & ~torch.isfinite(rr)] = CgState.NON_FINITE
    columns.status.copy_(status)


def neumann_step_(v: torch.Tensor, acc: torch.Tensor, av: torch.Tensor, scale: float) -> None:
    """``v -= scale av; acc += v``."""
    v.sub_(av * scale)
    acc.add_(v)


def perturb(x: torch.Tensor, direction: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``x + step direction``."""
    return (_wide(x) + step[..., None] * _wide(direction)).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(wide_dtype(x.dtype))
