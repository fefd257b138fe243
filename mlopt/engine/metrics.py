"""Numbers of a run: flat names for nested dicts, and means over an interval without waiting for the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mlopt.runtime.plan import StepResult

_MOST_PENDING = 1024  # tensors of one metric that are kept before they are read


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in a nested dict under names like ``"acc/top1"``; what is no single number is left out.

    Args:
        values: Python numbers, tensors of one element, and dicts of them. Tensors are read, which waits for the device.
        prefix: Put before every name.
    """
    return {prefix + name: float(value) for name, value in _entries(values)}


class RunningMeans:
    """Means of the results of steps since they were taken before.

    Tensors are kept as they are and read all at once, so that a step neither waits for the device nor runs anything
    on it. Sums are made in the order of the steps, in double precision, so a mean does not depend on when values were
    read.
    """

    def __init__(self) -> None:
        self._pending: dict[tuple[str, str], list[torch.Tensor | float]] = {}
        self._sums: dict[tuple[str, str], tuple[float, int]] = {}

    def add(self, results: StepResult, num_steps: int = 1) -> None:
        """Add what steps of the plan returned.

        Args:
            results: See `Plan.run`.
            num_steps: How many steps they are of.
        """
        for problem, result in results.items():
            for name, value in _entries(result, num_steps):
                pending = self._pending.setdefault((problem, name), [])
                pending.extend([value.detach()] if isinstance(value, torch.Tensor) else [value] * num_steps)
                if len(pending) >= _MOST_PENDING:
                    self._read()

    def take(self) -> dict[str, dict[str, float]]:
        """Return problem -> metric -> mean, and begin anew."""
        self._read()
        means: dict[str, dict[str, float]] = {}
        for (problem, name), (total, count) in self._sums.items():
            means.setdefault(problem, {})[name] = total / count
        self._sums = {}
        return means

    def state_dict(self) -> list[list[Any]]:
        """Return the sums as plain data."""
        self._read()
        return [[*key, *value] for key, value in self._sums.items()]

    def load_state_dict(self, state: Sequence[Sequence[Any]]) -> None:
        """Take over what `state_dict` returned."""
        self._pending = {}
        self._sums = {(problem, name): (total, count) for problem, name, total, count in state}

    def _read(self) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for values in self._pending.values():
            for value in values:
                if isinstance(value, torch.Tensor):
                    kinds.setdefault((value.device, value.dtype), []).append(value.reshape(-1))
        # One transfer per kind of tensor; the numbers come back in the order in which they went.
        read = {kind: iter(torch.cat(tensors).tolist()) for kind, tensors in kinds.items()}
        for key, values in self._pending.items():
            total, count = self._sums.get(key, (0.0, 0))
            for value in values:
                if isinstance(value, torch.Tensor):
                    for number in itertools.islice(read[value.device, value.dtype], value.numel()):
                        total += number
                    count += value.numel()
                else:
                    total += value
                    count += 1
            self._sums[key] = (total, count)
        self._pending = {}


def _entries(values: Mapping[str, Any], num_steps: int = 1) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", number) for inner, number in _entries(value, num_steps))
        elif isinstance(value, torch.Tensor):
            if value.numel() == num_steps and not value.is_complex():
                yield str(name), value
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(name), value
        elif hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy number
            yield from _entries({name: value.item()})
