"""`Progress`: how far a run is, on standard error."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


class Progress:
    """A tqdm bar with rate, time left and the latest numbers; a line per tenth of the run where nobody is looking.

    Args:
        total: Steps of the whole run; None if only the time is limited.
        done: Steps made before.
        seconds: Time that the whole run may take, if it is limited.
        enabled: False to show nothing.
    """

    def __init__(self, total: int | None, done: int, seconds: float | None, *, enabled: bool) -> None:
        self._total = total
        self._done = self._first = done
        self._seconds = seconds
        self._enabled = enabled
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._began = time.monotonic()
        self._tenths: int | None = None
        disabled = not (enabled and self._is_terminal)
        self._bar = tqdm(total=total, initial=done, desc="train", unit="step", disable=disabled)

    def update(self, done: int, seconds: float, shown: Mapping[str, float], *, last: bool = False) -> None:
        """Tell how far the run is.

        Args:
            done: Steps made.
            seconds: Time spent.
            shown: The latest numbers.
            last: It is over.
        """
        if not self._enabled:
            return
        advanced, self._done = done - self._done, done
        if self._is_terminal:
            self._bar.set_postfix(self._postfix(seconds, shown), refresh=last)
            self._bar.update(advanced)
            return
        tenths = math.floor(10 * self._part(done, seconds))
        if self._tenths is None:
            self._tenths = math.floor(10 * self._part(done - advanced, 0 if self._total is None else seconds))
        if last or tenths > self._tenths:
            self._tenths = tenths
            line = tqdm.format_meter(
                done,
                self._total,
                time.monotonic() - self._began,
                initial=self._first,
                prefix="train",
                unit="step",
                postfix=", ".join(f"{k}={_short(v)}" for k, v in self._postfix(seconds, shown).items()),
            )
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def _part(self, done: int, seconds: float) -> float:
        by_steps = done / self._total if self._total else 0.0
        return max(by_steps, seconds / self._seconds if self._seconds else 0.0)

    def _postfix(self, seconds: float, shown: Mapping[str, float]) -> dict[str, float | str]:
        if self._seconds is None:
            return dict(shown)
        return {"time left": tqdm.format_interval(max(0.0, self._seconds - seconds)), **shown}


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else tqdm.format_num(value)
