"""Notices the Python values that a `training_step` reads: temperatures, coefficients, switches.

They become constants of the captured graph. A program that anneals ``self.temperature`` between steps would go on with
the old value, silently, so capture records which plain values are read where, and a running plan looks at them again
(see `mlopt.compiler`). The same goes for globals and variables of enclosing functions that the code names. What cannot
be seen is the use of a counter that `training_step` itself advances, which only verification may notice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import types
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from mlopt.capture.places import MACHINERY, Variables, value_at
from mlopt.problem import Problem

_SCALARS = (bool, int, float, complex, str, type(None))
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class ReadAttribute:
    """A plain Python value that a `training_step` reads.

    Attributes:
        owner: The problem or module that has it.
        name: Its name there.
        value: What it was, as `current` gives it.
        label: What the user calls it, where that does not follow from the owner.
        words: Of a settings object, the entries that are looked at; None for all.
    """

    owner: object
    name: str
    value: object
    label: str = ""
    words: frozenset[str] | None = None

    def current(self) -> object:
        """Return what the attribute is now; something equal to `value` if it has not changed."""
        value = value_at(self.owner, self.name)
        return value if isinstance(value, _SCALARS) else _plain(value, self.words)

    def describe(self, problems: Sequence[Problem]) -> str:
        """Name the attribute as the user would write it in the `training_step` of the problem that has it."""
        if self.label:
            return self.label
        for problem in problems:
            if self.owner is problem:
                return f"self.{self.name} of problem {problem.name!r}"
            for path, module in problem.module.named_modules():
                if self.owner is module:
                    return f"self.module{'.' if path else ''}{path}.{self.name} of problem {problem.name!r}"
        return f"{type(self.owner).__name__}.{self.name}"


class AttributeRecorder:
    """The plain values read so far.

    Attributes:
        read_live: The problem of which something was read that changes from step to step, and what; None if nothing
            was.
    """

    def __init__(self) -> None:
        self.read_live: tuple[Problem, str] | None = None
        self._first: dict[tuple[int, str], ReadAttribute] = {}

    def note(self, owner: object, name: str, value: object) -> None:
        """Remember the first value of an attribute, if it is a plain one."""
        if (id(owner), name) in self._first:
            return
        plain = value if isinstance(value, _SCALARS) else _plain(value)
        if plain is not _ABSENT:
            self._first[id(owner), name] = ReadAttribute(owner, name, plain)

    def note_variables(self, variables: Variables) -> None:
        """Remember the plain values of the variables that the code of a `training_step` names."""
        places, words = variables
        for owner, name, label in places:
            value = value_at(owner, name)
            plain = value if isinstance(value, _SCALARS) else _plain(value, words)
            if plain is not _ABSENT and plain != ():
                self._first[id(owner), name] = ReadAttribute(owner, name, plain, label, words)

    def unchanged(self) -> tuple[ReadAttribute, ...]:
        """Return the attributes that still have the value they were first read with.

        One that `training_step` writes itself is a counter: its code runs at capture only, so it stands still.
        """
        return tuple(a for a in self._first.values() if a.value == a.current())


@contextlib.contextmanager
def recording_attributes() -> Iterator[AttributeRecorder]:
    """Record the plain values that are read from problems and modules inside of the context."""
    recorder = AttributeRecorder()

    def read(owner: object, name: str) -> Any:
        value = object.__getattribute__(owner, name)  # an AttributeError goes on to __getattr__, as always
        kind = type(owner)  # `isinstance` would ask the owner for its class, and so this function
        if issubclass(kind, Problem) and value is not None and name in kind.live_attributes:
            recorder.read_live = owner, name  # type: ignore[assignment]
        # The training mode of a module is looked at elsewhere.
        if name not in MACHINERY and _is_plain_place(owner, name) and _varies(owner, value):
            recorder.note(owner, name, value)
        return value

    patched = [kind for kind in (Problem, nn.Module) if "__getattribute__" not in vars(kind)]
    for kind in patched:
        kind.__getattribute__ = read  # type: ignore[method-assign]
    try:
        yield recorder
    finally:
        for kind in patched:
            del kind.__getattribute__


def _is_plain_place(owner: object, name: str) -> bool:
    """Whether the value simply lies there: what a property computes is read by the property itself."""
    if name in object.__getattribute__(owner, "__dict__"):
        return True
    found = getattr(type(owner), name, None)
    return isinstance(found, _SCALARS) and not name.startswith("__")


def _varies(owner: object, value: object) -> bool:
    """Whether a value may be meant to change: the sizes and flags of torch's own layers are not."""
    return isinstance(value, float) or not type(owner).__module__.startswith("torch.")


def _plain(value: object, words: frozenset[str] | None = None, depth: int = 4) -> object:
    """Return the scalars in a settings object (a namespace, a dataclass, a dict), or `_ABSENT` for anything else.

    Args:
        value: The object.
        words: The names of the entries that matter; None for all.
        depth: How far settings within settings are looked at.
    """
    if isinstance(value, types.SimpleNamespace | argparse.Namespace) or (
        dataclasses.is_dataclass(value) and not isinstance(value, type)
    ):
        value = vars(value) if hasattr(value, "__dict__") else {}
    elif type(value) is not dict:
        return _ABSENT
    found = []
    for key, part in value.items():
        if not isinstance(key, str) or (words is not None and key not in words):
            continue
        plain = part if isinstance(part, _SCALARS) else _plain(part, words, depth - 1) if depth > 1 else _ABSENT
        if plain is not _ABSENT:
            found.append((key, plain))
    return tuple(found)
