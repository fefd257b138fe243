"""New nodes of traced graphs."""

from __future__ import annotations

from typing import Any

from torch import fx


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert the call of an operator, with its value in ``meta``, like every node of a traced graph has.

    Args:
        graph: Its insertion point is where the node goes.
        target: The operator.
        args: Nodes and plain values; the nodes have their values, fake tensors, in ``meta``.
        kwargs: Plain values.
    """
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node
