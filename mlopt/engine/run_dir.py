"""`RunDirectory`: what a run leaves behind for who looks at it later."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlopt.engine.files import replacing, write_text
from mlopt.engine.loggers import AbstractLogger, CSVLogger, JSONLLogger
from mlopt.runtime.plan import Plan

logger = logging.getLogger(__name__)

_MOST_PANELS = 24
_SHARE = 0.05  # of the time of a run, that drawing may take


class RunDirectory:
    """A folder with ``config.json``, ``plan.txt``, ``plan.svg``, ``metrics.csv``, ``metrics.jsonl``, ``curves.png``.

    Args:
        path: The folder; it is made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loggers: tuple[AbstractLogger, ...] = (
            CSVLogger(path / "metrics.csv"),
            JSONLLogger(path / "metrics.jsonl"),
        )
        self._can_draw = True
        self._drawn = 0.0  # when
        self._took = 0.0

    def is_used(self) -> bool:
        """Whether a run has written here."""
        return (self.path / "metrics.csv").exists()

    def begin(self, config: Mapping[str, Any]) -> None:
        """Write the options of a run."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def describe(self, plan: Plan) -> None:
        """Write what the plan is; what runs it may change during a run."""
        write_text(self.path / "plan.txt", plan.explain() + "\n")
        plan.draw(str(self.path / "plan.svg"))

    def draw(self, history: Mapping[str, list[tuple[int, float]]], *, last: bool = False) -> None:
        """Draw the curves, unless that was done a short while ago.

        Args:
            history: Name -> (step, value).
            last: Draw them in any case.
        """
        began = time.monotonic()
        if not self._can_draw or not history or (not last and began - self._drawn < self._took / _SHARE):
            return
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            self._can_draw = False
            logger.warning("%s is not drawn: matplotlib is not installed", self.path / "curves.png")
            return
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        _plot(figure, history)
        try:
            with replacing(self.path / "curves.png") as file:
                figure.savefig(file, format="png", dpi=100)
        except OSError as error:  # a run is worth more than a picture of it
            logger.warning("%s is not drawn: %s", self.path / "curves.png", error)
        self._drawn = time.monotonic()
        self._took = self._drawn - began


def _plot(figure: Any, history: Mapping[str, list[tuple[int, float]]]) -> None:
    names = list(history)[:_MOST_PANELS]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure.set_size_inches(4 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for name, axis in zip(names, axes, strict=False):
        steps, values = zip(*history[name], strict=True)
        axis.plot(steps, values, marker="." if len(steps) < 50 else None)
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    for axis in axes:  # those that are left over
        axis.set_axis_off()
