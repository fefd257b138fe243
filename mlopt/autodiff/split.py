"""Cut a functional graph in two by use-def."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

aten = torch.ops.aten

# Views whose arguments are plain numbers. Both halves of a cut make them for themselves: it costs nothing, and keeps
# visible that two values are one (a matrix and its transpose).
_VIEWS = {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}


def dependents(root: fx.Node) -> set[fx.Node]:
    """Return `root` and every node that depends on it, the output node excepted."""
    found, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node in found or node.op == "output":
            continue
        found.add(node)
        stack.extend(node.users)
    return found


def residuals_of(outputs: Sequence[fx.Node], tangent: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes outside `tangent` that the tangent half reads, in graph order; not views of them.

    An output that does not depend on the vector at all (a product that is identically zero) is a residual itself.
    """
    needed: set[fx.Node] = set()
    stack, seen = list(outputs), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in tangent or (node.target in _VIEWS and node not in outputs):
            stack.extend(node.all_input_nodes)
        elif node.op != "get_attr":  # constants are copied into each half instead
            needed.add(node)
    graph = outputs[0].graph
    return [n for n in graph.nodes if n in needed]
