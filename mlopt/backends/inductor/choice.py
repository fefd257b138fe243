"""`MeasuredGraph`: keeps the faster of a package and the eager graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mlopt.backends.base import Changing, Lowering
from mlopt.backends.inductor.cache import DiskCache
from mlopt.backends.inductor.lowered import LoweredGraph
from mlopt.backends.measure import device_of, least_time


class MeasuredGraph:
    """Times a package and its eager graph on the arguments of the first call and keeps the faster.

    The choice is remembered with the package, so that later runs on this machine compute the same bits.

    Args:
        lowered: The package.
        key: Its key in the cache.
        cache: Where the choice is remembered.
    """

    is_kernel = False

    def __init__(self, lowered: LoweredGraph, key: str, cache: DiskCache) -> None:
        self._lowered = lowered
        self._key = key
        self._cache = cache
        self._chosen: Any = None
        self._figures = ""
        self._final: Lowering | None = None
        known = cache.get_choice(key)
        if known is not None:
            self._choose(*known)

    @property
    def lowering(self) -> Lowering:
        """What is reported of the graph."""
        if self._final is not None:
            return self._final
        lowering = self._lowered.lowering
        if self._chosen is None or lowering.backend == "eager":  # the latter if the package failed
            return lowering
        backend = "inductor" if self._chosen is self._lowered else "eager"
        self._final = dataclasses.replace(lowering, backend=backend, note=f"{lowering.note}; {self._figures}")
        return self._final

    def native_call(self, arguments: Sequence[Any]) -> Any:
        """See `Compiled`."""
        if self._chosen is None:
            self._measure(arguments)
        return self._chosen.native_call(arguments)

    def native_operator(self, arguments: Sequence[Any], hole: int) -> Any:
        """See `Compiled`."""
        if not self._lowered.is_operator(hole):
            return None
        if self._chosen is None:
            filled = list(arguments)
            filled[hole] = self._lowered.example(hole)
            self._measure(filled)
        return self._chosen.native_operator(arguments, hole)

    def native_steps(self, arguments: Sequence[Any], changing: Changing) -> Any:
        """See `Compiled`."""
        if self._chosen is None:
            self._measure(arguments)
        return self._chosen.native_steps(arguments, changing)

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """Return what the graph returns."""
        if self._chosen is None:
            self._measure(arguments)
        return self._chosen(*arguments)

    def _measure(self, arguments: Sequence[Any]) -> None:
        device = device_of(arguments)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # measuring draws no numbers
            eager = least_time(self._lowered.eager, arguments, device)
            compiled = least_time(self._lowered, arguments, device)
        faster = "inductor" if compiled < eager else "eager"
        figures = f"a call: {eager * 1e6:,.0f} us eager, {compiled * 1e6:,.0f} us compiled"
        self._cache.put_choice(self._key, faster, figures)
        self._choose(faster, figures)

    def _choose(self, backend: str, figures: str) -> None:
        self._chosen = self._lowered if backend == "inductor" else self._lowered.eager
        self._figures = figures
