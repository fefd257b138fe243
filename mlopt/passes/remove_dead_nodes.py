"""Dead-code elimination that leaves the random stream alone."""

from __future__ import annotations

from torch import fx


def remove_dead_nodes_pass(module: fx.GraphModule) -> fx.GraphModule:
    """Erase calls without users, except impure ones.

    Random calls count as impure: every graph made from one loss must draw the same numbers in the same order, or two
    graphs run from one generator state would see different dropout masks.
    """
    erased = False
    for node in reversed(list(module.graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users and not node.is_impure():
            module.graph.erase_node(node)
            erased = True
    if erased:
        module.graph.lint()
        module.recompile()
    return module
