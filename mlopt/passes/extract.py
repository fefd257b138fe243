"""Take a part of a functional graph out as a graph of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


def extract(
    module: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[Any], *, keep_random: bool = False
) -> fx.GraphModule:
    """Copy the part of a graph that computes `outputs` from `inputs`.

    Args:
        module: The functional graph.
        inputs: Nodes that become placeholders, in this order.
        outputs: What is returned as a tuple, in this order: nodes, and None or numbers as they are.
        keep_random: Keep every random node, used or not. Two graphs of one loss draw the same masks from the same
            generator state only if both draw all of them.

    Returns:
        A new module that shares the constants of `module`.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = dict(node.meta)
    needed: set[fx.Node] = set()
    roots = [n for n in outputs if isinstance(n, fx.Node)]
    if keep_random:
        roots += [n for n in module.graph.nodes if draws_random(n)]
    stack = roots
    while stack:
        node = stack.pop()
        if node not in needed and node not in copied:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    for node in module.graph.nodes:
        if node in needed:
            assert node.op != "placeholder", f"{node} is needed but is no input of the extracted graph"
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(tuple(copied[n] if isinstance(n, fx.Node) else n for n in outputs))
    graph.lint()
    return fx.GraphModule(module, graph)


def ancestors(roots: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the nodes that some nodes are computed from, these included."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def is_random(module: fx.GraphModule) -> bool:
    """Whether a traced graph draws random numbers."""
    return any(draws_random(node) for node in module.graph.nodes)


def draws_random(node: fx.Node) -> bool:
    """Whether a node of a traced graph draws random numbers."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
