"""`Programs`: native programs by what they were put together for, and when one is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

from mlopt.backends import Compiled
from mlopt.linalg import Solution
from mlopt.planner import Solve

logger = logging.getLogger(__name__)

_MOST_KEPT = 16  # of different sizes, say
_FIRST = 2  # how often something is made before it is put together, which costs about as much as making it

T = TypeVar("T")


class UnsuitableError(Exception):
    """Something cannot be a native program; says why."""


@dataclasses.dataclass(frozen=True)
class Wanted(Generic[T]):
    """A program that is asked for.

    Attributes:
        problem: Whose steps it makes.
        key: All that it depends on and that `is_right` does not look at.
        is_right: Whether one that was put together before may still be used; if not, it begins anew.
        build: Puts it together; raises UnsuitableError or RuntimeError where that cannot be.
    """

    problem: str
    key: tuple[object, ...]
    is_right: Callable[[T], bool]
    build: Callable[[], T]


@dataclasses.dataclass(frozen=True)
class ReadyStep:
    """Steps of a problem that need nothing of Python but to be asked for, and what there is to do around them.

    Attributes:
        call: ``mlopt._C.Program``, what it is given, and the registers that are wanted.
        is_current: Whether that is still so where the derivatives and batches are the same: the optimizer was not
            touched. False does not say that it was.
        results: Makes their values loss and metrics.
        solutions: Makes them what tells how each solve went.
        written: To be called once the new values have been written.
        give_up: To be called with the error if they could not be made.
    """

    call: tuple[Any, list[torch.Tensor], list[int]]
    is_current: Callable[[], bool]
    results: Callable[[Sequence[Any]], dict[str, Any]]
    solutions: Callable[[Sequence[Any]], list[tuple[Solve, Solution]]]
    written: Callable[[], None]
    give_up: Callable[[Exception], None]


class Programs(Generic[T]):
    """Programs by key, put together when what they do has been done a few times in the usual way."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], T | int] = {}  # or how often it was asked for; -1: it cannot be

    def get(self, wanted: Wanted[T]) -> T | None:
        """Return a program, or None where there is none, or not yet."""
        key = wanted.key
        known = self._known.get(key, 0)
        if not isinstance(known, int):
            if wanted.is_right(known):
                return known
            known = 0
        if known < 0:
            return None
        if key not in self._known and len(self._known) >= _MOST_KEPT:
            self._known.clear()
        self._known[key] = known + 1
        if known < _FIRST:
            return None
        try:
            made = wanted.build()
        except (UnsuitableError, RuntimeError) as error:
            self.give_up(wanted, error)
            return None
        self._known[key] = made
        return made

    def ready(self, wanted: Wanted[T]) -> T | None:
        """Return a program if it has been put together."""
        known = self._known.get(wanted.key, 0)
        return known if not isinstance(known, int) and wanted.is_right(known) else None

    def give_up(self, wanted: Wanted[T], reason: Exception) -> None:
        """Have what a program would do done in the usual way from now on."""
        logger.info("steps of problem %r are made in the usual way: %s", wanted.problem, reason)
        self._known[wanted.key] = -1


def bound_call(compiled: Compiled, arguments: Sequence[Any]) -> Any:
    """Return a graph as a part of programs, for arguments like these.

    Raises:
        UnsuitableError: It is not native.
    """
    bound = compiled.native_call(arguments)
    if bound is None:
        raise UnsuitableError(f"a graph runs by the backend {compiled.lowering.backend!r}")
    return bound
