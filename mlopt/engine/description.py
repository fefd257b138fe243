"""Describes a run as plain data, for loggers and for ``config.json``."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import torch

from mlopt.runtime.plan import Plan

_PACKAGES = ("mlopt", "numpy")
_PLAIN = (
    *("unroll_steps", "warmup_steps", "gradient_accumulation", "roll_back", "tasks", "clip_norm"),
    *("normalize_gradient", "precision", "scheduler_metric"),
)


def describe(plan: Plan, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run is made of.

    Args:
        plan: The program.
        options: Those of the engine, plain already.
    """
    return {
        "engine": dict(options),
        "problems": {name: _problem(problem) for name, problem in plan.graph.problems.items()},
        "versions": {"python": platform.python_version(), **_versions()},
        "seed": torch.initial_seed(),
    }


def _problem(problem: Any) -> dict[str, Any]:
    optimizer, scheduler = problem.optimizer, problem.scheduler
    groups = [{k: _plain(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return {
        "class": type(problem).__qualname__,
        "parameters": problem.num_trained,
        "device": str(problem.device),
        "module": repr(problem.module),
        "optimizer": {"class": type(optimizer).__qualname__, "groups": groups},
        "scheduler": None if scheduler is None else type(scheduler).__qualname__,
        "hypergradient": None if problem.hypergradient is None else repr(problem.hypergradient),
        **{key: getattr(problem, key) for key in _PLAIN},
    }


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}  # with the build, like +cu130; the metadata of PyPI's wheels leave it out
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
