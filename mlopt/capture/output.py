"""Notices what a `training_step` prints or logs.

Captured code runs once; a user who prints the loss expects a line per step. Python cannot say in advance what will be
printed, so capture listens while the code runs: output makes the problem an eager island.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import traceback
from collections.abc import Iterator
from unittest import mock

import torch


class OutputListener(io.TextIOBase):
    """Takes the place of standard output and remembers the user's line that first wrote to it.

    Attributes:
        line: ``file:number: code`` of the first output, or None.
    """

    def __init__(self) -> None:
        self.line: str | None = None

    def write(self, text: str) -> int:
        """Swallow the text."""
        self._remember()
        return len(text)

    def _remember(self) -> None:
        if self.line is None:
            frames = [f for f in traceback.extract_stack() if f.filename not in _INTERNAL]
            frame = frames[-1]
            self.line = f"{frame.filename}:{frame.lineno}: {frame.line}"


_INTERNAL = {__file__, logging.__file__, contextlib.__file__, mock.__file__, traceback.__file__}


@contextlib.contextmanager
def holding_back() -> Iterator[None]:
    """Keep back what is written to standard error, and drop it after an error: torch.export prints all of the graph."""
    held = io.StringIO()
    with contextlib.redirect_stderr(held):
        yield
    sys.stderr.write(held.getvalue())


@contextlib.contextmanager
def listening() -> Iterator[OutputListener]:
    """Swallow what is printed to standard output or logged, and tell who did."""
    listener = OutputListener()
    # torch looks for itself while it traces: its own records are not the user's.
    own = torch.__name__

    def handle(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] != own:
            listener._remember()

    with contextlib.redirect_stdout(listener), mock.patch.object(logging.Logger, "handle", handle):
        yield listener


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Swallow what is printed or logged: for passes over a user's code that are no step of the user's program."""
    with listening():
        yield
    sys.stdout.flush()
