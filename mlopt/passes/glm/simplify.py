"""Write a product in elementary operations, so that fewer rules are needed to follow v through it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mlopt.passes.call import call
from mlopt.passes.glm.values import same, same_shape, shape_of
from mlopt.passes.merge_equal_nodes import merge_equal_nodes_pass
from mlopt.passes.remove_dead_nodes import remove_dead_nodes_pass

aten = torch.ops.aten


def simplified(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a graph with fewer kinds of operations.

    Backward formulas of softmax are spelled out, batched products of one matrix are plain ones, added zeros go, and a
    sum of two results of one linear operation is its result of the sum (autograd adds where paths meet, which may be
    after the operation).
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, values)
    graph.output(output)
    for node in list(graph.nodes):
        formula = _FORMULAS.get(node.target)
        if formula is not None:
            with graph.inserting_before(node):
                written = formula(graph, node)
            if written is not node:
                node.replace_all_uses_with(written)
        elif node.target is aten.add.Tensor and _adds_zeros(node):
            node.replace_all_uses_with(node.args[0])
    while any(_factored(graph, node) for node in list(graph.nodes)):
        pass
    copy = fx.GraphModule(module, graph)
    return remove_dead_nodes_pass(merge_equal_nodes_pass(copy))


def _adds_zeros(node: fx.Node) -> bool:
    kept, zeros = node.args[:2]
    if not isinstance(kept, fx.Node) or not isinstance(zeros, fx.Node) or zeros.target is not aten.zeros_like.default:
        return False
    return (
        same_shape(shape_of(kept), shape_of(node))
        and kept.meta["val"].dtype == node.meta["val"].dtype
        and zeros != kept
    )


def _log_softmax_backward(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``g - softmax * sum(g)``, from the logarithm of the softmax."""
    g, log_p, dim = node.args[:3]
    total = call(graph, aten.sum.dim_IntList, g, [dim], True)
    p = call(graph, aten.exp.default, log_p)
    return call(graph, aten.sub.Tensor, g, call(graph, aten.mul.Tensor, p, total))


def _softmax_backward(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``p * (g - sum(p * g))``."""
    g, p, dim = node.args[:3]
    total = call(graph, aten.sum.dim_IntList, call(graph, aten.mul.Tensor, p, g), [dim], True)
    return call(graph, aten.mul.Tensor, p, call(graph, aten.sub.Tensor, g, total))


def _bmm(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A batch of one product."""
    if any(not same(shape_of(a)[0], 1) for a in node.args):
        return node
    left, right = (call(graph, aten.squeeze.dim, a, 0) for a in node.args)
    return call(graph, aten.unsqueeze.default, call(graph, aten.mm.default, left, right), 0)


def _factored(graph: fx.Graph, node: fx.Node) -> bool:
    """Rewrite ``f(a) + f(b)`` as ``f(a + b)``; say whether that was done."""
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs or not node.users:
        return False
    left, right = node.args
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left.target != right.target:
        return False
    varying = _LINEAR_IN.get(left.target, ())
    for position in varying:
        a, b = left.args[position], right.args[position]
        others = [tuple(x for i, x in enumerate(n.args) if i != position) for n in (left, right)]
        if others[0] != others[1] or left.kwargs or right.kwargs or not same_shape(shape_of(a), shape_of(b)):
            continue
        with graph.inserting_before(node):
            total = call(graph, aten.add.Tensor, a, b)
            args = [total if i == position else x for i, x in enumerate(left.args)]
            node.replace_all_uses_with(call(graph, left.target, *args))
        return True
    return False


# Operations, and the arguments they are linear in one at a time.
_LINEAR_IN: dict[Any, tuple[int, ...]] = {
    aten.mm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.sum.dim_IntList: (0,),
    aten.sum.default: (0,),
    aten.t.default: (0,),
    aten.view.default: (0,),
    aten.squeeze.dim: (0,),
    aten.unsqueeze.default: (0,),
}

_FORMULAS = {
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.bmm.default: _bmm,
}
