"""`CSVLogger`: one row per step, one column per number."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from mlopt.engine.files import write_text
from mlopt.engine.loggers.base import AbstractLogger

_FIRST = ("step", "seconds")


class CSVLogger(AbstractLogger):
    """Writes a CSV file with the columns ``step``, ``seconds`` and one per number, empty where a step has none.

    A number that turns up later adds a column; the file is then written anew. Every row is in the file as soon as it is
    logged.

    Args:
        path: The file. A new run replaces it, a resumed run goes on with it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._columns = list(_FIRST)
        self._file: IO[str] | None = None

    def start(self, step: int, config: Mapping[str, Any]) -> None:
        """Begin a file, or drop the rows after `step` from the one that is there."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, str]] = []
        self._columns = list(_FIRST)
        if step and self.path.exists():
            self._columns, rows = self._read()
        self._write(row for row in rows if int(row["step"]) <= step)

    def log(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Append a row."""
        new = [name for name in values if name not in self._columns]
        if new:
            rows = self._read()[1]
            self._columns += new
            self._write(rows)
        assert self._file is not None, "start() opens the file"
        self._rows(self._file, [{"step": step, "seconds": f"{seconds:.3f}", **values}])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or _FIRST)
            # A run that was killed may have left part of a row at the end.
            return columns, [row for row in reader if None not in row.values() and row["step"].isdigit()]

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.close()
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerow(self._columns)
        self._rows(text, rows)
        write_text(self.path, text.getvalue())
        self._file = self.path.open("a", newline="")

    def _rows(self, file: IO[str], rows: Iterable[Mapping[str, Any]]) -> None:
        csv.DictWriter(file, self._columns, restval="", lineterminator="\n").writerows(rows)
