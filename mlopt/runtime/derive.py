"""`Derivation`: gets the derivatives of problems, and remembers when the user's modules must be looked at again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import AbstractDerivatives


class Derive(Protocol):
    """Gives the derivatives of a problem that are valid for a batch; see `mlopt.compiler.Compiler.derive`."""

    def __call__(self, name: str, batch: Batch, *, checked: bool = False) -> AbstractDerivatives:
        """See `Derive`."""


class Derivation:
    """Derivatives are valid for modules as they were compiled, which is looked at as often as they may have changed.

    That is at `begin`, and after code of the user's has run: derivatives that run it say so themselves; whoever else
    runs it calls `user_code_ran`.

    Args:
        derive: Gives the derivatives of a problem.
    """

    def __init__(self, derive: Derive) -> None:
        self._derive = derive
        self._checked = False  # no code of the user's has run since the modules were looked at
        self._uninterrupted = False
        self._found: dict[str, tuple[Batch, AbstractDerivatives]] = {}  # since then: the last batch of each problem

    def __call__(self, name: str, batch: Batch) -> AbstractDerivatives:
        """Return the derivatives of a problem that are valid for a batch."""
        if not self._checked:
            self._found.clear()
        known = self._found.get(name)
        if known is not None and known[0] is batch:
            return known[1]
        found = self._derive(name, batch, checked=self._checked)
        self._checked = not found.runs_user_code
        self._found[name] = (batch, found)
        return found

    @contextlib.contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Make of all that is done inside one thing that has begun: the caller's caller does not run in between."""
        self._checked, self._uninterrupted = False, True
        try:
            yield
        finally:
            self._checked = self._uninterrupted = False

    def begin(self) -> None:
        """Look at the modules first, unless this is part of something that has begun."""
        self._checked &= self._uninterrupted

    def user_code_ran(self) -> None:
        """Look at the modules first: they may have been changed."""
        self._checked = False
