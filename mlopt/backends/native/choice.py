"""`Choice`: which of two ways to run a graph is faster, measured once per machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mlopt.backends.inductor.cache import DiskCache
from mlopt.backends.measure import least_time


class Choice:
    """Measures two ways and remembers the faster, so that later runs on this machine compute the same bits.

    Args:
        names: What the two are called in figures.
        key: Names graph, sizes and machine.
        cache: Where the result is kept.

    Attributes:
        first: Whether the first way is taken; None as long as that is not known.
        figures: What was measured.
    """

    def __init__(self, names: tuple[str, str], key: str, cache: DiskCache) -> None:
        self._names = names
        self._key = key
        self._cache = cache
        self.first: bool | None = None
        self.figures = ""
        known = cache.get_choice(key)
        if known is not None:
            self.first, self.figures = known[0] == names[0], known[1]

    def refuse(self, reason: str) -> None:
        """Take the second way from now on, for a reason that holds in this process."""
        self.first, self.figures = False, reason

    def measure(
        self, first: Callable[[], Any], second: Callable[[], Any], device: torch.device, what: str = "a call"
    ) -> bool:
        """Call both a few times; return whether the first is faster."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # measuring draws no numbers
            times = [least_time(function, (), device) for function in (first, second)]
        self.first = times[0] < times[1]
        a, b = self._names
        self.figures = f"{what}: {times[0] * 1e6:,.0f} us {a}, {times[1] * 1e6:,.0f} us {b}"
        self._cache.put_choice(self._key, self._names[not self.first], self.figures)
        return self.first
