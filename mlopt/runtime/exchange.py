"""Give live tensors other values for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch

from mlopt.problem import Problem


@contextlib.contextmanager
def exchanged(problems: Iterable[Problem], values: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Let parameters and buffers have other values; afterwards the very same storages are back.

    The tensor objects stay what they are (their ``data`` is exchanged), so optimizers and the user's own references are
    not disturbed. What autograd records on them inside may be used inside only.

    Args:
        problems: Whose modules hold the tensors.
        values: ``id`` of a live tensor -> its value.
    """
    modules = [problem.module for problem in problems]
    live = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers()) if id(t) in values}
    before = [(tensor, tensor.data) for tensor in live.values()]
    try:
        for key, tensor in live.items():
            tensor.data = values[key]
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
