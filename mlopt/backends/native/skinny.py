"""Matrix products with few columns, for which general matrix products are slow on CPUs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mlopt.backends.base import Changing, Compiled, Lowering
from mlopt.backends.measure import device_of
from mlopt.backends.native.choice import Choice
from mlopt.ops.glm import MAX_CLASSES
from mlopt.passes import call, remove_dead_nodes_pass, size_hint

aten = torch.ops.aten


# Matrices with fewer elements are left alone: what is to be gained there is less than what a call costs.
_LEAST_ELEMENTS = 1 << 15


class SkinnyGraph:
    """A graph with kernels for its narrow matrix products, or the graph as it was, whichever is faster.

    Args:
        skinny: The former.
        note: What is reported of it.
        graph: The latter.
        inputs: What the inputs look like.
        choice: Decides at the first call.
    """

    is_kernel = False

    def __init__(self, skinny: Compiled, note: str, graph: Compiled, inputs: Sequence[fx.Node], choice: Choice) -> None:
        self._skinny = skinny
        self._note = note
        self._graph = graph
        self._inputs = inputs
        self._choice = choice

    @property
    def lowering(self) -> Lowering:
        """What is reported of the graph."""
        lowering = (self._skinny if self._choice.first else self._graph).lowering
        notes = [self._note if self._choice.first else "", lowering.note, self._choice.figures]
        backend = f"native, {lowering.backend}" if self._choice.first else lowering.backend
        return Lowering(backend, "; ".join(filter(None, notes)))

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """Run the graph."""
        if self._choice.first is None:
            device = device_of(arguments)
            self._choice.measure(lambda: self._skinny(*arguments), lambda: self._graph(*arguments), device)
        return self._skinny(*arguments) if self._choice.first else self._graph(*arguments)

    def native_call(self, arguments: Sequence[Any]) -> Any:
        """See `Compiled`."""
        if self._choice.first is None:
            self(*arguments)
        return (self._skinny if self._choice.first else self._graph).native_call(arguments)

    def native_operator(self, arguments: Sequence[Any], hole: int) -> Any:
        """See `Compiled`."""
        if self._choice.first is None:
            like = _value(self._inputs[hole])
            filled = list(arguments)
            filled[hole] = torch.zeros([int(n) for n in like.shape], dtype=like.dtype, device=like.device)
            self(*filled)
        return (self._skinny if self._choice.first else self._graph).native_operator(arguments, hole)

    def native_steps(self, arguments: Sequence[Any], changing: Changing) -> Any:
        """See `Compiled`."""
        if self._choice.first is None:
            self(*arguments)
        return (self._skinny if self._choice.first else self._graph).native_steps(arguments, changing)


def lower_skinny_products(module: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """Replace ``X W``, ``X W + b`` and ``X^T D`` by ops of the family `glm` where W or D has few columns.

    Args:
        module: A functional graph with the values of its nodes in ``meta``.

    Returns:
        A copy, and how many products were replaced; the graph itself, if none.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    count = 0
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            lowered = _lowered(graph, node)
        if lowered is not None:
            node.replace_all_uses_with(lowered)
            graph.erase_node(node)
            count += 1
    if not count:
        return module, 0
    return remove_dead_nodes_pass(fx.GraphModule(module, graph)), count


def _lowered(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    glm = torch.ops.mlopt
    if node.target is aten.addmm.default:
        bias, x, w = node.args
        fits = not node.kwargs and _is_matrix(x) and _is_narrow(w, 1) and _value(bias).ndim == 1
        fits = fits and _value(bias).dtype == _value(x).dtype and _value(bias).shape[0] == _value(w).shape[1]
        return call(graph, glm.glm_matmul.default, x, w, bias) if fits else None
    if node.target is not aten.mm.default:
        return None
    left: Any = node.args[0]
    right: Any = node.args[1]
    if _is_narrow(right, 1):
        x = _transposed(left)
        if x is not None and _is_matrix(x):  # X^T D
            return _first(graph, glm.glm_matmul_t.default, x, right)
        if _is_matrix(left):  # X W
            return call(graph, glm.glm_matmul.default, left, right, None)
    if _is_narrow(left, 0) and _is_matrix(right):  # D^T X
        rows = _transposed(left) or call(graph, aten.t.default, left)
        product = call(graph, aten.t.default, _first(graph, glm.glm_matmul_t.default, right, rows))
        # The op's result is [D, C]; a general product's is laid out by rows, and packages expect that.
        return call(graph, aten.clone.default, product, memory_format=torch.contiguous_format)
    return None


def _first(graph: fx.Graph, target: Any, x: fx.Node, rows: fx.Node) -> fx.Node:
    return call(graph, operator.getitem, call(graph, target, x, rows, False), 0)


def _transposed(node: fx.Node) -> fx.Node | None:
    """What a node is the transpose of."""
    source: Any = node.args[0] if node.target is aten.t.default else None
    return source


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


def _is_narrow(node: Any, dim: int) -> bool:
    columns = _value(node).shape[dim] if "val" in node.meta else None
    return isinstance(columns, int) and 1 <= columns <= MAX_CLASSES


def _is_matrix(node: Any) -> bool:
    """Whether a node has rows in memory order, and enough elements."""
    if "val" not in node.meta:
        return False
    value = _value(node)
    features = value.shape[1]
    if value.dtype not in (torch.float32, torch.float64) or not isinstance(features, int):
        return False
    by_rows = value.stride(1) == 1 and value.stride(0) == features
    return by_rows and size_hint(value.shape[0]) * features >= _LEAST_ELEMENTS
