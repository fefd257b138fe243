"""Family `glm`: losses that read their parameters through ``Z = X W + 1 bias^T``.

Logistic and softmax regression, hyper-cleaning, linear heads. The curvature of ``sum_i s_i loss_i(z_i)`` in W is
``H V = X^T f(X V)`` with f acting on every row: ``f(u)_i = s_i d_i * u_i`` (kind ``"diagonal"``) or
``f(u)_i = s_i p_i * (u_i - p_i . u_i)`` (kind ``"softmax"``, p the probabilities), or, for losses in general,
``f(u)_i = s_i (a_i * u_i + b_i (g_i . u_i))`` (kind ``"rank_one"``) and ``f(u)_i = s_i B_i u_i`` (kind ``"block"``).
Every product reads X once, and whole solves are one call.

Shapes: X is [n, D], or [T, n, D] for T independent tasks. Parameters are [D, C] with a bias [C], after a leading [T] if
X has one; right-hand sides of solves may be several, [K, D, C] or [T, K, D, C]. A bias behaves as one more feature that
is always 1. X may be of a half type; everything else is then float32, and so are all sums. The native kernels take
C <= 32 on the CPU and on CUDA (which reads the halves themselves; on the CPU X is widened once per call), everything
else runs by the reference. Sums have a fixed order, so the bits repeat, for every number of threads; other instruction
sets give other last bits. Like the family `vector` these are internals of solvers, not differentiable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from mlopt.ops import library
from mlopt.ops.reference import glm as reference
from mlopt.precision import wide_dtype

__all__ = [
    "GlmDescent",
    "GlmGradient",
    "GlmSeries",
    "GlmSolve",
    "glm_cg",
    "glm_gd",
    "glm_gradient",
    "glm_hvp",
    "glm_matmul",
    "glm_matmul_t",
    "glm_neumann",
]

MAX_CLASSES = 32  # kGlmMaxClasses of csrc/glm/glm.h

_Optional = torch.Tensor | None


class GlmGradient(NamedTuple):
    """Loss, gradients and row probabilities."""

    loss: torch.Tensor  # [T?]
    dw: torch.Tensor  # like w
    dbias: torch.Tensor | None  # like bias
    probabilities: torch.Tensor  # [T?, n, C]


class GlmSolve(NamedTuple):
    """Solution of a linear system and the state of its solver, see `mlopt.ops.CgState`."""

    q: torch.Tensor  # like b
    q_bias: torch.Tensor | None  # like b_bias
    state: torch.Tensor  # [T?, K?, 5]


class GlmSeries(NamedTuple):
    """Sum of a Neumann series; ``ratio`` is the norm of its last term over that of its first."""

    q: torch.Tensor  # like b
    q_bias: torch.Tensor | None  # like b_bias
    ratio: torch.Tensor  # [T?, K?]


class GlmDescent(NamedTuple):
    """Parameters and momentum after gradient descent; losses before each step."""

    w: torch.Tensor
    bias: torch.Tensor | None
    velocity: torch.Tensor
    velocity_bias: torch.Tensor | None
    losses: torch.Tensor  # [num_steps, T?]


def glm_matmul(x: torch.Tensor, w: torch.Tensor, bias: _Optional = None) -> torch.Tensor:
    """Skinny product ``X W + bias``.

    Args:
        x: [T?, n, D].
        w: [T?, K?, D, C].
        bias: [T?, K?, C].

    Returns:
        [T?, K?, n, C].

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or an input requires a gradient.
    """
    sizes = _sizes("glm_matmul", x, w, "w")
    sizes.check(w=w).check(bias=bias, shape=sizes.biases)
    return _call(sizes, "glm_matmul", x, w, bias)


def glm_matmul_t(x: torch.Tensor, r: torch.Tensor, *, bias: bool = False) -> tuple[torch.Tensor, _Optional]:
    """Skinny product ``X^T R`` and, for a bias, the column sums of R.

    Args:
        x: [T?, n, D].
        r: [T?, K?, n, C].
        bias: Whether the sums are wanted.

    Returns:
        [T?, K?, D, C] and [T?, K?, C] or None.

    Raises:
        ValueError: See `glm_matmul`.
    """
    sizes = _sizes("glm_matmul_t", x, r, "r", rows=True)
    sizes.check(r=r)
    return _with_bias(_call(sizes, "glm_matmul_t", x, r, bias), bias)


def glm_hvp(
    x: torch.Tensor,
    v: torch.Tensor,
    v_bias: _Optional = None,
    *,
    kind: str,
    curvature: torch.Tensor,
    weights: _Optional = None,
    reg: _Optional = None,
    reg_bias: _Optional = None,
) -> tuple[torch.Tensor, _Optional]:
    """Curvature-vector product ``X^T f(X V + 1 v_bias^T) + reg * V``.

    Args:
        x: [T?, n, D].
        v: [T?, K?, D, C].
        v_bias: [T?, K?, C], for a model with a bias.
        kind: ``"diagonal"``, ``"softmax"``, ``"rank_one"`` or ``"block"``, see the top of this module.
        curvature: d, [T?, n] or [T?, n, C]; p, [T?, n, C]; (a, b, g), [T?, n, 3, C]; or B, [T?, n, C, C].
        weights: s, [T?, n]; 1 by default.
        reg: Curvature of a separable regularizer: [], [T], [D, C] or [T, D, C]; 0 by default.
        reg_bias: The same for the bias: [], [T], [C] or [T, C].

    Returns:
        Like `v`, and like `v_bias` or None.

    Raises:
        ValueError: See `glm_matmul`.
    """
    sizes = _sizes("glm_hvp", x, v, "v")
    sizes.check(v=v).check(v_bias=v_bias, shape=sizes.biases)
    arguments = _curvature(sizes, kind, curvature, weights, reg, reg_bias)
    return _with_bias(_call(sizes, "glm_hvp", x, v, v_bias, *arguments), v_bias is not None)


def glm_gradient(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: _Optional = None,
    *,
    loss: str,
    targets: torch.Tensor,
    weights: _Optional = None,
) -> GlmGradient:
    """Loss ``sum_i s_i loss_i(z_i)`` and its gradients, in one read of X.

    Args:
        x: [T?, n, D].
        w: [T?, D, C].
        bias: [T?, C].
        loss: ``"softmax"`` (cross entropy) or ``"logistic"`` (binary cross entropy with logits, summed over C).
        targets: Labels [T?, n] (int64, softmax only), or [T?, n, C] probabilities or real targets. A label out of range
            is an error on the CPU and makes NaN elsewhere.
        weights: s, [T?, n]; 1 by default (put the ``1 / n`` of a mean here).

    Returns:
        Loss [T?], gradients, and the probabilities that `glm_hvp` takes (softmax of z, or its sigmoid).

    Raises:
        ValueError: See `glm_matmul`.
    """
    sizes = _sizes("glm_gradient", x, w, "w", several=False)
    sizes.check(w=w).check(bias=bias, shape=sizes.biases)
    arguments = _loss(sizes, loss, targets, weights)
    value, dw, dbias, probabilities = _call(sizes, "glm_gradient", x, w, bias, *arguments)
    return GlmGradient(value, dw, dbias if bias is not None else None, probabilities)


def glm_cg(
    x: torch.Tensor,
    b: torch.Tensor,
    b_bias: _Optional = None,
    *,
    q0: _Optional = None,
    q0_bias: _Optional = None,
    kind: str,
    curvature: torch.Tensor,
    weights: _Optional = None,
    reg: _Optional = None,
    reg_bias: _Optional = None,
    damping: float = 0.0,
    rtol: float = 1e-6,
    max_steps: int = 100,
) -> GlmSolve:
    """Solve ``(H + damping I) q = b`` by conjugate gradients, H as in `glm_hvp`.

    The semantics are those of `mlopt.linalg.cg`: every right-hand side of every task stops by itself, at
    ``||residual|| <= rtol ||b||``, at a breakdown (``p . Hp <= 0``; the iterate before it is returned), or at a
    non-finite number. A bias belongs to the same system: norms and dot products are over (W, bias).

    Args:
        x: [T?, n, D].
        b: [T?, K?, D, C].
        b_bias: [T?, K?, C].
        q0: First guess like `b`; where its residual is larger than b, zero is used.
        q0_bias: The same for the bias; 0 by default.
        kind: See `glm_hvp`, like all until `reg_bias`.
        curvature: See `glm_hvp`.
        weights: See `glm_hvp`.
        reg: See `glm_hvp`.
        reg_bias: See `glm_hvp`.
        damping: Added to the diagonal, also for the bias.
        rtol: Relative tolerance.
        max_steps: The most steps.

    Returns:
        The solution and the solver's state.

    Raises:
        ValueError: See `glm_matmul`.
    """
    sizes = _sizes("glm_cg", x, b, "b")
    sizes.check(b=b).check(b_bias=b_bias, q0_bias=q0_bias, shape=sizes.biases).check(q0=q0, shape=b.shape)
    if not rtol >= 0 or max_steps < 0:
        raise ValueError(f"glm_cg: expected rtol >= 0 and max_steps >= 0, got {rtol}, {max_steps}")
    if q0_bias is not None and (q0 is None or b_bias is None):
        raise ValueError("glm_cg: q0_bias was given without q0 and b_bias")
    arguments = _curvature(sizes, kind, curvature, weights, reg, reg_bias)
    q, q_bias, state = _call(sizes, "glm_cg", x, b, b_bias, q0, q0_bias, *arguments, damping, rtol, max_steps)
    return GlmSolve(q, q_bias if b_bias is not None else None, state)


def glm_neumann(
    x: torch.Tensor,
    b: torch.Tensor,
    b_bias: _Optional = None,
    *,
    kind: str,
    curvature: torch.Tensor,
    weights: _Optional = None,
    reg: _Optional = None,
    reg_bias: _Optional = None,
    damping: float = 0.0,
    scale: float,
    num_terms: int,
) -> GlmSeries:
    """Neumann series ``scale sum_{k=0}^{K-1} (I - scale (H + damping I))^k b``, exactly K = `num_terms` terms.

    Args:
        x: [T?, n, D].
        b: [T?, K?, D, C].
        b_bias: [T?, K?, C].
        kind: See `glm_hvp`, like all until `reg_bias`.
        curvature: See `glm_hvp`.
        weights: See `glm_hvp`.
        reg: See `glm_hvp`.
        reg_bias: See `glm_hvp`.
        damping: Added to the diagonal, also for the bias.
        scale: The step.
        num_terms: At least 1, which gives ``scale * b`` without a product.

    Returns:
        The sum, and how large its last term is.

    Raises:
        ValueError: See `glm_matmul`.
    """
    sizes = _sizes("glm_neumann", x, b, "b")
    sizes.check(b=b).check(b_bias=b_bias, shape=sizes.biases)
    if num_terms < 1:
        raise ValueError(f"glm_neumann: expected num_terms >= 1, got {num_terms}")
    arguments = _curvature(sizes, kind, curvature, weights, reg, reg_bias)
    q, q_bias, ratio = _call(sizes, "glm_neumann", x, b, b_bias, *arguments, damping, scale, num_terms)
    return GlmSeries(q, q_bias if b_bias is not None else None, ratio)


def glm_gd(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: _Optional = None,
    *,
    velocity: _Optional = None,
    velocity_bias: _Optional = None,
    loss: str,
    targets: torch.Tensor,
    weights: _Optional = None,
    reg: _Optional = None,
    reg_bias: _Optional = None,
    lr: float,
    momentum: float = 0.0,
    num_steps: int,
) -> GlmDescent:
    """Gradient descent on ``sum_i s_i loss_i(z_i) + sum_dc reg_dc w_dc^2 / 2``, as `torch.optim.SGD` does it.

    Each step: ``velocity = momentum velocity + gradient; w -= lr velocity``.

    Args:
        x: [T?, n, D].
        w: [T?, D, C].
        bias: [T?, C].
        velocity: Momentum so far, like `w`; 0 by default.
        velocity_bias: The same for the bias.
        loss: See `glm_gradient`, like `targets` and `weights`.
        targets: See `glm_gradient`.
        weights: See `glm_gradient`.
        reg: Weight decay: [], [T], [D, C] or [T, D, C]; 0 by default.
        reg_bias: The same for the bias: [], [T], [C] or [T, C].
        lr: The step.
        momentum: See above.
        num_steps: Steps to make.

    Returns:
        New parameters and momentum, and the loss before each step.

    Raises:
        ValueError: See `glm_matmul`.
    """
    sizes = _sizes("glm_gd", x, w, "w", several=False)
    sizes.check(w=w, velocity=velocity).check(bias=bias, velocity_bias=velocity_bias, shape=sizes.biases)
    if num_steps < 0:
        raise ValueError(f"glm_gd: expected num_steps >= 0, got {num_steps}")
    loss_arguments = _loss(sizes, loss, targets, weights)
    regularizer = _regularizer(sizes, reg, reg_bias)
    results = _call(
        sizes, "glm_gd", x, w, bias, velocity, velocity_bias, *loss_arguments, *regularizer, lr, momentum, num_steps
    )
    new_w, new_bias, new_velocity, new_velocity_bias, losses = results
    if bias is None:
        return GlmDescent(new_w, None, new_velocity, None, losses)
    return GlmDescent(new_w, new_bias, new_velocity, new_velocity_bias, losses)


class _Sizes(NamedTuple):
    """What a call's shapes follow from."""

    op: str
    x: torch.Tensor
    dtype: torch.dtype
    parameters: torch.Size  # [T?, K?, D, C], or [T?, K?, n, C] where rows are given
    several: bool

    @property
    def lead(self) -> tuple[int, ...]:
        return tuple(self.x.shape[:-2])

    @property
    def num_rows(self) -> int:
        return self.x.shape[-2]

    @property
    def num_classes(self) -> int:
        return self.parameters[-1]

    @property
    def biases(self) -> torch.Size:
        return torch.Size((*self.parameters[:-2], self.num_classes))

    def check(
        self,
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
        **tensors: torch.Tensor | None,
    ) -> _Sizes:
        shape = self.parameters if shape is None else shape
        dtype = dtype or self.dtype
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.shape != torch.Size(shape) or tensor.dtype != dtype or tensor.device != self.x.device:
                raise ValueError(
                    f"{self.op}: expected {name} of shape {tuple(shape)}, {dtype}, {self.x.device}, got "
                    f"({tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"
                )
            self.check_detached(name, tensor)
        return self

    def check_detached(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{self.op}: not differentiable, but {name} requires a gradient; call it under torch.no_grad() or on "
                "detached tensors"
            )


