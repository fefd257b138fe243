"""Notices lists, dicts and sets that a `training_step` writes into: histories, counts, queues.

Its code runs at capture only, on tensors without values; what it would have put there in later steps would be missing,
and what it puts there now is worth nothing. So the containers are put back as they were.
"""

from __future__ import annotations

import collections
import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mlopt.capture.places import MACHINERY, Place, value_at
from mlopt.problem import Problem

_KINDS = (list, dict, set, collections.deque, collections.defaultdict, collections.Counter, collections.OrderedDict)
_LONGEST = 100_000


class ContainerWatcher:
    """What was found.

    Attributes:
        changed: The first container that was written into, as a user calls it; None if there is none.
    """

    def __init__(self) -> None:
        self.changed: str | None = None


@contextlib.contextmanager
def watching_containers(places: Sequence[Place], problems: Sequence[Problem]) -> Iterator[ContainerWatcher]:
    """Look at the containers that a `training_step` can reach; put them back at the end.

    Args:
        places: The variables that its code reads.
        problems: All problems of its graph.
    """
    before = {id(c): (label, c, _copied(c), is_cache) for label, c, is_cache in _containers(places, problems)}
    attributes = [(owner, label, dict(vars(owner))) for owner, label in _owners(problems)]
    watcher = ContainerWatcher()
    try:
        yield watcher
    finally:
        for owner, label, known in attributes:
            for name, value in list(vars(owner).items()):
                if name not in known and _is_container(value):
                    if not (isinstance(owner, nn.Module) and isinstance(value, dict)):
                        watcher.changed = watcher.changed or label.format(name)
                    del vars(owner)[name]
                elif known.get(name) is not value and isinstance(value, torch.Tensor):  # it has no values
                    vars(owner).pop(name) if name not in known else vars(owner).update({name: known[name]})
        for label, container, copy, is_cache in before.values():
            if not _is_same(container, copy):
                # A module that keeps what it has computed, by key, computes it in the graph.
                if watcher.changed is None and not (is_cache and copy.keys() <= container.keys()):
                    watcher.changed = label
                _put_back(container, copy)


def _owners(problems: Sequence[Problem]) -> Iterator[tuple[Problem | nn.Module, str]]:
    """Yield problems and modules, with what a user calls an attribute of each."""
    for p in problems:
        yield p, f"self.{{}} of problem {p.name!r}"
        for path, module in p.module.named_modules():
            yield module, f"self.module{'.' if path else ''}{path}.{{}} of problem {p.name!r}"


def _containers(places: Sequence[Place], problems: Sequence[Problem]) -> Iterator[tuple[str, Any, bool]]:
    for owner, label in _owners(problems):
        is_module = isinstance(owner, nn.Module)
        for name, value in vars(owner).items():
            if _is_container(value) and not (is_module and name in MACHINERY):
                yield label.format(name), value, is_module and isinstance(value, dict)
    for place in places:
        value = value_at(place.owner, place.name)
        if _is_container(value):
            yield place.label, value, False


def _is_container(value: Any) -> bool:
    return type(value) in _KINDS and len(value) <= _LONGEST


def _copied(container: Any) -> Any:
    return dict(container) if isinstance(container, dict) else list(container)


def _is_same(container: Any, copy: Any) -> bool:
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is value for key, value in copy.items())
    return all(map(operator.is_, container, copy))


def _put_back(container: Any, copy: Any) -> None:
    container.clear()
    if isinstance(container, list | collections.deque):
        container.extend(copy)
    else:
        container.update(copy)
