"""Reference of the family `glm`; documented at `mlopt.ops.glm`. Works on any device and floating dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mlopt.ops.reference import vector
from mlopt.ops.state import CgState

_Optional = torch.Tensor | None


def glm_matmul(x: torch.Tensor, w: torch.Tensor, bias: _Optional) -> torch.Tensor:
    """``X W + bias``."""
    z = torch.matmul(_over_rhs(x, w).to(w.dtype), w)
    return z if bias is None else z + bias.unsqueeze(-2)


def glm_matmul_t(x: torch.Tensor, r: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``X^T R`` and the column sums of R."""
    return torch.matmul(_over_rhs(x, r).to(r.dtype).mT, r), r.sum(-2) if bias else r.new_empty(0)


def glm_hvp(
    x: torch.Tensor,
    v: torch.Tensor,
    v_bias: _Optional,
    kind: str,
    curvature: torch.Tensor,
    weights: _Optional,
    reg: _Optional,
    reg_bias: _Optional,
    damping: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``X^T f(X V) + reg V + damping V``."""
    u = glm_matmul(x, v, v_bias)
    if kind == "softmax":
        p = _over_rhs(curvature, u)
        u = p * (u - (p * u).sum(-1, keepdim=True))
    elif kind == "rank_one":
        a, b, g = (_over_rhs(part, u) for part in curvature.unbind(-2))
        u = a * u + b * (g * u).sum(-1, keepdim=True)
    elif kind == "block":
        block = curvature.unsqueeze(-4) if v.ndim > x.ndim else curvature
        u = (block @ u.unsqueeze(-1)).squeeze(-1)
    else:
        per_row = curvature.ndim == x.ndim - 1
        u = _over_rhs(curvature.unsqueeze(-1) if per_row else curvature, u) * u
    if weights is not None:
        u = _over_rhs(weights.unsqueeze(-1), u) * u
    hv, hv_bias = glm_matmul_t(x, u, v_bias is not None)
    hv = hv + damping * v if reg is None else hv + (_over_rhs(reg, v) + damping) * v
    if v_bias is not None:
        factor = damping if reg_bias is None else _over_rhs(reg_bias.unsqueeze(-1), v)[..., 0] + damping
        hv_bias = hv_bias + factor * v_bias
    return hv, hv_bias


def glm_gradient(
    x: torch.Tensor, w: torch.Tensor, bias: _Optional, loss: str, targets: torch.Tensor, weights: _Optional
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, its gradients, and the probabilities of its rows."""
    z = glm_matmul(x, w, bias)
    if loss == "softmax":
        if targets.dtype == torch.int64:
            targets = F.one_hot(targets, z.shape[-1]).to(z.dtype)
        p = z.softmax(-1)
        losses = -(targets * z.log_softmax(-1)).sum(-1)
        residual = p * targets.sum(-1, keepdim=True) - targets
    else:
        p = z.sigmoid()
        losses = (F.softplus(z) - targets * z).sum(-1)
        residual = p - targets
    if weights is not None:
        losses, residual = weights * losses, weights.unsqueeze(-1) * residual
    dw, dbias = glm_matmul_t(x, residual, bias is not None)
    return losses.sum(-1), dw, dbias, p


def glm_cg(
    x: torch.Tensor,
    b: torch.Tensor,
    b_bias: _Optional,
    q0: _Optional,
    q0_bias: _Optional,
    kind: str,
    curvature: torch.Tensor,
    weights: _Optional,
    reg: _Optional,
    reg_bias: _Optional,
    damping: float,
    rtol: float,
    max_steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Conjugate gradients on the flattened pair (W, bias)."""

    def product(flat: torch.Tensor) -> torch.Tensor:
        v, v_bias = _unflatten(flat, b, b_bias)
        return _flatten(*glm_hvp(x, v, v_bias, kind, curvature, weights, reg, reg_bias, damping))

    r = _flatten(b, b_bias)
    q = torch.zeros_like(r)
    size2 = vector.dot(r, r)
    if q0 is not None:
        start = _flatten(q0, torch.zeros_like(b_bias) if b_bias is not None and q0_bias is None else q0_bias)
        residual = r - product(start)
        good = (vector.dot(residual, residual) <= size2)[..., None]
        q, r = torch.where(good, start, q), torch.where(good, residual, r)
    p = r.clone()
    state = CgState(torch.zeros((*size2.shape, CgState.NUM_COLUMNS), dtype=size2.dtype, device=size2.device))
    state.rr.copy_(vector.dot(r, r))
    state.tolerance2.copy_(size2 * rtol**2)
    state.status.copy_(state.rr <= state.tolerance2)
    for _ in range(max_steps):
        vector.cg_step_(q, r, p, product(p), state.tensor)
    return (*_unflatten_pair(q, b, b_bias), state.tensor)


def glm_neumann(
    x: torch.Tensor,
    b: torch.Tensor,
    b_bias: _Optional,
    kind: str,
    curvature: torch.Tensor,
    weights: _Optional,
    reg: _Optional,
    reg_bias: _Optional,
    damping: float,
    scale: float,
    num_terms: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``scale sum_{k < num_terms} (I - scale H)^k b``."""
    term = _flatten(b, b_bias)
    start, total = vector.norm(term), term.clone()
    for _ in range(num_terms - 1):
        v, v_bias = _unflatten(term, b, b_bias)
        product = _flatten(*glm_hvp(x, v, v_bias, kind, curvature, weights, reg, reg_bias, damping))
        term = term - scale * product
        total = total + term
    ratio = torch.where(start > 0, vector.norm(term) / start, 0)
    return (*_unflatten_pair(scale * total, b, b_bias), ratio)


def glm_gd(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: _Optional,
    velocity: _Optional,
    velocity_bias: _Optional,
    loss: str,
    targets: torch.Tensor,
    weights: _Optional,
    reg: _Optional,
    reg_bias: _Optional,
    lr: float,
    momentum: float,
    num_steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient descent with momentum."""
    w = w.clone()
    moving = torch.zeros_like(w) if velocity is None else velocity.clone()
    none = w.new_empty(0)
    b = none if bias is None else bias.clone()
    moving_bias = torch.zeros_like(b) if velocity_bias is None or bias is None else velocity_bias.clone()
    losses = w.new_empty((num_steps, *x.shape[:-2]))
    for k in range(num_steps):
        value, dw, db, _ = glm_gradient(x, w, None if bias is None else b, loss, targets, weights)
        if reg is not None:
            value = value + (reg * w * w).sum((-2, -1)) / 2
            dw = dw + reg * w
        if bias is not None and reg_bias is not None:
            value = value + (reg_bias * b * b).sum(-1) / 2
            db = db + reg_bias * b
        losses[k] = value
        moving = momentum * moving + dw
        moving_bias = momentum * moving_bias + db
        w, b = w - lr * moving, b - lr * moving_bias
    return w, b, moving, moving_bias, losses


def _over_rhs(shared: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[T?, a, b] -> [T?, 1, a, b] where v has an axis of right-hand sides, which is the third from the end."""
    return shared.unsqueeze(-3) if v.ndim > shared.ndim else shared


def _flatten(v: torch.Tensor, v_bias: _Optional) -> torch.Tensor:
    flat = v.flatten(-2)
    return flat.clone() if v_bias is None else torch.cat([flat, v_bias], -1)


def _unflatten(flat: torch.Tensor, b: torch.Tensor, b_bias: _Optional) -> tuple[torch.Tensor, _Optional]:
    size = b.shape[-2] * b.shape[-1]
    return flat[..., :size].reshape(b.shape), None if b_bias is None else flat[..., size:]


def _unflatten_pair(flat: torch.Tensor, b: torch.Tensor, b_bias: _Optional) -> tuple[torch.Tensor, torch.Tensor]:
    v, v_bias = _unflatten(flat, b, b_bias)
    return v, flat.new_empty(0) if v_bias is None else v_bias