def _sizes(
    op: str, x: torch.Tensor, parameters: torch.Tensor, name: str, *, rows: bool = False, several: bool = True
) -> _Sizes:
    if x.ndim not in (2, 3) or not x.dtype.is_floating_point:
        raise ValueError(f"{op}: expected floating x [n, D] or [T, n, D], got {x.dtype} of shape {tuple(x.shape)}")
    dims = (x.ndim, x.ndim + 1) if several else (x.ndim,)
    dtype = wide_dtype(x.dtype)
    fits = (
        parameters.ndim in dims
        and parameters.shape[: x.ndim - 2] == x.shape[:-2]
        and parameters.shape[-2] == x.shape[-2 if rows else -1]
        and parameters.shape[-1] > 0
    )
    if not fits:
        lead = "T, " if x.ndim == 3 else ""
        middle = "n" if rows else "D"
        shapes = f"[{lead}{middle}, C]" + (f" or [{lead}K, {middle}, C]" if several else "")
        raise ValueError(
            f"{op}: expected {name} {shapes} to go with x of shape {tuple(x.shape)}, got {tuple(parameters.shape)}"
        )
    sizes = _Sizes(op, x, dtype, parameters.shape, parameters.ndim > x.ndim)
    sizes.check_detached("x", x)
    return sizes


