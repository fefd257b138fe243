"""`BatchStream`: a problem's data as an endless sequence of flattened batches that can be looked at before use."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
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

    def of_task(self, index: int) -> Batch:
        """Return the part of one task: one entry of the leading axis of every tensor."""
        return Batch([t[index] for t in self.tensors], self.spec)

    def signature(self) -> tuple[Any, ...]:
        """What a compiled graph may depend on: structure, sizes, strides and dtypes."""
        return (self.spec, *((t.shape, t.stride(), t.dtype) for t in self.tensors))


class BatchStream:
    """Batches of one problem, starting over when its data ends.

    Several loaders (a dict of them, or a tuple or list of `DataLoader`) give one batch of all of them, in the same
    container; each starts over by itself when it ends.

    Args:
        problem: The problem. Its ``data`` is read by ``iter()`` only.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._device = next(iter(problem.trained_parameters().values())).device
        self._fetch = _fetcher(problem)
        self._is_still = problem.data is None or (type(problem.data) in (list, tuple) and problem.loaders() is None)
        self._waiting: collections.deque[Batch] = collections.deque()

    @property
    def is_still(self) -> bool:
        """Whether fetching runs no code of the user's, and so draws no random numbers and changes nothing."""
        return self._is_still

    def peek(self) -> Batch:
        """Return the next batch without using it up."""
        return self.ahead(1)[0]

    def ahead(self, count: int) -> list[Batch]:
        """Return the next batches without using them up.

        From data that is a list, which runs no code of the user's, the same entry is the same `Batch`.
        """
        made: dict[int, Batch] = {}
        while len(self._waiting) < count:
            fetched = self._fetch()
            if not self.is_still:
                self._waiting.append(self.flatten(fetched))
                continue
            if id(fetched) not in made:
                made[id(fetched)] = self.flatten(fetched)
            self._waiting.append(made[id(fetched)])
        return list(itertools.islice(self._waiting, count))

    def advance(self, count: int) -> None:
        """Use up batches that `ahead` has returned."""
        for _ in range(count):
            self._waiting.popleft()

    def flatten(self, batch: Any) -> Batch:
        """Flatten a batch of the user's and move it to the problem's device."""
        return Batch(*flatten_batch(self._problem.name, batch, self._device))


def _fetcher(problem: Problem) -> Callable[[], Any]:
    data, name = problem.data, problem.name
    if data is None:
        return lambda: None
    loaders = problem.loaders()
    if loaders is None:
        return _Cycle(f"problem {name!r}: its data", data).next
    if isinstance(loaders, dict):
        named = {key: _Cycle(f"problem {name!r}: its data {key!r}", loader) for key, loader in loaders.items()}
        return lambda: {key: cycle.next() for key, cycle in named.items()}
    cycles = [_Cycle(f"problem {name!r}: its data [{i}]", loader) for i, loader in enumerate(loaders)]
    return lambda: tuple(cycle.next() for cycle in cycles)


class _Cycle:
    """One loader without end."""

    def __init__(self, label: str, data: Iterable[Any]) -> None:
        self._label = label
        self._data = data
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        fresh = self._iterator is None
        if self._iterator is None:
            self._iterator = iter(self._data)
        for batch in self._iterator:
            return batch
        if fresh:
            raise DataError(
                f"{self._label} yields no batch; the loader must yield at least one (drop_last=True on a data set "
                "smaller than the batch size?)"
            )
        if iter(self._data) is self._data:
            raise DataError(
                f"{self._label} ran out, and {type(self._data).__name__} cannot be iterated again; pass something "
                "re-iterable (a DataLoader, a list)"
            )
        self._iterator = None
        return self.next()
