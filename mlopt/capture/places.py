"""Where a `training_step` may find Python values besides its problem and modules: globals and enclosing functions."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn

from mlopt.problem import Problem

_MOST_FUNCTIONS = 100
MACHINERY = frozenset(vars(nn.Module()))  # the attributes that every module has


class Place(NamedTuple):
    """A variable that a function reads.

    Attributes:
        owner: A module or a cell: ``getattr(owner, name)`` is its present value.
        name: Its name there.
        label: What a user calls it.
    """

    owner: object
    name: str
    label: str


class Variables(NamedTuple):
    """What code reads besides its arguments.

    Attributes:
        places: The variables.
        words: All names and strings in the code: what it may ask of a settings object.
    """

    places: list[Place]
    words: frozenset[str]


def variables_of(problem: Problem) -> Variables:
    """Return the variables that the `training_step` of a problem, and what it calls by name, may read."""
    places: list[Place] = []
    words: set[str] = set()
    waiting: list[Callable[..., Any]] = [type(problem).training_step, *_own(problem)]
    seen: set[int] = set()
    while waiting and len(seen) < _MOST_FUNCTIONS:
        function = inspect.unwrap(waiting.pop())
        function = getattr(function, "__func__", function)
        package = str(getattr(function, "__module__", "")).partition(".")[0]
        if not isinstance(function, types.FunctionType) or id(function) in seen or package in ("torch", "mlopt"):
            continue
        seen.add(id(function))
        for place in _places(function):
            value = value_at(place.owner, place.name)
            if isinstance(value, types.FunctionType):
                waiting.append(value)
            else:
                places.append(place)
        words.update(_names(function.__code__), _strings(function.__code__))
        for name in _names(function.__code__):
            method = getattr(type(problem), name, None)
            if isinstance(method, types.FunctionType):
                waiting.append(method)
    return Variables(places, frozenset(words))


def value_at(owner: object, name: str) -> object:
    """Return the present value of an attribute or variable; None where there is none."""
    try:
        return getattr(owner, name, None)
    except ValueError:  # an empty cell: a variable of an enclosing function that has no value yet, or no more
        return None


def _own(problem: Problem) -> list[Callable[..., Any]]:
    """Return a `training_step` that was put on the object."""
    own = vars(problem).get("training_step")
    return [own] if callable(own) else []


def _places(function: types.FunctionType) -> Iterator[Place]:
    module = sys.modules.get(function.__module__ or "")
    if module is not None and vars(module) is function.__globals__:
        for name in _names(function.__code__):
            if name in function.__globals__:
                yield Place(module, name, f"the global {name} of {module.__name__}")
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield Place(cell, "cell_contents", f"the variable {name} of an enclosing function")


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code uses, that of functions defined in it, too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _strings(code: types.CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _strings(constant)