def _curvature(
    sizes: _Sizes, kind: str, curvature: torch.Tensor, weights: _Optional, reg: _Optional, reg_bias: _Optional
) -> tuple[Any, ...]:
    rows = (*sizes.lead, sizes.num_rows)
    num_classes = sizes.num_classes
    tails = {"diagonal": (num_classes,), "softmax": (num_classes,), "rank_one": (3, num_classes)}
    tails["block"] = (num_classes, num_classes)
    if kind not in tails:
        raise ValueError(f"{sizes.op}: expected kind {', '.join(map(repr, tails))}, got {kind!r}")
    per_row = kind == "diagonal" and curvature.ndim == len(rows)
    sizes.check(curvature=curvature, shape=rows if per_row else (*rows, *tails[kind]))
    sizes.check(weights=weights, shape=rows)
    return kind, curvature, weights, *_regularizer(sizes, reg, reg_bias)


def _loss(sizes: _Sizes, loss: str, targets: torch.Tensor, weights: _Optional) -> tuple[Any, ...]:
    if loss not in ("softmax", "logistic"):
        raise ValueError(f'{sizes.op}: expected loss "softmax" or "logistic", got {loss!r}')
    rows = (*sizes.lead, sizes.num_rows)
    if loss == "softmax" and not targets.dtype.is_floating_point:
        sizes.check(targets=targets, shape=rows, dtype=torch.int64)
        if targets.device.type == "cpu" and targets.numel() > 0:
            low, high = (int(bound) for bound in targets.aminmax())
            if low < 0 or high >= sizes.num_classes:
                raise ValueError(f"{sizes.op}: expected targets in 0..{sizes.num_classes - 1}, got {low}..{high}")
    else:
        if targets.ndim == len(rows) and sizes.num_classes == 1:
            targets = targets.unsqueeze(-1)
        sizes.check(targets=targets, shape=(*rows, sizes.num_classes))
    sizes.check(weights=weights, shape=rows)
    return loss, targets, weights


