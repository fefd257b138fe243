"""`NativeBackend`: kernels where graphs have their structure, another backend elsewhere."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import fx

from mlopt.backends.base import AbstractBackend, Compiled
from mlopt.backends.eager import EagerGraph
from mlopt.backends.inductor.cache import DiskCache, machine
from mlopt.backends.native.choice import Choice
from mlopt.backends.native.descent import GlmDescent
from mlopt.backends.native.glm import GlmGraph
from mlopt.backends.native.skinny import SkinnyGraph, lower_skinny_products
from mlopt.passes import GlmDescentStructure, find_glm

# Raised when choices of an older mlopt must not be used any more: the kernels have changed, or what packages are.
_FORMAT = 4


class NativeBackend(AbstractBackend):
    """Runs what kernels are written for by them, and everything else by another backend.

    Args:
        other: The other backend.
        cache_dir: Where choices are kept; default: see `mlopt.backends.inductor.cache`.
        name: Name in reports.
    """

    def __init__(
        self, other: AbstractBackend, cache_dir: str | os.PathLike[str] | None = None, *, name: str = "native"
    ) -> None:
        self.name = name
        self.compiles = other.compiles
        self.has_kernels = True
        self._other = other
        self._cache = DiskCache(cache_dir)
        self._prepared: dict[fx.GraphModule, tuple[fx.GraphModule, int]] = {}  # without narrow products; how many

    def prepare(
        self, modules: Sequence[fx.GraphModule], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Replace narrow products, and let the other backend prepare what comes of it."""
        for module in modules:
            if module not in self._prepared:
                self._prepared[module] = lower_skinny_products(module)
        self._other.prepare([skinny for skinny, _ in (self._prepared[m] for m in modules)], progress)

    def compiles_on(self, device: torch.device) -> bool:
        """Whether the other backend compiles there."""
        return self._other.compiles_on(device)

    def seal(self) -> None:
        """Seal the other backend; kernels need no compilation."""
        self._other.seal()

    def copy_cache(self, directory: Path) -> None:
        """Copy the choices, and what the other backend has."""
        self._cache.copy_used(directory)
        self._other.copy_cache(directory)

    def is_prepared(self, module: fx.GraphModule) -> bool:
        """Ask the other backend."""
        return module in self._prepared and self._other.is_prepared(self._prepared[module][0])

    def lower(self, module: fx.GraphModule) -> Compiled:
        """Return the graph by kernels, where it has any, measured against what it is without them."""
        if module not in self._prepared:
            self.prepare([module])
        skinny, count = self._prepared.pop(module)
        lowered = self._other.lower(skinny)
        if count:
            note = f"{count} product{'s' if count > 1 else ''} with few columns by kernels"
            inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
            lowered = SkinnyGraph(lowered, note, EagerGraph(module), inputs, self._choice(module, "skinny"))
        structure = find_glm(module)
        if structure is not None:
            lowered = GlmGraph(structure, lowered, self._choice(module, "kernel"))
        return lowered

    def lower_descent(
        self, structure: GlmDescentStructure, module: fx.GraphModule, tables: Compiled, num_steps: int
    ) -> GlmDescent:
        """Return the steps by a kernel, measured against the graph of a single one."""
        return GlmDescent(structure, tables, num_steps, self._choice(module, "kernel", num_steps))

    def _choice(self, module: fx.GraphModule, name: str, num_steps: int = 1) -> Choice:
        values = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
        layouts = [(v.dtype, tuple(v.shape), v.device) if isinstance(v, torch.Tensor) else v for v in values]
        parts = (name, module.code, layouts, torch.get_num_threads(), machine(), self._other.name, _FORMAT, num_steps)
        return Choice((name, "graph"), "native-" + hashlib.sha256(str(parts).encode()).hexdigest(), self._cache)
