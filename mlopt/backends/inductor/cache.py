"""The disk cache of compiled packages.

An entry is a record ``<key>.json`` and the package it names by its contents, ``<key>-<sha256>.pt2``. Both are written
under another name and moved into place, the record last, so that processes that write one entry at once leave a whole
one: that of the last. A package whose contents do not match its name is dropped and compiled again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def default_directory() -> Path:
    """Return ``$MLOPT_CACHE_DIR``, by default ``~/.cache/mlopt``."""
    return Path(os.environ.get("MLOPT_CACHE_DIR") or Path.home() / ".cache" / "mlopt")


@functools.cache
def machine() -> str:
    """Describe what machine code depends on besides the graph: torch, and the processor it is generated for."""
    flags = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    parts = [torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine(), flags]
    if torch.cuda.is_available():
        parts.append(str(torch.cuda.get_device_capability()))
    return " ".join(parts)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A compiled package.

    Attributes:
        path: The package.
        guards: Conditions on the free sizes under which it is right.
        seconds: What compiling it took.
    """

    path: Path
    guards: tuple[str, ...]
    seconds: float


class DiskCache:
    """Packages by key.

    Args:
        directory: Where they lie; made if it is missing.
    """

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.directory = (Path(directory) if directory is not None else default_directory()) / "inductor"
        self._used: set[Path] = set()

    def get(self, key: str) -> Entry | None:
        """Return an entry whose package is whole, or None."""
        try:
            record = json.loads((self.directory / f"{key}.json").read_text())
            path = self.directory / record["package"]
            if path.name == _package_name(key, _sha256(path)):
                self._used |= {path, self.directory / f"{key}.json"}
                return Entry(path, tuple(record["guards"]), float(record["seconds"]))
            problem = "its contents have changed"
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        logger.warning("cache entry %s in %s is damaged and is compiled again (%s)", key[:12], self.directory, problem)
        return None

    def new_package(self) -> Path:
        """Return a path in the cache that nobody else uses, for a package to be written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="new-", suffix=".pt2", dir=self.directory)
        os.close(handle)
        return Path(name)

    def put(self, key: str, package: Path, guards: tuple[str, ...], seconds: float) -> Entry:
        """Move a written package into the cache."""
        path = self.directory / _package_name(key, _sha256(package))
        os.replace(package, path)
        record = {"package": path.name, "guards": guards, "seconds": seconds}
        self._write(f"{key}.json", record)
        self._used |= {path, self.directory / f"{key}.json"}
        return Entry(path, guards, seconds)

    def get_choice(self, key: str) -> tuple[str, str] | None:
        """Return which backend was found to be faster for a graph, and the figures, if that is known."""
        try:
            backend, figures = json.loads((self.directory / f"{key}.choice").read_text())
        except (OSError, ValueError, TypeError):
            return None
        self._used.add(self.directory / f"{key}.choice")
        return str(backend), str(figures)

    def put_choice(self, key: str, backend: str, figures: str) -> None:
        """Remember it, so that the next run computes the same bits."""
        try:
            self._write(f"{key}.choice", (backend, figures))
            self._used.add(self.directory / f"{key}.choice")
        except OSError as error:  # a full disk must not stop a training run
            logger.warning("could not write to the cache %s: %s", self.directory, error)

    def copy_used(self, directory: Path) -> None:
        """Copy the entries that this object has found or made into another cache."""
        target = DiskCache(directory).directory
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._used):
            shutil.copyfile(path, target / path.name)

    def _write(self, name: str, value: object) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix="new-", dir=self.directory)
        with os.fdopen(handle, "w") as file:
            json.dump(value, file)
        os.replace(temporary, self.directory / name)


def _package_name(key: str, checksum: str) -> str:
    return f"{key}-{checksum[:32]}.pt2"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
