"""`InductorBackend`: graphs as machine code."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import fx

from mlopt import ops
from mlopt.backends.base import AbstractBackend, Compiled, Lowering
from mlopt.backends.eager import EagerGraph
from mlopt.backends.inductor import toolkit, worker
from mlopt.backends.inductor.cache import DiskCache, Entry, machine
from mlopt.backends.inductor.choice import MeasuredGraph
from mlopt.backends.inductor.interface import CallPlan, cut_interface
from mlopt.backends.inductor.lowered import LoweredGraph
from mlopt.backends.inductor.pool import compile_jobs
from mlopt.backends.inductor.pooling import localize_pools
from mlopt.backends.inductor.small import lower_small_products
from mlopt.backends.inductor.spec import GraphSpec, UnsupportedGraphError
from mlopt.backends.inductor.thin import fuse_thin_products

logger = logging.getLogger(__name__)

# Raised when packages of an older mlopt must not be used any more: the meaning of a spec or of a call has changed.
_FORMAT = 1

_DEVICES = ("cpu", "cuda")


@functools.cache
def missing() -> str | None:
    """Return what the Inductor backend lacks here, or None if it can be used."""
    if not ops.available():
        return "the native extension of mlopt is not built"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) was found"
    return None


@dataclasses.dataclass
class _Lowered:
    """A graph on its way: what is compiled, and what came of it."""

    spec: GraphSpec | None = None
    plan: CallPlan | None = None
    num_small: int = 0  # products by the kernel
    options: tuple[tuple[str, object], ...] = ()
    key: str = ""
    entry: Entry | None = None
    cached: bool = False
    error: str | None = None

    def lacking(self) -> str | None:
        """Return why it cannot be compiled here, though it can be called if it was compiled elsewhere; or None."""
        assert self.spec is not None
        kinds = {x.device.type for x in self.spec.inputs}
        others = ", ".join(sorted(kinds - {*_DEVICES}))
        if others:
            return f"packages are for CPUs and CUDA GPUs, not for {others}"
        return toolkit.missing() if "cuda" in kinds else None


class InductorBackend(AbstractBackend):
    """Compiles graphs with AOTInductor and calls the packages without Python per tensor.

    A graph that cannot be compiled runs eagerly; `Lowering.note` says why.

    Args:
        cache_dir: Where packages are kept; default: see `mlopt.backends.inductor.cache`.
        measure: Keep, per graph, whichever of eager and compiled is faster on its first call.
        cancelled: Given where this backend works beside a training run: see `compile_jobs`.
    """

    name = "inductor"
    compiles = True

    def __init__(
        self,
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        measure: bool = False,
        cancelled: threading.Event | None = None,
    ) -> None:
        self._cancelled = cancelled
        self._cache = DiskCache(cache_dir)
        self._measure = measure
        self._prepared: dict[fx.GraphModule, _Lowered] = {}
        self._sealed = False
        if measure:
            self.name = "auto"

    def prepare(
        self, modules: Sequence[fx.GraphModule], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Find every graph in the cache or compile it, in parallel processes."""
        if not modules:
            return
        made = {module: self._cut(module) for module in modules}
        jobs: dict[str, tuple[_Lowered, worker.Job]] = {}  # equal graphs are compiled once
        for graph in made.values():
            if graph.spec is None or graph.key in jobs:
                continue
            graph.entry = self._cache.get(graph.key)
            graph.cached = graph.entry is not None
            if graph.entry is not None:
                continue
            # A last batch of another size, say. Compiling for it would stop the training run for minutes.
            late = "it was captured after training had begun, and is not in the cache" if self._sealed else None
            graph.error = late or graph.lacking()
            if graph.error is None:
                jobs[graph.key] = (graph, worker.Job(graph.spec, graph.options, str(self._cache.new_package())))
            else:
                logger.info("a graph runs eagerly: %s", graph.error)
        if jobs:
            self._compile(jobs, progress)
        for graph in made.values():
            if graph.key in jobs:
                graph.entry, graph.error = jobs[graph.key][0].entry, jobs[graph.key][0].error
        self._prepared.update(made)

    def _compile(self, jobs: dict[str, tuple[_Lowered, worker.Job]], progress: Callable[[int, int], None]) -> None:
        count = 0

        def done() -> None:
            nonlocal count
            count += 1
            progress(count, len(jobs))

        progress(0, len(jobs))
        try:
            results = compile_jobs([job for _, job in jobs.values()], done, cancelled=self._cancelled)
            for (key, (graph, job)), result in zip(jobs.items(), results, strict=True):
                graph.error = result.error
                if result.error is None:
                    graph.entry = self._cache.put(key, Path(job.path), result.guards, result.seconds)
                else:
                    logger.info("a graph runs eagerly: %s", result.error)
        finally:
            for _, job in jobs.values():
                Path(job.path).unlink(missing_ok=True)

    def compiles_on(self, device: torch.device) -> bool:
        """Whether graphs on a device are compiled."""
        return device.type in _DEVICES

    def seal(self) -> None:
        """Compile nothing any more; the cache is still looked at."""
        self._sealed = True

    def copy_cache(self, directory: Path) -> None:
        """Copy the packages and choices."""
        self._cache.copy_used(directory)

    def is_prepared(self, module: fx.GraphModule) -> bool:
        """Whether a graph was found or compiled already."""
        return module in self._prepared

    def lower(self, module: fx.GraphModule) -> Compiled:
        """Return the package of a graph, compiled now if it was not prepared."""
        if module not in self._prepared:
            self.prepare([module])
        graph = self._prepared.pop(module)
        if graph.entry is None or graph.spec is None or graph.plan is None:
            return EagerGraph(module, f"not compiled: {graph.error}")
        how = "from the cache" if graph.cached else f"compiled in {graph.entry.seconds:.0f} s"
        if graph.num_small:
            how += f"; {graph.num_small} small product{'s' if graph.num_small > 1 else ''} by kernels"
        try:
            lowered = LoweredGraph(graph.spec, graph.plan, graph.entry, EagerGraph(module), Lowering("inductor", how))
        except RuntimeError as error:  # a library it needs is gone, no space to unpack it, ...
            return EagerGraph(module, f"its package cannot be loaded: {str(error).strip().splitlines()[0]}")
        return MeasuredGraph(lowered, graph.key, self._cache) if self._measure else lowered

    def _cut(self, module: fx.GraphModule) -> _Lowered:
        try:
            # In this order: what becomes a fused loop calls nothing at all.
            lowered, num_small = lower_small_products(fuse_thin_products(localize_pools(module)), self._cache)
            spec, plan = cut_interface(lowered)
            options = worker.options(spec)
        except UnsupportedGraphError as error:
            return _Lowered(error=str(error))
        except Exception as error:  # a graph of a kind never met must not stop the compilation
            logger.debug("a graph could not be read", exc_info=True)
            return _Lowered(error=f"{type(error).__name__}: {error}")
        return _Lowered(spec, plan, num_small, options, spec.digest(str(options), machine(), f"format {_FORMAT}"))
