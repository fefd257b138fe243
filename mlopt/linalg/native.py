"""Native operators: what lets a solver's loop run without Python between its steps.

A native operator is an ``mlopt._C.LinearOperator``. An `AbstractLinearOperator` that has one offers it as `native`; the
solvers then hand their loop to C++, which does the same steps on the same tensors as the loop in Python.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from mlopt import ops


def native_callback(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Wrap a Python function ``[N] -> [N]`` as a native operator; None without the extension."""
    return _extension().CallbackOperator(function) if ops.available() else None


def native_damped(inner: Any, damping: float) -> Any:
    """Return ``inner + damping I``; None for None."""
    return None if inner is None else _extension().DampedOperator(inner, damping)


def run_cg(
    operator: Any,
    b: torch.Tensor,
    start: tuple[torch.Tensor, torch.Tensor] | None,
    rtol: float,
    max_steps: int,
    check_every: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve by conjugate gradients, from a first guess and its residual or from zero.

    Returns:
        x, the state (see `mlopt.ops.CgState`) and ``||b||``.
    """
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _extension().cg_solve(
        operator, b, start, rtol, max_steps, check_every, ops.recorder_for(b.device)
    )
    return made


def run_neumann(operator: Any, term: torch.Tensor, total: torch.Tensor, num_terms: int, scale: float) -> None:
    """Run the loop of a Neumann series; writes its tensors like `mlopt.ops.neumann_step_`."""
    _extension().neumann_loop(operator, term, total, num_terms, scale, ops.recorder_for(term.device))


@functools.cache
def _extension() -> Any:
    return importlib.import_module("mlopt._C")
