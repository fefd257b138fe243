"""Family `vector`: one-pass updates of iterative solvers on flat vectors.

Vectors are [N], or K of them as rows of [K, N]; per-row scalars are [] or [K], in the vectors' dtype (float32 for half
precision). The native kernels take float32 and float64 on the CPU and on CUDA; other dtypes run by the reference.
Scalars stay on the device, sums have a fixed order (same bits on every repeat and for every number of threads), and
inputs may have any strides except where they are written. These are internals of solvers, not differentiable: an input
that requires a gradient is refused while gradients are enabled.
"""

from __future__ import annotations

import torch

from mlopt.ops import library
from mlopt.ops.reference import vector as reference
from mlopt.ops.state import CgState

__all__ = ["CgState", "cg_init", "cg_step_", "dot", "neumann_step_", "norm", "perturb"]

_NATIVE_DTYPES = (torch.float32, torch.float64)


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row-wise inner product ``sum_i a_i b_i``.

    Args:
        a: [N] or [K, N].
        b: Like `a`.

    Returns:
        [] or [K].

    Raises:
        ValueError: Shapes, dtypes or devices differ, or an input requires a gradient.
    """
    _check("dot", a=a, b=b)
    return torch.ops.mlopt.dot(a, b) if _native(a) else reference.dot(a, b)


def norm(a: torch.Tensor) -> torch.Tensor:
    """Row-wise Euclidean norm ``sqrt(sum_i a_i^2)``.

    Args:
        a: [N] or [K, N].

    Returns:
        [] or [K].

    Raises:
        ValueError: The input has another number of dimensions or requires a gradient.
    """
    _check("norm", a=a)
    return torch.ops.mlopt.norm(a) if _native(a) else reference.norm(a)


def cg_init(r: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
    """Make the state for `cg_step_` at the start of a solve.

    Args:
        r: Initial residuals [N] or [K, N].
        tolerance: A row stops when ``||r|| <= tolerance``; [] or [K], in the dtype of per-row scalars.

    Returns:
        The state, see `CgState`: [5] or [K, 5]. Rows at or below their tolerance start as converged.

    Raises:
        ValueError: See `dot`.
    """
    rr = dot(r, r)
    state = CgState(torch.zeros((*rr.shape, CgState.NUM_COLUMNS), dtype=rr.dtype, device=rr.device))
    state.rr.copy_(rr)
    state.tolerance2.copy_(tolerance * tolerance)
    state.status.copy_(rr <= state.tolerance2)  # CONVERGED is 1
    return state.tensor


def cg_step_(x: torch.Tensor, r: torch.Tensor, p: torch.Tensor, ap: torch.Tensor, state: torch.Tensor) -> None:
    """One step of conjugate gradients on every running row, after the product ``ap = A p``.

    ``alpha = r.r / p.ap; x += alpha p; r -= alpha ap; p = r + (r.r new / r.r old) p``. A row whose ``p.ap`` is not
    positive is marked as broken down, one with a non-finite ``p.ap`` or ``r.r`` as non-finite; neither is changed, nor
    is any row that no longer runs.

    Args:
        x: Iterates [N] or [K, N], written; contiguous, as every written tensor.
        r: Residuals like `x`, written.
        p: Directions like `x`, written.
        ap: Products like `x`.
        state: From `cg_init`, written.

    Raises:
        ValueError: Shapes, dtypes or devices differ, a written tensor is not contiguous or shares memory with another,
            or an input requires a gradient.
    """
    _check("cg_step_", x=x, r=r, p=p, ap=ap)
    _check_written("cg_step_", {"x": x, "r": r, "p": p, "state": state}, {"ap": ap})
    if state.shape != (*x.shape[:-1], CgState.NUM_COLUMNS):
        raise ValueError(
            f"cg_step_: expected state of shape {(*x.shape[:-1], CgState.NUM_COLUMNS)} (from cg_init), got "
            f"{tuple(state.shape)}"
        )
    (torch.ops.mlopt.cg_step_ if _native(x) else reference.cg_step_)(x, r, p, ap, state)


def neumann_step_(v: torch.Tensor, acc: torch.Tensor, av: torch.Tensor, scale: float) -> None:
    """One term of a Neumann series: ``v -= scale av; acc += v``.

    Args:
        v: Terms [N] or [K, N], written.
        acc: Sums like `v`, written.
        av: ``A v``, like `v`.
        scale: The step.

    Raises:
        ValueError: See `cg_step_`.
    """
    _check("neumann_step_", v=v, acc=acc, av=av)
    _check_written("neumann_step_", {"v": v, "acc": acc}, {"av": av})
    (torch.ops.mlopt.neumann_step_ if _native(v) else reference.neumann_step_)(v, acc, av, scale)


def perturb(x: torch.Tensor, direction: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``x + step direction``, with the step on the device.

    Args:
        x: [N] or [K, N].
        direction: Like `x`.
        step: [] or [K], in the dtype of per-row scalars.

    Returns:
        A new tensor like `x`.

    Raises:
        ValueError: See `dot`, or `step` has another shape.
    """
    _check("perturb", x=x, direction=direction)
    if step.shape != x.shape[:-1]:
        raise ValueError(f"perturb: expected step of shape {tuple(x.shape[:-1])}, got {tuple(step.shape)}")
    return (torch.ops.mlopt.perturb if _native(x) else reference.perturb)(x, direction, step)


def _native(x: torch.Tensor) -> bool:
    if not library.available() or x.dtype not in _NATIVE_DTYPES:
        return False
    return x.device.type == "cpu" or (x.device.type == "cuda" and library.build_config()["cuda"] is not None)


def _check(op: str, **tensors: torch.Tensor) -> None:
    (first_name, first), *others = tensors.items()
    if first.ndim not in (1, 2) or not first.dtype.is_floating_point:
        raise ValueError(
            f"{op}: expected {first_name} to be floating vectors [N] or rows [K, N], got {first.dtype} of shape "
            f"{tuple(first.shape)}"
        )
    for name, tensor in others:
        if tensor.shape != first.shape or tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{op}: expected {name} like {first_name} ({tuple(first.shape)}, {first.dtype}, {first.device}), got "
                f"({tuple(tensor.shape)}, {tensor.dtype}, {tensor.device})"
            )
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        raise ValueError(f"{op}: not differentiable; call it under torch.no_grad() or on detached tensors")


def _check_written(op: str, written: dict[str, torch.Tensor], read: dict[str, torch.Tensor]) -> None:
    seen: dict[int, str] = {}
    for name, tensor in {**written, **read}.items():
        if name in written and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} is written and must be contiguous, got strides {tensor.stride()}")
        if tensor.numel() == 0:
            continue
        other = seen.setdefault(tensor.untyped_storage()._cdata, name)
        if other != name and _overlap(tensor, {**written, **read}[other]):
            raise ValueError(f"{op}: {name} and {other} share memory, and one of them is written; clone it")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    def span(t: torch.Tensor) -> tuple[int, int]:
        start = int(t.storage_offset())
        return start, start + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1
