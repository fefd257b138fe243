"""The only clock of the benchmarks, and the record of where a number comes from.

A time is the median over samples; a sample is a number of calls between two waits for the device, divided by that
number, so that short calls are not lost in the clock's resolution and launches overlap as they do in a solver.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the quartiles as the spread."""

    median: float
    lower: float
    upper: float
    samples: int
    calls_per_sample: int


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work queued so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    call: Callable[[], Any], device: torch.device, *, samples: int = 21, sample_seconds: float = 0.02
) -> Timing:
    """Time `call`; it must be repeatable and must not wait for the device itself."""

    def sample(calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    sample(3)  # warm-up: allocator, code, caches, clock rates
    calls = max(1, round(sample_seconds / max(sample(3), 1e-9)))
    times = [sample(calls) for _ in range(samples)]
    lower, median, upper = statistics.quantiles(times, n=4)
    return Timing(median, lower, upper, samples, calls)


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
        "device": name,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "num_threads": torch.get_num_threads(),
    }


def write_results(folder: Path, device: torch.device, results: dict[str, Any]) -> Path:
    """Write results as JSON to ``<cpu|gpu>-<device name>.json`` in `folder`."""
    kind = "gpu" if device.type == "cuda" else "cpu"
    name = "".join(c if c.isalnum() else "-" for c in results["environment"]["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
