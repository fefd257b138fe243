"""The eager backend: the FX graph's own generated Python, one torch call per node. Always works."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mlopt.backends.base import AbstractBackend, Compiled, Lowering

aten = torch.ops.aten


class EagerGraph:
    """The graph's forward under ``no_grad``.

    Args:
        module: The graph.
        note: Why it runs eagerly, where something else was asked for.
    """

    is_kernel = False

    def __init__(self, module: fx.GraphModule, note: str = "") -> None:
        self.lowering = Lowering("eager", note)
        self._module = module
        self._forward = module.forward

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """Run the graph."""
        with torch.no_grad():
            try:
                return self._forward(*arguments)
            except RuntimeError as error:
                if "view size is not compatible" not in str(error) or not _has_views(self._module):
                    raise
                self._module = _with_reshapes(self._module)
                self._forward = self._module.forward
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


def _has_views(module: fx.GraphModule) -> bool:
    return bool(module.graph.find_nodes(op="call_function", target=aten.view.default))


def _with_reshapes(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph whose views are copies where they cannot be views.

    A trace has the strides that torch's fake kernels tell, which are contiguous where some kernels of the CPU keep
    channels last (``max_unpool2d``, ``channel_shuffle``).
    """
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    for node in copied.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    copied.recompile()
    return copied


class EagerBackend(AbstractBackend):
    """Runs graphs as the Python code that FX generates, which also frees each value after its last use."""

    name = "eager"

    def lower(self, module: fx.GraphModule) -> Compiled:
        """Return the graph's forward."""
        return EagerGraph(module)
