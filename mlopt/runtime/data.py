"""`BatchStream`: a problem's data as an endless sequence of flattened batches that can be looked at before use."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from mlopt.capture import BatchSpec, flatten_batch
from mlopt.capture.packing import pack, unpack
from mlopt.errors import DataError
from mlopt.problem import Problem
from mlopt.runtime.rng import get_all_generators, set_all_generators
from mlopt.runtime.shield import shield

# Flattened entries of a list that are kept, and never more than it has: they hold its tensors, and maybe older ones.
_MOST_KEPT = 1000
# Batches whose sizes are compared; a longer list counts as one of different sizes.
_MOST_COMPARED = 1000


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch: its tensors on the problem's device, and its structure."""

    tensors: list[torch.Tensor]
    spec: BatchSpec

    def of_task(self, index: int) -> Batch:
        """Return the part of one task: one entry of the leading axis of every tensor."""
        return Batch([t[index] for t in self.tensors], self.spec)

    def pack(self) -> Any:
        """Return the batch as plain data; `BatchStream.flatten` makes it a batch again, after `unpack`."""
        return pack(self.spec.unflatten(self.tensors))

    def signature(self) -> tuple[Any, ...]:
        """What a compiled graph may depend on: structure, sizes, strides and dtypes."""
        return (self.spec, *((t.shape, t.stride(), t.dtype) for t in self.tensors))


class BatchStream:
    """Batches of one problem, starting over when its data ends.

    Several loaders (a dict of them, or a tuple or list of `DataLoader`) give one batch of all of them, in the same
    container; each starts over by itself when it ends.

    Args:
        problem: The problem. Its ``data`` is read by ``iter()`` only; where it overrides ``get_batch``, not at all.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._device = next(iter(problem.trained_parameters().values())).device
        self._cycles, self._fetch = _cycles(problem)
        is_list = type(problem.data) in (list, tuple) and problem.loaders() is None
        self._is_still = not problem.draws_batches and (problem.data is None or is_list)
        # A list of one batch has no position, unless somebody is told when it begins again.
        may_be_alone = is_list and not problem.draws_batches and not problem.has_epoch_callback
        self._list: Any = problem.data if may_be_alone else ()
        self._restarted = False  # since `take_restart`
        self._waiting: collections.deque[Batch] = collections.deque()
        self._entries: dict[int, tuple[Any, Batch]] = {}  # of data that is a list: by id, an entry and what it was made

    @property
    def is_still(self) -> bool:
        """Whether fetching runs no code of the user's, and so draws no random numbers and changes nothing."""
        return self._is_still

    @property
    def has_one_size(self) -> bool:
        """Whether all batches are of the same sizes, as far as that is known: data that is a short list of such."""
        data = self._problem.data
        if not self._is_still or data is None or len(data) > _MOST_COMPARED:  # type: ignore[arg-type]
            return False
        return len({tuple(getattr(leaf, "shape", None) for leaf in tree_leaves(entry)) for entry in data}) == 1

    @property
    def has_one_batch(self) -> bool:
        """Whether all batches are the same `Batch`."""
        data = self._problem.data
        return self._is_still and (data is None or len(data) == 1)  # type: ignore[arg-type]

    @property
    def may_run_ahead(self) -> bool:
        """Whether batches of later steps may be fetched now: no code of the user's waits for those steps."""
        return not (self._problem.draws_batches or self._problem.has_epoch_callback)

    def take_restart(self) -> bool:
        """Whether the (first) loader has started over since this was asked before."""
        restarted, self._restarted = self._restarted, False
        return restarted

    def peek(self) -> Batch:
        """Return the next batch without using it up."""
        return self.ahead(1)[0]

    def ahead(self, count: int) -> list[Batch]:
        """Return the next batches without using them up.

        From data that is a list, which runs no code of the user's, the same entry is the same `Batch`.
        """
        if len(self._list) == 1 and not self._waiting:
            return [self._flatten_entry(self._list[0])] * count
        made: dict[int, Batch] = {}
        while len(self._waiting) < count:
            # Ctrl-C would lose what was fetched. It may take long where code of the user's does it, so not there.
            shield.held = self.is_still
            passes = self._cycles[0].num_restarts if self._cycles else 0
            fetched = self._fetch()
            self._restarted |= bool(self._cycles) and self._cycles[0].num_restarts != passes
            if not self.is_still:
                self._waiting.append(self.flatten(fetched))
                continue
            if id(fetched) not in made:
                made[id(fetched)] = self._flatten_entry(fetched)
            times = count - len(self._waiting) if self.has_one_batch else 1
            self._waiting.extend([made[id(fetched)]] * times)
            shield.release()
        return list(itertools.islice(self._waiting, count))

    def _flatten_entry(self, entry: Any) -> Batch:
        """Flatten an entry of a list; a tuple of tensors that are on the device is the same `Batch` every time."""
        known = self._entries.get(id(entry))
        if known is not None and known[0] is entry:
            return known[1]
        batch = self.flatten(entry)
        tensors = batch.tensors
        if type(entry) is tuple and len(entry) == len(tensors) and all(map(operator.is_, entry, tensors)):
            data = self._problem.data
            if len(self._entries) >= min(_MOST_KEPT, len(data)):  # type: ignore[arg-type]  # some were replaced
                self._entries.clear()
            self._entries[id(entry)] = (entry, batch)
        return batch

    def advance(self, count: int) -> None:
        """Use up batches that `ahead` has returned."""
        if len(self._list) == 1 and not self._waiting:
            return
        if count == len(self._waiting):
            self._waiting.clear()
            return
        for _ in range(count):
            self._waiting.popleft()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data as plain data, with the batches that were looked at but not used."""
        return {
            "waiting": [b.pack() for b in self._waiting],
            "cycles": [c.state_dict() for c in self._cycles],
            "restarted": self._restarted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position. Batches are fetched again from where a loader began, so global generators are moved.

        Raises:
            DataError: The data is not that of which the position is.
        """
        if len(state["cycles"]) != len(self._cycles):
            raise DataError(
                f"problem {self._problem.name!r}: it has {len(self._cycles)} loaders, the saved state is that of "
                f"{len(state['cycles'])}"
            )
        for cycle, saved in zip(self._cycles, state["cycles"], strict=True):
            cycle.load_state_dict(saved)
        self._waiting = collections.deque(self.flatten(unpack(b)) for b in state["waiting"])
        self._restarted = state.get("restarted", False)

    def flatten(self, batch: Any) -> Batch:
        """Flatten a batch of the user's and move it to the problem's device."""
        return Batch(*flatten_batch(self._problem.name, batch, self._device))


