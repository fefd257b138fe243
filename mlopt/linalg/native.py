"""Native operators: what lets a solver's loop run without Python between its steps.

A native operator is an ``mlopt._C.LinearOperator``. An `AbstractLinearOperator` that has one offers it as `native`; the
solvers then hand their loop to C++, which does the same steps on the same tensors as the loop in Python.
"""

from __future__ import annotations

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
    x: torch.Tensor,
    r: torch.Tensor,
    p: torch.Tensor,
    state: torch.Tensor,
    max_steps: int,
    check_every: int,
) -> None:
    """Run the loop of conjugate gradients; writes its tensors like `mlopt.ops.cg_step_`."""
    _extension().cg_loop(operator, x, r, p, state, max_steps, check_every)


def run_neumann(operator: Any, term: torch.Tensor, total: torch.Tensor, num_terms: int, scale: float) -> None:
    """Run the loop of a Neumann series; writes its tensors like `mlopt.ops.neumann_step_`."""
    _extension().neumann_loop(operator, term, total, num_terms, scale)


def _extension() -> Any:
    return importlib.import_module("mlopt._C")
