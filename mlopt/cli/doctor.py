"""``python -m mlopt doctor``: what is there on this machine, what is missing, and what to do about it."""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mlopt import backends, ops
from mlopt.backends.inductor.cache import default_directory

_TORCH = ((2, 11), (2, 16))  # from, to excluded; as in pyproject.toml
_OPTIONAL = {
    "matplotlib": "figures of the examples and curves of a run",
    "tensorboard": "the TensorBoard logger",
    "wandb": "the W&B logger",
}


class State(enum.Enum):
    """How one thing was found."""

    GOOD = "ok"
    NOTE = "note"  # mlopt works, slower or with less
    BAD = "BAD"  # must be repaired


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: What was looked at.
        state: How it was found.
        facts: What was found.
        advice: What to do, where there is something to do.
    """

    subject: str
    state: State
    facts: str
    advice: str = ""


def doctor(*, quick: bool = False) -> int:
    """Print what was found, line by line as it is found.

    Args:
        quick: Leave out compiling and running a small graph.

    Returns:
        0, or 1 if something must be repaired.
    """
    compiling: list[Callable[[], Iterator[Finding]]] = [] if quick else [_inductor]
    examinations = [_torch, _extension, _compiler, _cuda, *compiling, _cache, _settings, _optional]
    worst = 0
    for examine in examinations:
        for finding in examine():
            worst |= finding.state is State.BAD
            print(f"{finding.state.value:>4}  {finding.subject:<17}  {finding.facts}", flush=True)
            if finding.advice:
                print(f"{'':25}-> {finding.advice}", flush=True)
    print("something must be repaired" if worst else "mlopt can be used on this machine")
    return int(worst)


def _torch() -> Iterator[Finding]:
    yield Finding("python", State.GOOD, f"{platform.python_version()} ({sys.executable})")
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = (
        f"{torch.__version__}, {torch.get_num_threads()} threads on {cores} cores, "
        f"instruction set {torch.backends.cpu.get_cpu_capability()}"
    )
    low, high = (".".join(map(str, bound)) for bound in _TORCH)
    if _TORCH[0] <= version < _TORCH[1]:
        yield Finding("torch", State.GOOD, facts)
    else:
        yield Finding("torch", State.BAD, facts, f"mlopt is tested with torch >= {low}, < {high}: install one of these")


def _extension() -> Iterator[Finding]:
    if os.environ.get("MLOPT_DISABLE_EXTENSION") == "1":
        advice = "unset MLOPT_DISABLE_EXTENSION to use the native kernels, solver loops and compiled graphs"
        yield Finding("native extension", State.NOTE, "switched off", advice)
        return
    lacking = ops.missing()
    if lacking is not None:
        advice = f"build it: {ops.BUILD_COMMAND}. Until then everything runs by torch calls, slower"
        yield Finding("native extension", State.NOTE, lacking, advice)
        return
    config = ops.build_config()
    cuda = f"CUDA {config['cuda']}" if config["cuda"] else "no CUDA kernels"
    yield Finding("native extension", State.GOOD, f"for torch {config['torch']}, g++ {config['compiler']}, {cuda}")


def _compiler() -> Iterator[Finding]:
    command = os.environ.get("CXX", "g++")
    path = shutil.which(command)
    if path is None:
        advice = "install g++ (Debian: apt install g++) or set CXX. Until then backend='auto' runs by torch calls"
        yield Finding("C++ compiler", State.NOTE, f"{command} was not found", advice)
        return
    yield Finding("C++ compiler", State.GOOD, f"{_first_line([path, '--version'])} ({path})")


def _inductor() -> Iterator[Finding]:
    if backends.inductor.missing() is not None:
        return  # the lines above say why
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        yield _small_graph(device)


def _small_graph(device: str) -> Finding:
    """Compile and run a small graph."""
    subject = "inductor backend" if device == "cpu" else "inductor on CUDA"
    start = time.perf_counter()
    x = torch.linspace(0, 1, 100, dtype=torch.float64, device=device)
    module = make_fx(lambda x: (torch.sin(x) * 2,))(x)
    with tempfile.TemporaryDirectory() as directory:
        compiled = backends.InductorBackend(directory).lower(module)
        (found,) = compiled(x)
    seconds = time.perf_counter() - start
    lowering = compiled.lowering
    if lowering.backend != "inductor":
        state = State.BAD if device == "cpu" else State.NOTE  # a toolkit is no part of torch
        advice = "compiled graphs cannot be used there until this is repaired; backend='auto' runs by torch calls"
        return Finding(subject, state, lowering.note, advice)
    if not torch.allclose(found, torch.sin(x) * 2, rtol=1e-12):
        return Finding(subject, State.BAD, "a small graph gave wrong numbers", "use backend='eager'")
    return Finding(subject, State.GOOD, f"compiled and ran a small graph in {seconds:.0f} s")


def _cuda() -> Iterator[Finding]:
    nvcc = shutil.which("nvcc")
    compiler = _first_line([nvcc, "--version"], last=True) if nvcc else "no nvcc"
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield Finding("CUDA", State.GOOD, f"no device ({built}; {compiler})")
        return
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    facts = f"{names}; torch for CUDA {torch.version.cuda}; {compiler}"
    if ops.missing() is None and ops.build_config()["cuda"] is None:
        advice = f"install nvcc and build the extension again with MLOPT_CUDA=1: {ops.BUILD_COMMAND}"
        yield Finding("CUDA", State.NOTE, f"{facts}; the native extension has no CUDA kernels", advice)
    else:
        yield Finding("CUDA", State.GOOD, facts)


def _cache() -> Iterator[Finding]:
    directory = default_directory()
    if not directory.exists():
        yield Finding("cache", State.GOOD, f"{directory} (made when the first graph is compiled)")
        return
    packages = list(directory.rglob("*.pt2"))
    size = sum(path.stat().st_size for path in packages) / 2**20
    free = shutil.disk_usage(directory).free / 2**20
    facts = f"{directory}: {len(packages)} compiled graphs, {size:.0f} MiB; {free:,.0f} MiB free on the disk"
    if not os.access(directory, os.W_OK):
        advice = "make it writable, or set MLOPT_CACHE_DIR; every run compiles everything again"
        yield Finding("cache", State.NOTE, f"{facts}; not writable", advice)
    elif free < 200:
        yield Finding("cache", State.NOTE, facts, f"make room; rm -r {directory} is safe")
    else:
        yield Finding("cache", State.GOOD, facts)


def _settings() -> Iterator[Finding]:
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MLOPT_")}
    facts = ", ".join(f"{name}={value}" for name, value in found.items())
    yield Finding("environment", State.GOOD, facts or "no MLOPT_... variable is set")


def _optional() -> Iterator[Finding]:
    for package, purpose in _OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            yield Finding(package, State.GOOD, f"not installed; wanted for {purpose}: pip install {package}")
        else:
            yield Finding(package, State.GOOD, "installed")


def _first_line(command: list[str], *, last: bool = False) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{Path(command[0]).name} does not run: {error}"
    lines = text.strip().splitlines() or [""]
    return lines[-1] if last else lines[0]
