"""Write a product in elementary operations, so that fewer rules are needed to follow v through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mlopt.passes.glm.values import same_shape, shape_of
from mlopt.passes.remove_dead_nodes import remove_dead_nodes_pass

aten = torch.ops.aten


def simplified(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph with backward formulas of softmax spelled out, and without added zeros."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, values)
    graph.output(output)
    for node in list(graph.nodes):
        formula = _FORMULAS.get(node.target)
        if formula is not None:
            with graph.inserting_before(node):
                node.replace_all_uses_with(formula(graph, node))
        elif node.target is aten.add.Tensor and _adds_zeros(node):
            node.replace_all_uses_with(node.args[0])
    copy = fx.GraphModule(module, graph)
    return remove_dead_nodes_pass(copy)


def _adds_zeros(node: fx.Node) -> bool:
    kept, zeros = node.args[:2]
    if not isinstance(kept, fx.Node) or not isinstance(zeros, fx.Node) or zeros.target is not aten.zeros_like.default:
        return False
    return (
        same_shape(shape_of(kept), shape_of(node))
        and kept.meta["val"].dtype == node.meta["val"].dtype
        and zeros != kept
    )


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


def _log_softmax_backward(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``g - softmax * sum(g)``, from the logarithm of the softmax."""
    g, log_p, dim = node.args[:3]
    total = _call(graph, aten.sum.dim_IntList, g, [dim], True)
    p = _call(graph, aten.exp.default, log_p)
    return _call(graph, aten.sub.Tensor, g, _call(graph, aten.mul.Tensor, p, total))


def _softmax_backward(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``p * (g - sum(p * g))``."""
    g, p, dim = node.args[:3]
    total = _call(graph, aten.sum.dim_IntList, _call(graph, aten.mul.Tensor, p, g), [dim], True)
    return _call(graph, aten.mul.Tensor, p, _call(graph, aten.sub.Tensor, g, total))


_FORMULAS = {
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten._softmax_backward_data.default: _softmax_backward,
}
