"""Backends turn functional FX graphs into callables. They know nothing of problems or plans."""

from __future__ import annotations

import os
import warnings

from mlopt.backends import inductor
from mlopt.backends.base import AbstractBackend, Compiled, Lowering
from mlopt.backends.eager import EagerBackend
from mlopt.backends.inductor import InductorBackend
from mlopt.backends.steps import Changing, StepsOutcome, run_steps
from mlopt.errors import BackendWarning

__all__ = [
    "AbstractBackend",
    "Changing",
    "Compiled",
    "EagerBackend",
    "InductorBackend",
    "Lowering",
    "StepsOutcome",
    "get_backend",
    "run_steps",
]

_NAMES = ("auto", "eager", "inductor")


def get_backend(name: str, cache_dir: str | os.PathLike[str] | None = None) -> AbstractBackend:
    """Return the backend of this name.

    ``"auto"`` stands for what ``$MLOPT_BACKEND`` says. Unset, it is ``"inductor"`` with a measurement per graph where
    that can be used, and ``"eager"`` elsewhere.

    Args:
        name: ``"auto"``, ``"eager"`` or ``"inductor"``.
        cache_dir: Where compiled graphs are kept; default: ``$MLOPT_CACHE_DIR``, else ``~/.cache/mlopt``.

    Raises:
        ValueError: There is no such backend.
    """
    measure = False
    if name == "auto":
        name = os.environ.get("MLOPT_BACKEND") or "auto"
        measure = name == "auto"
    if name not in _NAMES:
        raise ValueError(f"compile, argument `backend`: expected one of {', '.join(map(repr, _NAMES))}, got {name!r}")
    if name == "eager":
        return EagerBackend()
    lacking = inductor.missing()
    if lacking is None:
        return InductorBackend(cache_dir, measure=measure)
    if name == "inductor":
        warnings.warn(
            f"backend='inductor' cannot be used: {lacking}. Graphs run by the eager backend, with the same results",
            BackendWarning,
            stacklevel=3,
        )
    return EagerBackend()
