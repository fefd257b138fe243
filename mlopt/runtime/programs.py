"""`Programs`: native programs by what they were put together for, and when one is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from mlopt.backends import Compiled

logger = logging.getLogger(__name__)

_MOST_KEPT = 16  # of different sizes, say
_FIRST = 2  # how often something is made before it is put together, which costs about as much as making it

T = TypeVar("T")


class UnsuitableError(Exception):
    """Something cannot be a native program; says why."""


class Programs(Generic[T]):
    """Programs by key, put together when what they do has been done a few times in the usual way."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], T | int] = {}  # or how often it was asked for; -1: it cannot be

    def get(
        self, problem: str, key: tuple[object, ...], is_right: Callable[[T], bool], build: Callable[[], T]
    ) -> T | None:
        """Return the program of a key, or None where there is none, or not yet.

        Args:
            problem: Whose steps it makes.
            key: All that it depends on and that `is_right` does not look at.
            is_right: Whether one that was put together before may still be used; if not, it begins anew.
            build: Puts it together; raises UnsuitableError or RuntimeError where that cannot be.
        """
        known = self._known.get(key, 0)
        if not isinstance(known, int):
            if is_right(known):
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
            made = build()
        except (UnsuitableError, RuntimeError) as error:
            self.give_up(problem, key, error)
            return None
        self._known[key] = made
        return made

    def give_up(self, problem: str, key: tuple[object, ...], reason: Exception) -> None:
        """Have what a program would do done in the usual way from now on."""
        logger.info("steps of problem %r are made in the usual way: %s", problem, reason)
        self._known[key] = -1


def bound_call(compiled: Compiled, arguments: Sequence[Any]) -> Any:
    """Return a graph as a part of programs, for arguments like these.

    Raises:
        UnsuitableError: It is not native.
    """
    bound = compiled.native_call(arguments)
    if bound is None:
        raise UnsuitableError(f"a graph runs by the backend {compiled.lowering.backend!r}")
    return bound
