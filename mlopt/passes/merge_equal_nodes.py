"""Common-subexpression elimination."""

from __future__ import annotations

import torch
from torch import fx


def merge_equal_nodes_pass(module: fx.GraphModule) -> fx.GraphModule:
    """Merge pure calls with equal target and arguments.

    The forward pass of a loss appears once per differentiation; this is where it becomes one again. Random nodes are
    impure and stay. Literal arguments are compared with their types, because ``1 == 1.0 == True`` would merge calls
    that return different dtypes.
    """
    first: dict[object, fx.Node] = {}
    merged = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.is_impure():
            continue
        key = (node.target, _key(node.args), _key(node.kwargs))
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            module.graph.erase_node(node)
            merged += 1
    if merged:
        module.graph.lint()
        module.recompile()
    return module


def _key(value: object) -> object:
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, tuple | list):
        return (type(value).__name__, tuple(_key(v) for v in value))
    if isinstance(value, dict):
        return ("dict", tuple((k, _key(v)) for k, v in value.items()))
    if isinstance(value, float):
        return ("float", repr(value))  # tells -0.0 from 0.0, and lets nan equal itself
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return (type(value).__name__, str(value))
    return (type(value).__name__, value)
