"""`JSONLLogger`: one JSON object per line and step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from mlopt.engine.files import write_text
from mlopt.engine.loggers.base import AbstractLogger


class JSONLLogger(AbstractLogger):
    """Writes a file of lines like ``{"step": 10, "seconds": 0.4, "classifier.loss": 0.7}``.

    Numbers that are not finite, which JSON does not have, are written as the strings "nan", "inf" and "-inf".

    Args:
        path: The file. A new run replaces it, a resumed run goes on with it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: IO[str] | None = None

    def start(self, step: int, config: Mapping[str, Any]) -> None:
        """Begin a file, or drop the lines after `step` from the one that is there."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if step and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        self._file = self.path.open("a")

    def log(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Append a line."""
        assert self._file is not None, "start() opens the file"
        numbers = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "seconds": round(seconds, 3), **numbers}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _step(line: str) -> float:
    """Return the step of a line; infinity for one that a run which was killed has left half written."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
