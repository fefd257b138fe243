"""The means that a gradient of a linear model may have, and how values are compared with formulas."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch

SATURATED = 80.0  # exp(-80) is nothing beside 1 in float32 and in float64, and exp(80) is a float32
FAR = 2.0**40  # so large that no target counts beside it
TOLERANCE = 1e-9  # of comparisons in float64, relative to the terms of each element
STATE_SIZES = (1.0, 1e3, 1e6)  # of the states that are drawn


class GlmFitKind(enum.Enum):
    """What the mean of a row u is."""

    LINEAR = "linear"  # u
    LOGISTIC = "logistic"  # the sigmoid of each element
    SOFTMAX = "softmax"

    @property
    def sizes(self) -> tuple[float, ...]:
        """Of the rows at which a gradient is compared: also where exponentials vanish, but none overflows."""
        return STATE_SIZES if self is GlmFitKind.LINEAR else (1.0, 15.0, 100.0, 250.0)

    @property
    def check_sizes(self) -> tuple[float, ...]:
        """The same for the comparison that is part of the tables: a wrong scale shows far away, a wrong target near."""
        return (1.0, FAR) if self is GlmFitKind.LINEAR else (1.0,)


def mean_of(kind: GlmFitKind, u: torch.Tensor) -> torch.Tensor:
    """Return the mean of rows u [n, C]."""
    if kind is GlmFitKind.LINEAR:
        return u
    return u.sigmoid() if kind is GlmFitKind.LOGISTIC else u.softmax(1)


def is_close(
    got: torch.Tensor, terms: Sequence[torch.Tensor], tolerance: float, slack: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Whether a value is the sum of some terms, up to a part of each element's own size, and something more."""
    allowed = tolerance * sum(t.abs() for t in terms) + slack
    floor = 1e-30 * allowed.max() if allowed.numel() else 0.0
    return ((got - sum(terms)).abs() <= allowed + floor).all()
