"""Reference of the family `matmul`; documented at `mlopt.ops.matmul`."""

from __future__ import annotations

import torch


def small_mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b``, or ``a @ b + bias``."""
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
