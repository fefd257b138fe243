"""Turn in-place operations on fresh tensors into their functional forms."""

from __future__ import annotations

import torch
from torch import fx

# Functional forms with another name for their overload. Dropout's mask is written by the first.
_RENAMED = {torch.ops.aten.bernoulli_.float: torch.ops.aten.bernoulli.p}


def remove_fresh_writes_pass(module: fx.GraphModule) -> fx.GraphModule:
    """Replace ``op_(x, ...)`` by ``op(x, ...)`` where nothing else can see x.

    That is where x is the new result of an operation (no view, no input of the graph) and the write is its only use;
    a recorded graph refers to the written value by the write's result. All other writes stay.
    """
    changed = 0
    for node in module.graph.nodes:
        functional = _functional(node)
        if functional is not None:
            node.target = functional
            changed += 1
    if changed:
        module.graph.lint()
        module.recompile()
    return module


def has_writes(module: fx.GraphModule) -> bool:
    """Whether an in-place operation is left."""
    return any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in module.graph.nodes)


def _functional(node: fx.Node) -> torch._ops.OpOverload | None:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    first, *rest = target._schema.arguments
    if first.alias_info is None or any(a.alias_info is not None for a in rest):
        return None  # an out= form, or several writes
    written = node.args[0]
    if not isinstance(written, fx.Node) or list(written.users) != [node] or not _is_fresh(written):
        return None
    if node.all_input_nodes.count(written) != 1 or not _same_dtype(node, written):
        return None
    functional = _RENAMED.get(target) or _of_same_name(target)
    if functional is None or functional._schema.is_mutable:
        return None
    if [a.name for a in functional._schema.arguments] != [a.name for a in target._schema.arguments]:
        return None
    required = [a for a in functional._schema.arguments if not a.has_default_value() and not a.kwarg_only]
    return functional if len(node.args) >= len(required) else None


def _of_same_name(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    namespace, name = target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, target._overloadname, None) if name.endswith("_") and packet is not None else None


def _is_fresh(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and len(target._schema.returns) == 1
        and target._schema.returns[0].alias_info is None
        and node.op == "call_function"
    )


def _same_dtype(node: fx.Node, written: fx.Node) -> bool:
    """Whether the functional form has the dtype of what is written: a write converts, a functional form promotes."""
    dtype = written.meta["val"].dtype
    values = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [v for v in values if not isinstance(v, torch.SymInt | torch.SymFloat)]  # free sizes, and their ratios
    numbers = [
        a for a in (*node.args, *node.kwargs.values(), *values) if isinstance(a, float | complex | torch.SymFloat)
    ]
    return all(isinstance(t, torch.Tensor) and t.dtype == dtype for t in tensors) and (
        dtype.is_floating_point or dtype.is_complex or not numbers
    )
