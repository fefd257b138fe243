"""Values that Inductor is to store, which it would compute anew wherever they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._inductor.inductor_prims  # registers `inductor_force_stride_order`
from torch import fx

_STORE = torch.ops.prims.inductor_force_stride_order.default


def stored(graph: fx.Graph, node: fx.Node, strides: Sequence[Any], value: Any = None) -> fx.Node:
    """Have a value stored; an input of the graph, or what is stored already, stays as it is.

    Args:
        graph: Its insertion point is where the new node goes.
        node: What is stored.
        strides: With which strides.
        value: The fake tensor that the new node stands for; default: that of `node`.
    """
    if node.op == "placeholder" or node.target is _STORE:
        return node
    result = graph.call_function(_STORE, (node, list(strides)))
    result.meta["val"] = node.meta["val"] if value is None else value
    return result
