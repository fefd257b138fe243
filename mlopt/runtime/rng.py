"""Freezing the random number generators, so that every pass of one hypergradient sees the same dropout masks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class RandomState:
    """State of the default generators of the CPU and, if the problem lives on one, of a CUDA device."""

    cpu: torch.Tensor
    cuda: torch.Tensor | None
    device: torch.device


def get_random_state(device: torch.device) -> RandomState:
    """Take the generators' present state."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RandomState(torch.get_rng_state(), cuda, device)


def set_random_state(state: RandomState) -> None:
    """Put the generators into a state taken before."""
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, state.device)


@contextlib.contextmanager
def frozen_random_state(state: RandomState | None) -> Iterator[None]:
    """Run with the generators in `state` and put them back afterwards; does nothing for None."""
    if state is None:
        yield
        return
    before = get_random_state(state.device)
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(before)
