"""Family `matmul`: products of two small matrices on the CPU.

General libraries take several times as long for them as the arithmetic does. The kernel is single-threaded, reads
operands of any strides, and sums in a fixed order, so the bits repeat; other instruction sets give other last bits. It
takes float32 and float64; everything else, and larger matrices, run by torch. Not differentiable, as the family
`vector`.
"""

from __future__ import annotations

import torch

from mlopt.ops import library
from mlopt.ops.reference import matmul as reference

__all__ = ["small_mm"]

# kSmallMatmulDim and kSmallMatmulProducts of csrc/matmul/matmul.h
MAX_DIM = 1024
MAX_PRODUCTS = 1 << 20


def small_mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b``, or ``a @ b + bias`` with the bias added to every row.

    Args:
        a: [M, K].
        b: [K, N].
        bias: [N].

    Returns:
        A new tensor [M, N].

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or an input requires a gradient.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"small_mm: expected [M, K] and [K, N], got {tuple(a.shape)} and {tuple(b.shape)}")
    if bias is not None and bias.shape != b.shape[1:]:
        raise ValueError(f"small_mm: expected bias of shape {tuple(b.shape[1:])}, got {tuple(bias.shape)}")
    for name, tensor in (("a", a), ("b", b), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != a.dtype or tensor.device != a.device:
            raise ValueError(
                f"small_mm: expected {name} like a ({a.dtype}, {a.device}), got ({tensor.dtype}, {tensor.device})"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"small_mm: not differentiable, but {name} requires a gradient; call it under torch.no_grad() or on "
                "detached tensors"
            )
    native = a.device.type == "cpu" and library.has_kernels(a.device, a.dtype)
    return torch.ops.mlopt.small_mm(a, b, bias) if native else reference.small_mm(a, b, bias)
