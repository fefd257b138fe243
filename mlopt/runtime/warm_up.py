"""`WarmUp`: train on eager graphs while machine code is compiled, and change over between two steps.

The graphs are the same, so a run goes on with the numbers that it has, up to rounding. Compiling is done by processes
of low priority that a thread waits for; loading the packages too. What touches the live program, a comparison of the
compiled graphs with the eager ones on a batch, and the change, is done between steps by the thread that trains.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Sequence

from mlopt.backends import AbstractBackend
from mlopt.errors import BackendWarning
from mlopt.runtime.derivatives import DerivativeGraphs, GraphDerivatives

logger = logging.getLogger(__name__)

#: Takes (problem, eager derivatives, compiled ones); returns whether to change over, None if it cannot be told yet.
Accept = Callable[[str, GraphDerivatives, GraphDerivatives], bool | None]


class WarmUp:
    """Compiles derivatives in the background.

    Args:
        captures: (problem, derivatives that run by the eager backend, their graphs to compile).
        backend: Compiles them; built with `cancelled`.
        cancelled: Set by `stop`.
        accept: Compares, in the thread that calls `poll`.
        done: Called once when everything that could be changed has been.
    """

    def __init__(
        self,
        captures: Sequence[tuple[str, GraphDerivatives, DerivativeGraphs]],
        backend: AbstractBackend,
        cancelled: threading.Event,
        accept: Accept,
        done: Callable[[AbstractBackend], None],
    ) -> None:
        self._captures = captures
        self._backend = backend
        self._cancelled = cancelled
        self._accept = accept
        self._done = done
        self._compiled: list[GraphDerivatives] = []
        self._error: Exception | None = None
        self._pending: list[tuple[str, GraphDerivatives, GraphDerivatives]] | None = None
        self._thread = threading.Thread(target=self._compile, name="mlopt warm-up", daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be done."""
        return self._pending is not None and not self._pending

    def poll(self) -> bool:
        """Change over to what is compiled; call between steps.

        Returns:
            Whether some derivatives run by other code now.
        """
        if self.finished or self._thread.is_alive() or self._cancelled.is_set():
            return False
        if self._pending is None:
            self._report_failures()
            pairs = zip(self._captures, self._compiled, strict=False)  # after an error there are none
            self._pending = [(name, live, compiled) for (name, live, _), compiled in pairs]
        changed, waiting = False, []
        for name, live, compiled in self._pending:
            accepted = self._accept(name, live, compiled)
            if accepted is None:
                waiting.append((name, live, compiled))
            elif accepted:
                live.adopt(compiled)
                changed = True
        self._pending = waiting
        if not waiting and self._error is None:
            self._done(self._backend)
        return changed

    def wait(self, timeout: float | None = None) -> None:
        """Wait until compiling is over; the next `poll` changes over."""
        self._thread.join(timeout)

    def stop(self) -> None:
        """End the compiling processes. What they had finished is in the cache."""
        self._cancelled.set()
        self._thread.join()

    def _compile(self) -> None:
        try:
            graphs = [graphs for *_, graphs in self._captures]
            self._backend.prepare([module for g in graphs for module in g.modules().values()])
            if not self._cancelled.is_set():
                self._compiled = [GraphDerivatives(g, self._backend) for g in graphs]
        except Exception as error:  # reported by the thread that trains, which goes on
            logger.debug("the warm-up failed", exc_info=True)
            self._error, self._compiled = error, []

    def _report_failures(self) -> None:
        lowerings = [lowering for compiled in self._compiled for lowering in compiled.lowerings().values()]
        failed = [lowering.note for lowering in lowerings if "not compiled" in lowering.note]
        if self._error is not None:
            reason = f"{type(self._error).__name__}: {self._error}"
            text = f"compiling in the background failed ({reason})"
        elif failed:
            text = f"{len(failed)} of {len(lowerings)} graphs were not compiled in the background ({failed[0]})"
        else:
            return
        warnings.warn(f"warm_up: {text}; they run eagerly, with the same results", BackendWarning, stacklevel=3)
