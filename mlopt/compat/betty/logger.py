"""The logger of a Betty script: messages by ``logging``, numbers by a logger of mlopt's."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from typing import Any

import mlopt
from mlopt.engine.metrics import flatten
from mlopt.errors import ProblemError

_messages = logging.getLogger("mlopt.compat.betty")


class Logger:
    """``info``, ``warning`` and ``log`` as in Betty.

    Args:
        logger_type: ``"tensorboard"``, ``"wandb"`` or ``"none"``.

    Where what it needs is not installed, a warning says so, and nothing is logged but messages.

    Raises:
        ProblemError: Another type.
    """

    def __init__(self, logger_type: str) -> None:
        if logger_type not in ("tensorboard", "wandb", "none"):
            raise ProblemError(
                f"EngineConfig(logger_type=...): expected 'tensorboard', 'wandb' or 'none', got {logger_type!r}"
            )
        self.inner: Any = None
        try:
            if logger_type == "tensorboard":
                self.inner = mlopt.TensorBoardLogger("runs")
            elif logger_type == "wandb":
                self.inner = mlopt.WandbLogger()
        except ImportError as error:
            warnings.warn(
                f"EngineConfig(logger_type={logger_type!r}): numbers are not logged, only written as messages: {error}",
                UserWarning,
                stacklevel=3,
            )
        self._started = False
        self._began = 0.0

    def info(self, message: str) -> None:
        """Say something."""
        _messages.info(message)

    def warning(self, message: str) -> None:
        """Say something that matters."""
        _messages.warning(message)

    def debug(self, message: str) -> None:
        """Say something that hardly matters."""
        _messages.debug(message)

    def error(self, message: str) -> None:
        """Say what is wrong."""
        _messages.error(message)

    def start(self, config: dict[str, Any]) -> None:
        """Begin."""
        if self.inner is not None and not self._started:
            self.inner.start(0, config)
            self._started, self._began = True, time.monotonic()

    def close(self) -> None:
        """End."""
        if self._started:
            self.inner.close()
            self._started = False

    def log(self, stats: Any, tag: str | None = None, step: int | None = None) -> None:
        """Log numbers under ``tag.name``, those in nested dicts as ``tag.outer/inner``."""
        numbers = flatten(stats) if isinstance(stats, Mapping) else {"value": float(stats)}
        named = {f"{tag}.{name}" if tag else name: value for name, value in numbers.items()}
        text = ", ".join(f"{name}: {value:.6g}" for name, value in named.items())
        _messages.info("[step %s] %s", step, text)
        if self._started:
            self.inner.log(step or 0, time.monotonic() - self._began, named)
