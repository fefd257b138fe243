"""How long calls take, for choices between two ways to run a graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_REPEATS = 5
_ENOUGH = 0.3  # seconds after which no further repeat is made: the difference is then plain


def least_time(function: Callable[..., Any], arguments: Sequence[Any], device: torch.device) -> float:
    """Return the least of a few timings; the least, because other work on the machine only adds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    function(*arguments)
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _ENOUGH:
        wait()
        start = time.perf_counter()
        function(*arguments)
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def device_of(arguments: Sequence[Any]) -> torch.device:
    """Return the device of the first tensor."""
    return next((a.device for a in arguments if isinstance(a, torch.Tensor)), torch.device("cpu"))