def _regularizer(sizes: _Sizes, reg: _Optional, reg_bias: _Optional) -> tuple[_Optional, _Optional]:
    """Expand to [T?, D, C] and [T?, C]."""
    return (
        _expand(sizes, "reg", reg, (*sizes.lead, *sizes.parameters[-2:]), 2),
        _expand(sizes, "reg_bias", reg_bias, (*sizes.lead, sizes.num_classes), 1),
    )


def _expand(sizes: _Sizes, name: str, value: _Optional, shape: tuple[int, ...], own: int) -> _Optional:
    if value is None:
        return None
    allowed = {(), sizes.lead, shape[-own:], shape}
    if tuple(value.shape) not in allowed or value.dtype != sizes.dtype or value.device != sizes.x.device:
        shapes = " or ".join(str(s) for s in sorted(allowed, key=lambda s: (len(s), s)))
        raise ValueError(
            f"{sizes.op}: expected {name} of shape {shapes}, {sizes.dtype}, {sizes.x.device}, got "
            f"({tuple(value.shape)}, {value.dtype}, {value.device})"
        )
    sizes.check_detached(name, value)
    if tuple(value.shape) == sizes.lead:  # also []
        value = value.reshape(*sizes.lead, *[1] * own)
    return value.expand(shape)


def _with_bias(results: tuple[torch.Tensor, torch.Tensor], bias: bool) -> tuple[torch.Tensor, _Optional]:
    return results[0], results[1] if bias else None


