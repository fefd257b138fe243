"""Evaluates a captured loss in the precision of its problem, and keeps fp16 derivatives in range.

With S the loss scale, what is differentiated is ``S g``. First derivatives are divided by S. A product ``H v`` is
linear in v, which has any length: the derivative of ``S dg/dtheta`` is taken along ``v / ||v||`` and multiplied by
``||v|| / S``. So no pass leaves the range of fp16 because v is long or short, and everything is undone in the dtype of
the parameters.

Without a loss scale the functions return what they are given, and graphs have no trace of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mlopt.capture.record import LossGraph
from mlopt.precision import autocast


def evaluate(loss: LossGraph, values: Sequence[torch.Tensor]) -> Sequence[Any]:
    """Return what ``loss.module`` returns, computed in the problem's precision."""
    with autocast(loss.precision, values[0].device):
        return loss.module(*values)


def scaled(loss: LossGraph, values: Sequence[torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    """Return the loss that is differentiated, in float32 or wider: a half type could not hold ``S g`` itself."""
    return value if loss.scale is None else value * values[loss.scale]


def unscaled(loss: LossGraph, values: Sequence[torch.Tensor], gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Return the derivative of the loss from that of the scaled one."""
    if loss.scale is None or gradient is None:
        return gradient
    return gradient * values[loss.scale].reciprocal()


def unit_length(loss: LossGraph, vector: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a vector of length 1 and the length it had; with no loss scale, the vector as it is and None."""
    if loss.scale is None:
        return vector, None
    norm = torch.linalg.vector_norm(vector)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    return vector / norm, norm
