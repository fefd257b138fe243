"""Conjugate gradients."""

from __future__ import annotations

import torch

from mlopt import ops
from mlopt.linalg.operator import AbstractLinearOperator
from mlopt.linalg.solution import Outcome, Solution
def cg(operator, b, *, x0=None, max_steps=100, rtol=1e-6, atol=0.0, check_every=1):
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    r = b.clone() if x0 is None else b - operator.mv(x)
    p = r.clone()
    rr = ops.dot(r, r); tol2 = (rtol * ops.norm(b)) ** 2
    n = 0; st = Outcome.CONVERGED if rr <= tol2 else Outcome.MAX_STEPS
    while n < max_steps and rr > tol2:
        ap = operator.mv(p); pap = ops.dot(p, ap)
        if pap <= 0: st = Outcome.BREAKDOWN; break
        a = rr / pap; x += a * p; r -= a * ap; new = ops.dot(r, r); p = r + (new / rr) * p; rr = new; n += 1
        if rr <= tol2: st = Outcome.CONVERGED
    return Solution(x, torch.tensor(int(st)), torch.tensor(n), rr.sqrt() / ops.norm(b))
