"""The eager backend: the FX graph's own generated Python, one torch call per node. Always works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mlopt.backends.base import AbstractBackend, Compiled, Lowering


class EagerGraph:
    """The graph's forward under ``no_grad``.

    Args:
        module: The graph.
        note: Why it runs eagerly, where something else was asked for.
    """

    is_kernel = False

    def __init__(self, module: fx.GraphModule, note: str = "") -> None:
        self.lowering = Lowering("eager", note)
        self._forward = module.forward

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """Run the graph."""
        with torch.no_grad():
            return self._forward(*arguments)

    def native_call(self, arguments: Sequence[Any]) -> Any:
        """None: the graph is Python."""
        return None

    def native_operator(self, arguments: Sequence[Any], hole: int) -> Any:
        """None: the graph is Python."""
        return None

    def native_steps(self, *_: Any) -> Any:
        """None: the graph is Python."""
        return None


class EagerBackend(AbstractBackend):
    """Runs graphs as the Python code that FX generates, which also frees each value after its last use."""

    name = "eager"

    def lower(self, module: fx.GraphModule) -> Compiled:
        """Return the graph's forward."""
        return EagerGraph(module)
