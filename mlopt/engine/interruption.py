"""`Interruption`: being asked to end, and ending between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_WATCHED = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Notes SIGTERM and the first Ctrl-C inside of a ``with`` block; a second Ctrl-C interrupts at once.

    Handlers that were there before are put back at the end, and `leave` hands the signal on to them. Only the main
    thread can have handlers; in another one nothing is noted.

    Attributes:
        received: The signal, or 0.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Watch for signals that are not ignored."""
        if threading.current_thread() is threading.main_thread():
            for number in _WATCHED:
                previous = signal.getsignal(number)
                if previous not in (
                    signal.SIG_IGN,
                    None,
                ):  # None: set by other than Python code, which we cannot restore
                    self._previous[number] = previous
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put the handlers back."""
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def leave(self) -> None:
        """Do what the signal would have done, if there was one; call after the block.

        Raises:
            KeyboardInterrupt: It was Ctrl-C.
            SystemExit: It was SIGTERM; the exit code is the shell's for it, 143.
        """
        if not self.received:
            return
        previous = self._previous.get(self.received)
        if callable(previous):
            previous(self.received, None)
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
