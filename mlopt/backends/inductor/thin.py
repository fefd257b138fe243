"""Products with one row or column, written so that Inductor fuses them.

``X w`` and ``r X`` are calls of BLAS to Inductor, with a buffer before and after each. As a product and a sum they are
loops that what comes before and after is fused into. On a 500 x 20 matrix that takes 1 us off each, of a gradient step
of 7 us. Measured on one thread, from 5 to 784 columns: `X w` wins from 16 columns on, by 5 to 30 %; `r X` wins up to
about 10^5 elements; with few columns `X w` loses, because its lanes run over columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mlopt.passes import remove_dead_nodes_pass, size_hint

aten = torch.ops.aten

_LEAST_COLUMNS = 16
_MOST_ELEMENTS = 1 << 17


def fuse_thin_products(module: fx.GraphModule) -> fx.GraphModule:
    """Replace small products with one row or column by element-wise ones and sums.

    Args:
        module: A functional graph with the values of its nodes in ``meta``.

    Returns:
        A copy; the graph itself, if there is no such product.
    """
    if not any(_operands(node) for node in module.graph.nodes):
        return module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        operands = _operands(node)
        if operands is None:
            continue
        left, right, bias = operands
        dim = 1 if _is_one(_value(right).shape[1]) else 0  # the dimension of the product that the sum leaves
        with graph.inserting_before(node):
            turned = (left, _call(graph, aten.t.default, right)) if dim else (_call(graph, aten.t.default, left), right)
            result = _call(graph, aten.sum.dim_IntList, _call(graph, aten.mul.Tensor, *turned), [dim], True)
            if bias is not None:
                result = _call(graph, aten.add.Tensor, result, bias)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return remove_dead_nodes_pass(fx.GraphModule(module, graph))


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Return the factors of a thin product and what is added to it."""
    bias: Any = None
    if node.target is aten.mm.default:
        left, right = node.args
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, left, right = node.args
    else:
        return None
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if _value(left).device.type != "cpu" or _value(left).dtype not in (torch.float32, torch.float64):
        return None
    rows, inner, columns = *_value(left).shape, _value(right).shape[1]
    if _is_one(columns):
        along, across = inner, rows
        by_rows = left.target is not aten.t.default  # else it is ``X^T r``, whose lanes run over the rows of the result
    elif _is_one(rows):
        along, across, by_rows = columns, inner, False
    else:
        return None
    if size_hint(along) * size_hint(across) > _MOST_ELEMENTS or (by_rows and size_hint(along) < _LEAST_COLUMNS):
        return None
    return left, right, bias


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _value(node: fx.Node) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))  # on fake tensors
    return node
