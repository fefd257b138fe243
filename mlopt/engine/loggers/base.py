"""`AbstractLogger`: what an `Engine` asks of a place for numbers."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any


class AbstractLogger(abc.ABC):
    """Takes the numbers of a run; write `log` to have one of your own.

    An `Engine` calls `start` when a run begins, `log` at every step at which there are numbers, and `close` at its end,
    also after an error. In a distributed run only rank 0 does.
    """

    def start(self, step: int, config: Mapping[str, Any]) -> None:  # noqa: B027 - need not be overridden
        """Get ready.

        Args:
            step: The global steps already made: 0 for a new run; else the run goes on from there, and entries of later
                steps, which a run that was cut off has left, are to be dropped.
            config: The options of the run as plain data.
        """

    @abc.abstractmethod
    def log(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Write the numbers of one step.

        Args:
            step: The global step.
            seconds: Time spent on the run so far.
            values: ``"problem.metric"``, or a name from `validate` -> number.
        """

    def close(self) -> None:  # noqa: B027 - need not be overridden
        """Write what is not written yet."""
