"""The folder of a saved plan: written whole or not at all, and looked at before anything in it is believed.

manifest.json   versions, the machine, and the checksum of every other file
problems.json   settings of problems and optimizers
program.pkl     the planned instructions and the graphs
state.pt        parameters, optimizers, counters: what `Plan.state_dict` returns
inductor/       compiled packages, and which way of running each graph was found to be faster
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mlopt.backends import machine
from mlopt.errors import SaveError

FORMAT = 1
MANIFEST = "manifest.json"


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new folder that takes the place of `path` if the context ends without an error.

    Raises:
        SaveError: `path` is something else than a saved plan.
    """
    target = Path(path)
    if target.exists() and not (target / MANIFEST).is_file():
        raise SaveError(f"{target} exists and is no saved plan; give another path, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield made
        _write_manifest(made)
        made.chmod(0o755)  # mkdtemp makes it private
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old / "plan")
            os.replace(made, target)
            shutil.rmtree(old)
        else:
            os.replace(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def check(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the manifest of a saved plan, if all its files are whole.

    Raises:
        SaveError: It is none, it is damaged, or it was made by another version of mlopt's format or of torch.
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = dict(manifest["files"])
    except FileNotFoundError:
        raise SaveError(f"{folder} is no saved plan: it has no {MANIFEST}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaveError(f"{folder}: {MANIFEST} is damaged ({type(error).__name__}: {error})") from error
    for key, now, what in (
        ("format", FORMAT, "format"),
        ("torch", torch.__version__, "version of torch"),
        ("python", _python(), "version of Python"),
    ):
        if manifest.get(key) != now:
            raise SaveError(
                f"{folder} was saved with {what} {manifest.get(key)}, here it is {now}: graphs are not portable "
                "between them. Compile the program again and save it"
            )
    for name, checksum in files.items():
        try:
            found = _sha256(folder / name)
        except OSError:
            found = "nothing"
        if found != checksum:
            raise SaveError(
                f"{folder}: {name} is {'missing' if found == 'nothing' else 'damaged'}; save the plan again"
            )
    return dict(manifest)


def is_of_this_machine(manifest: dict[str, Any]) -> bool:
    """Whether the packages hold machine code for this processor."""
    return bool(manifest.get("machine") == machine())


def _write_manifest(folder: Path) -> None:
    files = {p.relative_to(folder).as_posix(): _sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    try:
        mlopt_version = version("mlopt")
    except PackageNotFoundError:  # run from its folder
        mlopt_version = "unknown"
    manifest = {
        "format": FORMAT,
        "mlopt": mlopt_version,
        "torch": torch.__version__,
        "python": _python(),
        "machine": machine(),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