def distinct(batches: Sequence[Batch]) -> tuple[list[Batch], list[int]]:
    """Return each `Batch` once, and which of them each of the given ones is."""
    first = batches[0]
    if all(map(operator.is_, batches, itertools.repeat(first))):
        return [first], [0] * len(batches)
    found = {id(batch): batch for batch in batches}
    position = {key: k for k, key in enumerate(found)}
    return list(found.values()), [position[id(batch)] for batch in batches]


def _cycles(problem: Problem) -> tuple[list[_Cycle], Callable[[], Any]]:
    """Return a problem's loaders without end, and what fetches the next batch from them."""
    data, name = problem.data, problem.name
    if problem.draws_batches:
        return [], problem.get_batch
    if data is None:
        return [], lambda: None
    loaders = problem.loaders()
    if loaders is None:
        one = _Cycle(f"problem {name!r}: its data", data)
        return [one], one.next
    if isinstance(loaders, dict):
        named = {key: _Cycle(f"problem {name!r}: its data {key!r}", loader) for key, loader in loaders.items()}
        return list(named.values()), lambda: {key: cycle.next() for key, cycle in named.items()}
    cycles = [_Cycle(f"problem {name!r}: its data [{i}]", loader) for i, loader in enumerate(loaders)]
    return cycles, lambda: tuple(cycle.next() for cycle in cycles)


class _Cycle:
    """One loader without end.

    Its position is that of the iterator: the generators when it began and the number of batches taken since. Going
    there means to begin again with these generators and to take as many batches; a loader that has a ``state_dict`` of
    its own (torchdata's stateful loaders) is asked for that instead.
    """

    def __init__(self, label: str, data: Iterable[Any]) -> None:
        self._label = label
        self._data = data
        self._iterator: Iterator[Any] | None = None
        self._start: dict[str, Any] | None = None  # the generators when the iterator began
        self._num_taken = 0
        self.num_restarts = 0
        self._continued = False  # whether the iterator begins where another one, of a saved loader, has stopped

    def next(self) -> Any:
        fresh = self._iterator is None
        if self._iterator is None:
            self._iterator = self._begin()
        for batch in self._iterator:
            self._num_taken += 1
            return batch
        if fresh and not self._continued:
            raise DataError(
                f"{self._label} yields no batch; the loader must yield at least one (drop_last=True on a data set "
                "smaller than the batch size?)"
            )
        # Not by ``iter(data) is data``: a DataLoader draws a seed, and starts its workers, whenever it is asked.
        if isinstance(self._data, Iterator):
            raise DataError(
                f"{self._label} ran out, and {type(self._data).__name__} cannot be iterated again; pass something "
                "re-iterable (a DataLoader, a list)"
            )
        self._iterator, self._continued = None, False
        self.num_restarts += 1
        return self.next()

    def _begin(self) -> Iterator[Any]:
        self._num_taken = 0
        if type(self._data) in (list, tuple):
            # It draws nothing. With a single batch it begins at every step, and keeping generators costs 20 us.
            self._start = {"all": None, "own": []}
        else:
            self._start = {"all": get_all_generators(), "own": [g.get_state() for g in self._own_generators()]}
        return iter(self._data)

    def _own_generators(self) -> list[torch.Generator]:
        """Return the generators that were given to a `DataLoader` and its samplers."""
        batch_sampler = getattr(self._data, "batch_sampler", None)
        holders = [self._data, getattr(self._data, "sampler", None), batch_sampler]
        holders.append(getattr(batch_sampler, "sampler", None))
        found = [getattr(holder, "generator", None) for holder in holders]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the position as plain data."""
        if _is_stateful(self._data):
            return {"loader": self._data.state_dict()}  # type: ignore[attr-defined]
        return {
            "start": self._start,
            "num_taken": self._num_taken,
            "own": [g.get_state() for g in self._own_generators()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; global generators are moved."""
        self._iterator = None
        if _is_stateful(self._data) and "loader" in state:
            self._data.load_state_dict(state["loader"])  # type: ignore[attr-defined]
            self._continued = True
            return
        own = self._own_generators()
        if state.get("start") is not None:
            if state["start"]["all"] is not None:
                set_all_generators(state["start"]["all"])
            for generator, value in zip(own, state["start"]["own"], strict=False):
                generator.set_state(value.cpu())
            self._iterator = self._begin()
            for _ in range(state["num_taken"]):
                if next(self._iterator, self) is self:
                    raise DataError(
                        f"{self._label} ends after {self._num_taken} batches; when its position was saved, it had "
                        f"yielded {state['num_taken']}. Give the loader that the state was saved with"
                    )
                self._num_taken += 1
        for generator, value in zip(own, state.get("own", ()), strict=False):
            generator.set_state(value.cpu())


def _is_stateful(data: Any) -> bool:
    return hasattr(data, "state_dict") and hasattr(data, "load_state_dict")
