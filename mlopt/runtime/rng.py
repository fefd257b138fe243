"""The random number generators: frozen, for the same dropout masks in every pass of one hypergradient, and saved."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Iterator
from typing import Any

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


def get_all_generators() -> dict[str, Any]:
    """Return the state of every global generator as plain data: torch's (CPU and CUDA), Python's, and NumPy's."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, keys.tolist(), *rest)
    return state


def set_all_generators(state: dict[str, Any]) -> None:
    """Put every global generator into a state that `get_all_generators` returned."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(value.cpu(), device)
    numpy = sys.modules.get("numpy")
    if "numpy" in state and numpy is not None:
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
