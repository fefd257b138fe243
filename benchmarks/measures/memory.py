"""How much memory do outer iterations take beyond the modules and the data?

    python -m benchmarks.measures.memory resnet cg mlopt

Each method runs in a process of its own. Linux lets a process reset its peak of resident memory; what is reported is
the peak over two outer iterations after the first, less the resident memory once modules and data were there. So it
counts graphs, packages and caches of the method, and not what compiling needed for a moment.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.methods import METHODS
from benchmarks.problems import PROBLEMS

ROOT = Path(__file__).parents[2]


def peak_memory(problem: str, case: str, method: str, *, threads: int, smoke: bool) -> float:
    """Return the peak in MiB, measured in a process of its own."""
    arguments = [problem, case, method, str(threads), str(int(smoke))]
    result = subprocess.run(
        [sys.executable, "-m", __name__, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(result.stdout.split()[-1])


def _status(field: str) -> float:
    (found,) = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(found) / 1024


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def main(problem: str, case: str, method: str, threads: str, smoke: str) -> None:
    """Measure in this process and print."""
    torch.set_num_threads(int(threads))
    import mlopt  # noqa: F401 - its libraries are no part of any method's memory

    instance = PROBLEMS[problem].make(torch.float32, bool(int(smoke)))
    _settle()
    before = _status("VmRSS")
    runner = METHODS[method](instance, case, problem)
    runner.outer()
    _settle()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        runner.outer()
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
