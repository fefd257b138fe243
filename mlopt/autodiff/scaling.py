"""What is done to a gradient before the optimizer gets it."""

from __future__ import annotations

import torch


def scale_gradients(
    gradients: list[torch.Tensor | None], clip_norm: float | None, *, normalize: bool
) -> list[torch.Tensor | None]:
    """Clip gradients to a common norm, or scale them to it; nothing waits for the device."""
    present = [g for g in gradients if g is not None]
    if not present or (clip_norm is None and not normalize):
        return gradients
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in present]))
    target = 1.0 if clip_norm is None else clip_norm
    factor = target / torch.where(norm > 0, norm, 1)
    if not normalize:
        factor = factor.clamp(max=1)
    return [None if g is None else g * factor.to(g.dtype) for g in gradients]
