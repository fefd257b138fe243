"""`Checkpoints`: which states of a run are kept in a folder, and which one a run goes on from.

In a distributed run every rank keeps its own state (its position in the data and its random numbers are its own), and
all of them go on from the same step.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlopt.engine import ranks
from mlopt.engine.checkpoint_file import read_checkpoint, write_checkpoint
from mlopt.engine.files import remove_leftovers, write_text
from mlopt.engine.stopping import MODES, find_metric, is_better
from mlopt.errors import CheckpointError, CheckpointWarning

_NAME = re.compile(r"step-(\d+)(?:\.rank-(\d+)-of-(\d+))?\.ckpt")


class Checkpoints:
    """Keeps states of an `Engine` run on the disk.

    A state is written every so many steps, when validation gives a new best value, at the end, and when the process is
    asked to end (SIGTERM, Ctrl-C). A file is there whole or not at all, and has a checksum. Older files are removed
    once a newer one is on the disk. So are those of later steps than the present one, which a run that goes on from an
    earlier state has left behind.

    Args:
        every: Interval in steps.
        keep_last: How many of the last ones are kept.
        best: A number that `validate` returns, by which the best state is kept besides; ``best.json`` tells which.
        mode: ``"min"`` if a smaller one is better, ``"max"`` if a larger one is.
        dir: The folder; default: ``checkpoints`` in the `run_dir` of the engine.

    Attributes:
        folder: The folder; None until an engine has said where its `run_dir` is.
        best_value: The best value so far; None before the first, or without `best`.
        best_step: The step of the best state.

    Raises:
        ValueError: A count that is not a positive integer, or an unknown mode.
    """

    def __init__(
        self,
        every: int = 1000,
        *,
        keep_last: int = 3,
        best: str | None = None,
        mode: str = "min",
        dir: str | os.PathLike[str] | None = None,  # noqa: A002 - as users call it
    ) -> None:
        for argument, value in (("every", every), ("keep_last", keep_last)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Checkpoints, argument `{argument}`: expected an integer >= 1, got {value!r}")
        if mode not in MODES:
            raise ValueError(f"Checkpoints, argument `mode`: expected 'min' or 'max', got {mode!r}")
        self.every = every
        self.keep_last = keep_last
        self.best = best
        self.mode = mode
        self.folder = None if dir is None else Path(dir)
        self.best_value: float | None = None
        self.best_step: int | None = None

    def update_best(self, step: int, values: Mapping[str, float]) -> bool:
        """Whether the results of a validation are the best so far, which are then remembered."""
        if self.best is None:
            return False
        value = find_metric(self.best, values, "Checkpoints(best=...)")
        if not is_better(value, self.best_value, self.mode):
            return False
        self.best_value, self.best_step = value, step
        return True

    def write(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a state, then remove what is not to be kept.

        Args:
            step: The global step.
            state: Plain data and tensors.

        Returns:
            The file.
        """
        folder = self._folder()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _name(step)
        write_checkpoint(path, state)
        ranks.gather(None)  # nothing is removed before all ranks have written theirs
        if ranks.rank() == 0 and self.best_step is not None:
            self._write_best()
        present = files(folder)
        kept = sorted((s for s in present if s <= step), reverse=True)[: self.keep_last]
        for number, file in present.items():
            if number not in kept and number != self.best_step:
                file.unlink(missing_ok=True)
        return path

    def is_empty(self) -> bool:
        """Whether there is no checkpoint in the folder yet."""
        folder = self._folder()
        return not folder.is_dir() or not any(_NAME.fullmatch(path.name) for path in folder.iterdir())

    def clean(self) -> None:
        """Remove what a run that was killed had begun to write."""
        folder = self._folder()
        if ranks.rank() == 0 and folder.is_dir():
            remove_leftovers(folder)

    def state_dict(self) -> dict[str, Any]:
        """Return what is the best so far as plain data."""
        return {"best_value": self.best_value, "best_step": self.best_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best_value, self.best_step = state["best_value"], state["best_step"]

    def _folder(self) -> Path:
        assert self.folder is not None, "the engine has checked it"
        return self.folder

    def _write_best(self) -> None:
        assert self.best_step is not None
        best = {"step": self.best_step, "metric": self.best, "value": self.best_value, "file": _name(self.best_step)}
        write_text(self._folder() / "best.json", json.dumps(best) + "\n")


def files(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of this rank in a folder by their steps."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.name == _name(int(match[1])):
            found[int(match[1])] = path
    return found


def newest(folder: Path) -> dict[str, Any] | None:
    """Return the last intact state in a folder, the same on all ranks; None if there are no checkpoints.

    Warns of each damaged one, and takes the one before it.

    Raises:
        CheckpointError: There are checkpoints, and none of them can be used.
    """
    present = files(folder)
    common = set.intersection(*(set(steps) for steps in ranks.gather(list(present))))
    for step in sorted(common, reverse=True):
        try:
            state = read_checkpoint(present[step])
        except CheckpointError as error:
            warnings.warn(f"{error}; the one before it is tried", CheckpointWarning, stacklevel=4)
            state = None
        if all(ranks.gather(state is not None)):
            return state
    others = [path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    if any(ranks.gather(bool(others))):
        raise CheckpointError(
            f"{folder}: none of the {len(others)} checkpoints can be used: they are damaged, or of another number of "
            f"ranks than {ranks.num_ranks()}. Remove them to begin anew"
        )
    return None


def _name(step: int) -> str:
    of_rank = f".rank-{ranks.rank()}-of-{ranks.num_ranks()}" if ranks.num_ranks() > 1 else ""
    return f"step-{step:09d}{of_rank}.ckpt"
