"""What torch does not find of CUDA by itself when it compiles a package for a GPU.

The headers: torch looks for them beside the folder of `nvcc`, where there are none if `nvcc` is a script that calls the
real one. The driver: packages are linked with ``libcuda.so``, of which toolkits have a stub, but not all of them; every
machine with a GPU has a ``libcuda.so.1``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_USUAL = (Path("/usr/local/cuda"), Path("/usr"))  # where torch looks last, and where compilers look anyway


@functools.cache
def missing() -> str | None:
    """Return what compiling for a GPU lacks here besides what it lacks for a CPU, or None if it can be done.

    Many machines have torch and a driver only; every graph would be tried, for seconds each and in every run.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [Path(given)] if given else [home for home in (_home(), *_USUAL) if home is not None]
    if any((home / "include" / "cuda_runtime_api.h").is_file() for home in homes):
        return None
    return f"no headers of CUDA were found in {', '.join(map(str, homes))}; CUDA_HOME says where its toolkit is"


def variables(directory: Path) -> dict[str, str]:
    """Return environment variables by which a compiling process finds both; none where this process uses no GPU.

    Args:
        directory: An empty one, for a link to the driver; lives as long as that process.
    """
    driver = _driver()
    if driver is None:
        return {}
    (directory / "libcuda.so").symlink_to(driver)
    found = {"LIBRARY_PATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("LIBRARY_PATH")]))}
    home = None if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") else _home()
    if home is not None:
        found["CUDA_HOME"] = str(home)
    return found


def _home() -> Path | None:
    """Return the toolkit that `nvcc` belongs to, by what it says itself."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    steps = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"TOP=(.+)", steps)
    return Path(top.group(1)).resolve() if top else None


def _driver() -> Path | None:
    """Return the driver's library that this process has loaded."""
    try:
        found = re.search(r"\S*/libcuda\.so\S*", _MAPS.read_text())
    except OSError:
        return None
    return Path(found.group()) if found else None
