"""`JoinedGraph`: graphs put one behind the other."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from mlopt.passes import remove_dead_nodes_pass


class JoinedGraph:
    """A graph that others are appended to."""

    def __init__(self) -> None:
        self._graph = fx.Graph()
        self._root = torch.nn.Module()
        self._num_inputs = 0
        self._num_constants = 0

    def inputs(self, like: Sequence[fx.Node], after: fx.Node | None = None) -> list[fx.Node]:
        """Add inputs; all of them come before the first operation."""
        made = []
        for node in like:
            if after is None:
                made.append(self._graph.placeholder(f"input_{self._num_inputs}"))
            else:
                with self._graph.inserting_after(after):
                    made.append(self._graph.placeholder(f"input_{self._num_inputs}"))
                after = made[-1]
            made[-1].meta = copy.copy(node.meta)
            self._num_inputs += 1
        return made

    def append(self, module: fx.GraphModule, arguments: Sequence[fx.Node]) -> list[fx.Node]:
        """Add the operations of a graph, called with `arguments`; return its results."""
        values: Mapping[fx.Node, fx.Node] = dict(zip(placeholders_of(module), arguments, strict=True))
        values = dict(values)
        for node in module.graph.nodes:
            if node.op == "get_attr":
                name = f"constant_{self._num_constants}"
                self._num_constants += 1
                setattr(self._root, name, getattr(module, node.target))
                values[node] = self._graph.get_attr(name)
                values[node].meta = copy.copy(node.meta)
            elif node.op not in ("placeholder", "output"):
                values[node] = self._graph.node_copy(node, values.__getitem__)
        return [values[n] if isinstance(n, fx.Node) else n for n in results_of(module)]

    def finish(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """Return the module."""
        self._graph.output(tuple(results))
        self._graph.lint()
        return remove_dead_nodes_pass(fx.GraphModule(self._root, self._graph))


def placeholders_of(module: fx.GraphModule) -> list[fx.Node]:
    """Return the inputs of a graph."""
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def results_of(module: fx.GraphModule) -> list[fx.Node]:
    """Return what a graph returns."""
    return list(next(n for n in module.graph.nodes if n.op == "output").args[0])
