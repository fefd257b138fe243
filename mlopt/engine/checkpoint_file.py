"""One checkpoint as a file: what `torch.save` writes, and after it a checksum by which damage is noticed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from mlopt.engine.files import replacing
from mlopt.errors import CheckpointError

_MARK = b"mlopt checkpoint, sha256:"
_SIZE = hashlib.sha256().digest_size


class _Hashing(io.RawIOBase):
    """Passes on what is written, and hashes it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.hash.update(data)
        return self._file.write(data)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state durably, whole or not at all.

    Args:
        path: The file.
        state: Plain data and tensors.
    """
    with replacing(path) as file:
        hashing = _Hashing(file)
        torch.save(dict(state), cast(IO[bytes], hashing))
        file.write(_MARK + hashing.hash.digest())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state; its tensors are on the CPU.

    Raises:
        CheckpointError: The file is not what was written.
        FileNotFoundError: There is none.
    """
    content = memoryview(path.read_bytes())
    end = len(content) - len(_MARK) - _SIZE
    if end <= 0 or content[end : end + len(_MARK)] != _MARK:
        raise CheckpointError(f"checkpoint {path}: it is no checkpoint of mlopt, or its end is missing")
    if hashlib.sha256(content[:end]).digest() != content[end + len(_MARK) :]:
        raise CheckpointError(f"checkpoint {path}: it is damaged (its checksum differs)")
    return torch.load(io.BytesIO(content[:end]), map_location="cpu", weights_only=True)
