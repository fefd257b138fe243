"""Backends turn functional FX graphs into callables. They know nothing of problems or plans."""

from __future__ import annotations

import os
import threading
import warnings

from mlopt import ops
from mlopt.backends import inductor
from mlopt.backends.base import AbstractBackend, Changing, Compiled, Lowering
from mlopt.backends.eager import EagerBackend
from mlopt.backends.inductor import InductorBackend
from mlopt.backends.inductor.cache import machine
from mlopt.backends.native import NativeBackend
from mlopt.backends.steps import FEWEST_STEPS, Descent, Leap, NativeDescent, StepsLoop, StepsOutcome
from mlopt.errors import BackendWarning

__all__ = [
    "FEWEST_STEPS",
    "AbstractBackend",
    "Changing",
    "Compiled",
    "Descent",
    "EagerBackend",
    "InductorBackend",
    "Leap",
    "Lowering",
    "NativeBackend",
    "NativeDescent",
    "StepsLoop",
    "StepsOutcome",
    "background_backend",
    "get_backend",
    "machine",
]

_NAMES = ("auto", "eager", "inductor", "native")


def get_backend(name: str, cache_dir: str | os.PathLike[str] | None = None) -> AbstractBackend:
    """Return the backend of this name.

    ``"auto"`` stands for what ``$MLOPT_BACKEND`` says. Unset, it is whatever is fastest, by a measurement per graph, of
    what can be used here: ``"inductor"``, ``"native"`` (not with ``MLOPT_KERNELS=0``), ``"eager"``.

    Args:
        name: ``"auto"``, ``"eager"``, ``"inductor"`` or ``"native"``.
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
    if name == "native":
        if ops.available():
            return NativeBackend(EagerBackend(), cache_dir)
        return _without(name, "the native extension of mlopt is not built")
    lacking = inductor.missing()
    if lacking is not None and name == "inductor":
        return _without(name, lacking)
    chosen = EagerBackend() if lacking is not None else InductorBackend(cache_dir, measure=measure)
    return _with_kernels(chosen, cache_dir) if name == "auto" else chosen


def _with_kernels(backend: AbstractBackend, cache_dir: str | os.PathLike[str] | None) -> AbstractBackend:
    if not ops.available() or os.environ.get("MLOPT_KERNELS") == "0":
        return backend
    return NativeBackend(backend, cache_dir, name=backend.name)


def _without(name: str, lacking: str) -> AbstractBackend:
    warnings.warn(
        f"backend={name!r} cannot be used: {lacking}. Graphs run by the eager backend, with the same results",
        BackendWarning,
        stacklevel=4,
    )
    return EagerBackend()


def background_backend(cache_dir: str | os.PathLike[str] | None, cancelled: threading.Event) -> AbstractBackend | str:
    """Return the backend of ``"auto"`` that compiles beside a training run, or what it lacks here.

    Args:
        cache_dir: Where compiled graphs are kept.
        cancelled: Set when nobody waits for it any more.
    """
    lacking = inductor.missing()
    if lacking is not None:
        return lacking
    return _with_kernels(InductorBackend(cache_dir, measure=True, cancelled=cancelled), cache_dir)
