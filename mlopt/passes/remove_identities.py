"""Erase calls that return their argument unchanged."""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

# In a functional graph nothing is written, so a copy equals its source; gradients are explicit, so detach is a no-op.
# A clone that changes the memory format stays: layout is performance.
_ALWAYS = {aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default}


def remove_identities_pass(module: fx.GraphModule) -> fx.GraphModule:
    """Erase ``detach``, ``alias``, plain ``clone``, double transposes and views to the same shape."""
    erased = 0
    for node in list(module.graph.nodes):
        source = _identity_source(node)
        if source is not None:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            erased += 1
    if erased:
        module.graph.lint()
        module.recompile()
    return module


def _identity_source(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target in _ALWAYS:
        return source
    if node.target is aten.clone.default and not node.kwargs:
        return source
    if node.target is aten.t.default and source.target is aten.t.default:
        return source.args[0]
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default):
        return source if _same_shape(node, source) else None
    return None


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.ndim != y.ndim:
        return False
    # Compared as static integers only: comparing symbolic sizes would add a guard.
    return all(isinstance(m, int) and isinstance(n, int) and m == n for m, n in zip(x.shape, y.shape, strict=True))
