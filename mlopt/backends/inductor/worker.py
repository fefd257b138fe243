"""Compiles one `GraphSpec` at a time: the program that `pool.py` starts, and the function it runs.

Protocol: ``"ready"`` on standard output; then one pickled `Job` after the other on standard input and a pickled
`Result` for each on standard output, until standard input ends.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import struct
import sys
import time
import traceback
from typing import IO, Any

import torch

from mlopt.backends.inductor.small import c_shims
from mlopt.backends.inductor.spec import GraphSpec, sympy_symbol

_MANY, _SMALL = 100, 1 << 17  # operations, and numbers in all inputs


@dataclasses.dataclass(frozen=True)
class Job:
    """A graph to compile.

    Attributes:
        spec: The graph.
        options: Settings of Inductor.
        path: Where to write the package; ends in ``.pt2``.
    """

    spec: GraphSpec
    options: tuple[tuple[str, Any], ...]
    path: str


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a job.

    Attributes:
        error: Why there is no package, or None.
        guards: Conditions on the symbols ``x0``, ``x1``, ... under which the package is right, as Python expressions;
            Inductor may specialize a free size.
        seconds: Time it took.
    """

    error: str | None
    guards: tuple[str, ...]
    seconds: float


def options(spec: GraphSpec) -> tuple[tuple[str, Any], ...]:
    """Return what Inductor is asked for by this process; part of the cache key."""
    shared = (
        ("aot_inductor.package", True),
        # The wrapper's calls take as long as with the default, -O1 (at -O0 half as long again); compiling takes a sixth
        # less. The loops are a file of their own, with -O3.
        ("aot_inductor.compile_wrapper_opt_level", "Og"),
        # Eager torch's generators draw: the same dropout masks from the same state, without which nothing agrees.
        ("fallback_random", True),
        # Residuals go from one package to the next, which expects the strides that the trace had.
        ("keep_output_stride", True),
        # The loops are generated for a number of threads: that of this process, not of the one that compiles.
        ("cpp.threads", torch.get_num_threads()),
    )
    # One allocation for all that is computed on the way. In a graph of many small operations the allocations take as
    # long as a third of the work; in others Inductor's own reuse of buffers does as well.
    return (*shared, ("memory_planning", True)) if _has_many_small(spec) else shared


def _has_many_small(spec: GraphSpec) -> bool:
    hints = {sympy_symbol(k): symbol.hint for k, symbol in enumerate(spec.symbols)}
    numbers = sum(math.prod(int(n.xreplace(hints)) for n in x.sizes) for x in spec.inputs)
    on_cpu = all(x.device.type == "cpu" for x in spec.inputs)
    return on_cpu and len(spec.nodes) >= _MANY and numbers <= _SMALL


def run_job(job: Job) -> Result:
    """Compile a graph into a package."""
    from torch._inductor.compile_fx import compile_fx_aot
    from torch._inductor.package import package_aoti

    start = time.perf_counter()
    module, inputs, shape_env, symbols = job.spec.rebuild()
    with torch.no_grad():
        files: Any = compile_fx_aot(module, [*inputs], config_patches={**dict(job.options), **c_shims(job.spec)})
    package_aoti(job.path, files)
    return Result(None, _guards(shape_env, symbols), time.perf_counter() - start)


def _guards(shape_env: Any, symbols: list[Any]) -> tuple[str, ...]:
    from torch.utils._sympy.printers import PythonPrinter

    names = {symbol: sympy_symbol(k) for k, symbol in enumerate(symbols)}
    conditions = [guard.expr for guard in shape_env.guards]
    found = []
    for condition in conditions:
        if not condition.free_symbols <= set(symbols):
            raise RuntimeError(f"the compiled graph depends on a size that nobody gave: {condition}")
        found.append(PythonPrinter().doprint(condition.xreplace(names)))
    return tuple(dict.fromkeys(found))


def read(stream: IO[bytes]) -> Any:
    """Read one pickled object; raises EOFError at the end of the stream."""
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", header)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def write(stream: IO[bytes], value: Any) -> None:
    """Write one object for `read`."""
    data = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def main() -> None:
    """Serve jobs until standard input ends."""
    # Compilers and torch print to standard output; the results get a descriptor of their own.
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    write(results, "ready")
    while True:
        try:
            job = read(sys.stdin.buffer)
        except EOFError:
            return
        start = time.perf_counter()
        try:
            result = run_job(job)
        except Exception as error:  # whatever Inductor raises: the graph runs by the eager backend then
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            result = Result(f"{type(error).__name__}: {lines[0][:300]}", (), time.perf_counter() - start)
        write(results, result)
