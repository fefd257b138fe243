"""Computing a loss in half precision: which dtypes there are, autocast, and the scale that keeps gradients in range.

``Problem(precision="bf16")`` evaluates that problem's loss under `torch.autocast`: parameters, gradients, optimizer and
solver vectors keep the dtype of the parameters; matrix products and convolutions are computed in the half type. fp16
has 5 bits of exponent, so small gradients would become zero on their way; the loss is multiplied by a `LossScale`
before it is differentiated, and the result divided by it (Micikevicius et al. 2018, "Mixed precision training", arXiv
1710.03740).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

#: What `Problem.precision` may be, besides None -> the dtype that autocast computes in.
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what sums over numbers of a dtype are computed in: float32 for the half types, else the dtype."""
    return torch.float32 if dtype in PRECISIONS.values() else dtype


def autocast(precision: str | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which a problem's forward is evaluated; it does nothing for None.

    Casts of parameters are not kept: a captured graph has one of its own, and the reference is made like it.
    """
    if precision is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision], cache_enabled=False)


class LossScale:
    """The factor of an fp16 loss: halved when a gradient overflows, doubled after a long time without.

    The rule and its constants are those of `torch.amp.GradScaler`. Only powers of two occur, so scaling changes no
    digit, as long as nothing leaves the range of fp16.

    Args:
        device: Where the problem's parameters are.
        initial: First factor.
        growth_interval: Steps without overflow after which the factor is doubled.
        smallest: An overflow at this factor is not one of scaling, and the factor is not lowered any more.

    Attributes:
        value: The factor, a 0-d float32 tensor that is only written in place: compiled graphs read it.
        growth_interval: As given.
        smallest: As given.
        num_overflows: Steps left out so far.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        initial: float = 2.0**16,
        growth_interval: int = 2000,
        smallest: float = 2.0**-10,
    ) -> None:
        self.value = torch.tensor(initial, device=device)
        self.growth_interval = growth_interval
        self.smallest = smallest
        self.num_overflows = 0
        self._num_good = 0

    def grow(self) -> None:
        """Count a step without overflow."""
        self._num_good += 1
        if self._num_good >= self.growth_interval:
            self._num_good = 0
            doubled = self.value * 2
            self.value.copy_(torch.where(torch.isfinite(doubled), doubled, self.value))

    def back_off(self) -> bool:
        """Halve the factor after an overflow; return whether that was possible."""
        if float(self.value) <= self.smallest:
            return False
        self.value.mul_(0.5)
        self.num_overflows += 1
        self._num_good = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"value": float(self.value), "num_good": self._num_good, "num_overflows": self.num_overflows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.value.fill_(state["value"])
        self._num_good = state["num_good"]
        self.num_overflows = state["num_overflows"]
