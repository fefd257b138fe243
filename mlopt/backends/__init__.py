"""Backends turn functional FX graphs into callables. They know nothing of problems or plans."""

from mlopt.backends.base import AbstractBackend
from mlopt.backends.eager import EagerBackend

__all__ = ["AbstractBackend", "EagerBackend", "get_backend"]

_BACKENDS: dict[str, type[AbstractBackend]] = {"auto": EagerBackend, "eager": EagerBackend}


def get_backend(name: str) -> AbstractBackend:
    """Return the backend of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in _BACKENDS:
        raise ValueError(
            f"compile, argument `backend`: expected one of {', '.join(map(repr, _BACKENDS))}, got {name!r}"
        )
    return _BACKENDS[name]()
