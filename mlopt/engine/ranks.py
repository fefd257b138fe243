"""What the ranks of a distributed run tell each other, so that all of them take the same decisions.

Without an initialized `torch.distributed` there is one rank, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import distributed


def num_ranks() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return which of them this one is."""
    return distributed.get_rank() if num_ranks() > 1 else 0


def gather(value: Any) -> list[Any]:
    """Return what every rank gives, in the order of the ranks; all of them must call it."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    distributed.all_gather_object(values, value)
    return values


def average(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each number over the ranks that have it: the same, to the bit, on all of them."""
    given = gather(dict(values))
    if len(given) == 1:
        return given[0]
    names = dict.fromkeys(name for part in given for name in part)
    means = {}
    for name in names:
        present = [part[name] for part in given if name in part]
        means[name] = sum(present) / len(present)
    return means
