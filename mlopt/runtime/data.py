"""`BatchStream`: a problem's data as an endless sequence of flattened batches that can be looked at before use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from mlopt.capture import BatchSpec, flatten_batch
from mlopt.errors import DataError
from mlopt.problem import Problem


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch: its tensors on the problem's device, and its structure."""

    tensors: list[torch.Tensor]
    spec: BatchSpec

    def signature(self) -> tuple[Any, ...]:
        """What a compiled graph may depend on: structure, sizes, strides and dtypes."""
        return (self.spec, *((t.shape, t.stride(), t.dtype) for t in self.tensors))


class BatchStream:
    """Batches of one problem, starting over when its data ends.

    Args:
        problem: The problem. Its ``data`` is read by ``iter()`` only.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._device = next(iter(problem.trained_parameters().values())).device
        self._iterator: Iterator[Any] | None = None
        self._waiting: Batch | None = None

    def peek(self) -> Batch:
        """Return the next batch without using it up."""
        if self._waiting is None:
            self._waiting = self.flatten(self._fetch())
        return self._waiting

    def next(self) -> Batch:
        """Return the next batch."""
        batch = self.peek()
        self._waiting = None
        return batch

    def flatten(self, batch: Any) -> Batch:
        """Flatten a batch of the user's and move it to the problem's device."""
        return Batch(*flatten_batch(self._problem.name, batch, self._device))

    def _fetch(self) -> Any:
        data, name = self._problem.data, self._problem.name
        if data is None:
            return None
        fresh = self._iterator is None
        if self._iterator is None:
            self._iterator = iter(data)
        for batch in self._iterator:
            return batch
        if fresh:
            raise DataError(
                f"problem {name!r}: its data yields no batch; the loader must yield at least one "
                "(drop_last=True on a data set smaller than the batch size?)"
            )
        if iter(data) is data:
            raise DataError(
                f"problem {name!r}: its data ran out, and {type(data).__name__} cannot be iterated again; pass "
                "something re-iterable (a DataLoader, a list)"
            )
        self._iterator = None
        return self._fetch()
