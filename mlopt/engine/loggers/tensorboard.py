"""`TensorBoardLogger`: event files for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlopt.engine.loggers.base import AbstractLogger


class TensorBoardLogger(AbstractLogger):
    """Writes the numbers as scalars; ``tensorboard --logdir folder`` shows them.

    A resumed run writes another event file into the folder, which hides the entries that a run which was cut off made
    after the step from which it goes on.

    Args:
        folder: Where the event files go.

    Raises:
        ImportError: The package ``tensorboard`` is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"TensorBoardLogger needs the package tensorboard: pip install tensorboard ({error})"
            ) from error
        self.folder = Path(folder)
        self._make = SummaryWriter
        self._writer: Any = None

    def start(self, step: int, config: Mapping[str, Any]) -> None:
        """Open an event file."""
        self.close()
        self._writer = self._make(str(self.folder), purge_step=step + 1 if step else None)

    def log(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Add one scalar per number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
