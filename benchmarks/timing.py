"""The only clock of the benchmarks: warm-up, synchronization, interleaved repeats, medians."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def wait(device: str) -> None:
    """Wait for the work of a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(functions: dict[str, Callable[[], object]], device: str, *, repeats: int = 15, least: float = 0.02):
    """Time several functions in turn, so that a machine whose speed drifts is unfair to none.

    Args:
        functions: Name -> function without arguments.
        device: ``"cpu"`` or ``"cuda"``; CUDA work is waited for.
        repeats: Timed rounds.
        least: Seconds that one measurement lasts at least; short functions are called several times.

    Returns:
        Name -> {"median_s", "min_s", "max_s", "calls"}; seconds per call.
    """
    calls = {}
    for name, function in functions.items():
        function()
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        calls[name] = max(1, int(least / max(time.perf_counter() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            wait(device)
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {
        name: {"median_s": statistics.median(s), "min_s": min(s), "max_s": max(s), "calls": calls[name]}
        for name, s in seconds.items()
    }


def describe(device: str) -> dict[str, object]:
    """Say what was measured on: device, instruction set of the CPU, torch, threads, commit."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def file_name(device: str, what: str = "") -> str:
    """Name a file of results by the kind of device and its name: ``[what-]gpu-nvidia-h100.json``."""
    name = str(describe(device)["device"]).lower().replace(" ", "-")
    return "-".join(filter(None, [what, "gpu" if device == "cuda" else "cpu", name])) + ".json"


def write(path: Path, result: dict[str, object]) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
