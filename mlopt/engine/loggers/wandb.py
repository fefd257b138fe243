"""`WandbLogger`: Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlopt.engine.loggers.base import AbstractLogger


class WandbLogger(AbstractLogger):
    """Logs the numbers to a run of Weights & Biases, with the options of the engine as its config.

    Args:
        init: Arguments of ``wandb.init``: ``project="...", name="..."``. To go on with a run after resuming, give it an
            ``id`` and ``resume="allow"``; W&B then ignores entries of steps that it has already.

    Raises:
        ImportError: The package ``wandb`` is not installed.
    """

    def __init__(self, **init: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"WandbLogger needs the package wandb: pip install wandb ({error})") from error
        self._wandb = wandb
        self._init = init
        self._run: Any = None

    def start(self, step: int, config: Mapping[str, Any]) -> None:
        """Begin the run on the server."""
        self.close()
        self._run = self._wandb.init(**{"config": dict(config), **self._init})

    def log(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._run.log({**values, "seconds": seconds}, step=step)

    def close(self) -> None:
        """End the run on the server."""
        if self._run is not None:
            self._run.finish()
            self._run = None