def _call(sizes: _Sizes, name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.mlopt if _native(sizes) else reference, name)(*arguments)


def _native(sizes: _Sizes) -> bool:
    return sizes.num_classes <= MAX_CLASSES and library.has_kernels(sizes.x.device, sizes.dtype)


def register_fakes() -> None:
    """Register shape functions of the native ops for fake tensors and tracing."""
    fake = torch.library.register_fake

    def like(bias: _Optional, v: torch.Tensor) -> torch.Tensor:
        return v.new_empty(0) if bias is None else v.new_empty(bias.shape)

    @fake("mlopt::glm_matmul")
    def _(x: torch.Tensor, w: torch.Tensor, bias: _Optional) -> torch.Tensor:
        return w.new_empty((*w.shape[:-2], x.shape[-2], w.shape[-1]))

    @fake("mlopt::glm_matmul_t")
    def _(x: torch.Tensor, r: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
        sums = (*r.shape[:-2], r.shape[-1]) if bias else (0,)
        return r.new_empty((*r.shape[:-2], x.shape[-1], r.shape[-1])), r.new_empty(sums)

    @fake("mlopt::glm_hvp")
    def _(x: torch.Tensor, v: torch.Tensor, v_bias: _Optional, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return v.new_empty(v.shape), like(v_bias, v)

    @fake("mlopt::glm_gradient")
    def _(x: torch.Tensor, w: torch.Tensor, bias: _Optional, *_: Any) -> tuple[torch.Tensor, ...]:
        lead = x.shape[:-2]
        return w.new_empty(lead), w.new_empty(w.shape), like(bias, w), w.new_empty((*x.shape[:-1], w.shape[-1]))

    @fake("mlopt::glm_cg")
    def _(x: torch.Tensor, b: torch.Tensor, b_bias: _Optional, *_: Any) -> tuple[torch.Tensor, ...]:
        return b.new_empty(b.shape), like(b_bias, b), b.new_empty((*b.shape[:-2], 5))

    @fake("mlopt::glm_neumann")
    def _(x: torch.Tensor, b: torch.Tensor, b_bias: _Optional, *_: Any) -> tuple[torch.Tensor, ...]:
        return b.new_empty(b.shape), like(b_bias, b), b.new_empty(b.shape[:-2])

    @fake("mlopt::glm_gd")
    def _(x: torch.Tensor, w: torch.Tensor, bias: _Optional, *others: Any) -> tuple[torch.Tensor, ...]:
        losses = w.new_empty((others[-1], *x.shape[:-2]))
        return w.new_empty(w.shape), like(bias, w), w.new_empty(w.shape), like(bias, w), losses


if library.available():
    register_fakes()
