"""`EarlyStopping`: end a run when validation no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MODES = ("min", "max")


def is_better(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether a value improves on the best one by more than `min_delta`; NaN never does."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def find_metric(metric: str, values: Mapping[str, float], where: str) -> float:
    """Return one of the numbers that `validate` returned.

    Raises:
        ValueError: It is not there; names those that are.
    """
    if metric not in values:
        raise ValueError(
            f"{where}: `validate` returned no number named {metric!r} (it returned: {', '.join(values) or 'none'}); "
            "numbers in nested dicts are named like 'acc/top1'"
        )
    return values[metric]


class EarlyStopping:
    """Ends an `Engine` run when a validation result has not improved for a while.

    In a distributed run the results are averaged over the ranks first, so that all of them stop at the same step.

    Args:
        metric: Which of the numbers that `validate` returns; those in nested dicts are named like ``"acc/top1"``.
        mode: ``"min"`` if smaller is better, ``"max"`` if larger is.
        patience: Validations without improvement after which the run ends.
        min_delta: Only a change by more than this is an improvement.

    Attributes:
        best: The best value so far; None before the first.
        best_step: The step it was found at.
        num_waited: Validations since then.

    Raises:
        ValueError: An unknown mode, a `patience` that is not a positive integer, a negative `min_delta`.
    """

    def __init__(self, metric: str, mode: str = "min", patience: int = 10, min_delta: float = 0.0) -> None:
        if mode not in MODES:
            raise ValueError(f"EarlyStopping, argument `mode`: expected 'min' or 'max', got {mode!r}")
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"EarlyStopping, argument `patience`: expected an integer >= 1, got {patience!r}")
        if not min_delta >= 0:
            raise ValueError(f"EarlyStopping, argument `min_delta`: expected a number >= 0, got {min_delta!r}")
        self.metric = metric
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.best: float | None = None
        self.best_step = 0
        self.num_waited = 0

    @property
    def is_over(self) -> bool:
        """Whether the run is to end."""
        return self.num_waited >= self.patience

    def update(self, step: int, values: Mapping[str, float]) -> bool:
        """Look at the results of a validation.

        Args:
            step: The global step.
            values: The results.

        Returns:
            Whether the run is to end.

        Raises:
            ValueError: The metric is not among them.
        """
        value = find_metric(self.metric, values, "EarlyStopping")
        if is_better(value, self.best, self.mode, self.min_delta):
            self.best, self.best_step, self.num_waited = value, step, 0
        else:
            self.num_waited += 1
        return self.is_over

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen so far as plain data."""
        return {"best": self.best, "best_step": self.best_step, "num_waited": self.num_waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best, self.best_step, self.num_waited = state["best"], state["best_step"], state["num_waited"]

    def __repr__(self) -> str:
        """Show the arguments."""
        return (
            f"EarlyStopping({self.metric!r}, mode={self.mode!r}, patience={self.patience}, min_delta={self.min_delta})"
        )
