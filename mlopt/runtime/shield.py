"""`shield`: lets Ctrl-C come before a step is written or after it has been counted, and never in between.

Python runs signal handlers between two instructions of its own. Between the first write of a step and the last counter
that tells of it there are many, and in small programs much of the time is spent there. Everywhere else Ctrl-C comes at
once: a native loop ends by it, and so does the user's code.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch


class Shield(threading.local):
    """Takes the place of the SIGINT handler inside of the context, on the main thread.

    Attributes:
        held: Set to True before something is written; no function, after whose call a handler might run. While it is
            set, the first Ctrl-C waits for `release`, or the end of the context; a second one does not.
    """

    held = False

    def __init__(self) -> None:
        self._previous: Any = None  # the handler, inside of the context
        self._waiting: tuple[int, FrameType | None] | None = None
        self._with_grad = True

    def __enter__(self) -> None:
        """Begin to look at Ctrl-C."""
        self.held = False
        self._with_grad = torch.is_grad_enabled()
        if self._previous is None and threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):  # else nothing is raised anyway
                self._previous = previous
                signal.signal(signal.SIGINT, self._handle)

    def __exit__(self, *error: object) -> None:
        """Put the handler back, and let it have what has come."""
        self.held = False
        torch.set_grad_enabled(self._with_grad)  # Ctrl-C may have come when a `no_grad` was about to end
        previous = self._previous
        if previous is not None and signal.getsignal(signal.SIGINT) == self._handle:
            signal.signal(signal.SIGINT, previous)
        self._previous = None  # only now: until then it may be called
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            previous(*waiting)

    def release(self) -> None:
        """Say that all is counted."""
        self.held = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._previous(*waiting)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.held and self._waiting is None:
            self._waiting = (number, frame)
        else:
            self._previous(number, frame)


shield = Shield()
