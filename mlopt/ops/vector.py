"""Family `vector`: one-pass updates of iterative solvers on flat vectors.

Vectors are [N], or K of them as rows of [K, N]; per-row scalars are [] or [K], in the vectors' dtype (float32 for half
precision). The native kernels take float32 and float64 on the CPU and on CUDA; other dtypes run by the reference.
Scalars stay on the device, sums have a fixed order (same bits on every repeat and for every number of threads), and
inputs may have any strides except where they are written. These are internals of solvers, not differentiable: an input
that requires a gradient is refused while gradients are enabled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlopt.ops import library
from mlopt.ops.reference import vector as reference
from mlopt.ops.state import CgState
from mlopt.precision import wide_dtype

__all__ = ["CgState", "cg_init", "cg_step_", "dot", "is_native", "neumann_step_", "norm", "perturb"]


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
    return torch.ops.mlopt.dot(a, b) if is_native(a) else reference.dot(a, b)


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
    return torch.ops.mlopt.norm(a) if is_native(a) else reference.norm(a)


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
    _check_scalars("cg_step_", "state", state, (*x.shape[:-1], CgState.NUM_COLUMNS), x)
    _check_written("cg_step_", {"x": x, "r": r, "p": p, "state": state}, {"ap": ap})
    (torch.ops.mlopt.cg_step_ if is_native(x) else reference.cg_step_)(x, r, p, ap, state)


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
    (torch.ops.mlopt.neumann_step_ if is_native(v) else reference.neumann_step_)(v, acc, av, scale)


def perturb(x: torch.Tensor, direction: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``x + step direction``, with the step on the device.

    Args:
        x: [N] or [K, N].
        direction: Like `x`.
        step: [] or [K], in the dtype of per-row scalars.

    Returns:
        A new tensor like `x`.

    Raises:
        ValueError: See `dot`, or `step` has another shape, dtype or device.
    """
    _check("perturb", x=x, direction=direction)
    _check_scalars("perturb", "step", step, x.shape[:-1], x)
    return (torch.ops.mlopt.perturb if is_native(x) else reference.perturb)(x, direction, step)


def is_native(x: torch.Tensor) -> bool:
    """Whether vectors like `x` run by the native kernels."""
    return library.has_kernels(x.device, x.dtype)


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
        _check_detached(op, name, tensor)
    _check_detached(op, first_name, first)


def _check_scalars(op: str, name: str, scalars: torch.Tensor, shape: Sequence[int], x: torch.Tensor) -> None:
    dtype = wide_dtype(x.dtype)
    if scalars.shape != torch.Size(shape) or scalars.dtype != dtype or scalars.device != x.device:
        raise ValueError(
            f"{op}: expected {name} of shape {tuple(shape)}, {dtype}, {x.device}, got "
            f"({tuple(scalars.shape)}, {scalars.dtype}, {scalars.device})"
        )
    _check_detached(op, name, scalars)


def _check_detached(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{op}: not differentiable, but {name} requires a gradient; call it under torch.no_grad() or on detached "
            "tensors"
        )


def _check_written(op: str, written: dict[str, torch.Tensor], read: dict[str, torch.Tensor]) -> None:
    for name, tensor in written.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} is written and must be contiguous, got strides {tensor.stride()}")
    memory = [(name, *_memory(tensor)) for name, tensor in {**written, **read}.items()]
    for k, (name, storage, begin, end) in enumerate(memory[: len(written)]):
        for other, other_storage, other_begin, other_end in memory[k + 1 :]:
            if storage == other_storage and begin < other_end and other_begin < end:
                raise ValueError(f"{op}: {other} and {name} share memory, and one of them is written; clone it")


def _memory(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Return the storage and the range of bytes in it that a tensor's elements lie in."""
    storage, size = tensor.untyped_storage()._cdata, tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    if tensor.numel() == 0:
        return storage, begin, begin
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return storage, begin, begin + (int(last) + 1) * size
