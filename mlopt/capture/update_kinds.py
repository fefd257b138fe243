"""Capture of an optimizer's step at the price of a few parameters: equal ones are traced once.

A trace costs about 50 ms per parameter tensor (0.5 ms for each recorded operation), 3 s for a net of 60. Almost every
optimizer treats its parameters one by one, so parameters that agree in everything but their values (group, shape,
strides, dtype, kinds of state) get the same operations. Two of each kind are traced. That the parameters do not see
each other, and that the two of a kind got the same operations, is read off the graph; then it is copied for the others.
An optimizer for which it does not hold is traced whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mlopt.capture.update import UpdateGraph, UpdateRole, UpdateValue, kind_of, signature_of
from mlopt.capture.update_trace import own_outputs, trace_update


def capture_update(
    problem: str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]
) -> UpdateGraph:
    """Capture one step of an optimizer in its present state.

    Args:
        problem: Name of the problem, for messages.
        optimizer: The live optimizer. It is not stepped, and none of its objects is written.
        parameters: The parameters that receive a gradient, by name. Others that the optimizer holds have the gradient
            None, and PyTorch leaves such parameters and their state alone.

    Returns:
        The graph, which holds as long as `UpdateGraph.accepts` says so.

    Raises:
        UpdateError: The step cannot be captured; names the optimizer, the reason and what to do.
    """
    update = _captured(problem, optimizer, parameters)
    own_outputs(update.module)
    return update


def _captured(problem: str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> UpdateGraph:
    kinds = _kinds(optimizer, parameters)
    chosen = {name for names in kinds for name in names[:2]}
    if len(chosen) < len(parameters):
        few = trace_update(problem, optimizer, {n: p for n, p in parameters.items() if n in chosen})
        expanded = _expand(few, kinds, parameters)
        if expanded is not None and expanded.accepts():  # counters of the others may ask for another way
            return expanded
    return trace_update(problem, optimizer, parameters)


def _kinds(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Sort the names into those that agree in everything but values."""
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    kinds: dict[object, list[str]] = {}
    for name, p in parameters.items():
        state = optimizer.state.get(p, {})
        tensors = [(*v.stride(),) for v in state.values() if isinstance(v, torch.Tensor)]
        described = tuple((key, kind_of(value)) for key, value in state.items())
        key = (group_of.get(id(p)), kind_of(p), p.stride(), described, *tensors)
        kinds.setdefault(key, []).append(name)
    return list(kinds.values())


def _expand(
    few: UpdateGraph, kinds: Sequence[Sequence[str]], parameters: Mapping[str, torch.Tensor]
) -> UpdateGraph | None:
    """Copy the operations of one parameter of each kind for all of its kind; None where that would be wrong."""
    if any(x.role is UpdateRole.HYPERPARAMETER for x in few.outputs):
        return None  # a number of the group may count parameters
    model = {name: names[0] for names in kinds for name in names}
    modules = [_Expansion(module, few) for module in (few.module, few.guard)]
    for module in modules:
        if not module.is_separate or any(len(n) > 1 and not module.are_equal(n[0], n[1]) for n in kinds):
            return None
    inputs = _for_all(few.inputs, model)
    outputs = _for_all(few.outputs, model)
    main, (guard, owners) = modules[0].build(inputs, model, outputs), modules[1].build_questions(inputs, model)
    return dataclasses.replace(
        few,
        parameters=dict(parameters),
        module=main,
        inputs=inputs,
        outputs=outputs,
        made={(name, key): v for name, m in model.items() for (n, key), v in few.made.items() if n == m},
        guard=guard,
        answers=tuple(few.answers[i] for i in owners),
        signature=signature_of(few.optimizer, parameters),
    )


def _for_all(values: Sequence[UpdateValue], model: Mapping[str, str]) -> tuple[UpdateValue, ...]:
    """List the values of every parameter, in the order a whole trace has: by role, then by parameter."""
    found: list[UpdateValue] = []
    for role in UpdateRole:
        of_role = [x for x in values if x.role is role]
        if role is UpdateRole.HYPERPARAMETER:
            found += of_role
        else:
            found += [
                dataclasses.replace(x, parameter=name) for name, m in model.items() for x in of_role if x.parameter == m
            ]
    return tuple(found)


class _Expansion:
    """One graph of a capture, its nodes sorted by the parameter that they belong to ("" for all)."""

    def __init__(self, module: fx.GraphModule, update: UpdateGraph) -> None:
        self._module = module
        nodes = list(module.graph.nodes)
        self._calls = [n for n in nodes if n.op in ("call_function", "get_attr")]
        self._placeholders = dict(zip([n for n in nodes if n.op == "placeholder"], update.inputs, strict=True))
        self._results: Sequence[fx.Node] = nodes[-1].args[0]
        self._outputs = update.outputs
        read: dict[fx.Node, set[str]] = {n: {x.parameter} - {""} for n, x in self._placeholders.items()}
        for node in self._calls:
            read[node] = set[str]().union(*(read[n] for n in node.all_input_nodes))
        self.is_separate = all(len(read[n]) <= 1 for n in self._calls)
        self._owner = {n: next(iter(sorted(names)), "") for n, names in read.items()}
        if module is update.module:
            owners = zip(self._outputs, self._results, strict=True)
            self.is_separate &= all(self._owner[n] in ("", x.parameter) for x, n in owners)

    def are_equal(self, a: str, b: str) -> bool:
        """Whether two parameters got the same operations."""
        return self._described(a) == self._described(b)

    def _described(self, name: str) -> list[object]:
        number: dict[fx.Node, object] = {}
        lines: list[object] = []

        def numbered(node: fx.Node) -> object:
            if node in self._placeholders:
                x = self._placeholders[node]
                return dataclasses.replace(x, parameter="") if x.parameter == name else x
            constant = getattr(self._module, str(node.target)) if node.op == "get_attr" else None
            if isinstance(constant, torch.Tensor) and constant.numel() == 1:
                return (constant.dtype, constant.item())
            return number.get(node, node)

        for node in self._calls:
            if self._owner[node] == name:
                number[node] = len(number)
                arguments = fx.map_arg((node.args, node.kwargs), lambda n: repr(numbered(n)))
                lines.append((node.target, repr(arguments)))
        results = [n for n in self._results if self._owner[n] == name] if not self._is_main else self._own(name)
        return [*lines, [repr(numbered(n)) for n in results]]

    @property
    def _is_main(self) -> bool:
        return len(self._results) == len(self._outputs)

    def _own(self, name: str) -> list[fx.Node]:
        return [n for x, n in zip(self._outputs, self._results, strict=True) if x.parameter == name]

    def build(
        self, inputs: Sequence[UpdateValue], model: Mapping[str, str], outputs: Sequence[UpdateValue]
    ) -> fx.GraphModule:
        """Return the graph for all parameters."""
        graph, values = self._copy(inputs, model)
        by_value = dict(zip(self._outputs, self._results, strict=True))
        found = []
        for x in outputs:
            original = by_value[dataclasses.replace(x, parameter=model.get(x.parameter, ""))]
            found.append(values[original, x.parameter if self._owner[original] else ""])
        return _finish(self._module, graph, found)

    def build_questions(
        self, inputs: Sequence[UpdateValue], model: Mapping[str, str]
    ) -> tuple[fx.GraphModule, list[int]]:
        """Return the guard for all parameters, and for each of its questions the number of the original one."""
        graph, values = self._copy(inputs, model)
        found: list[fx.Node] = []
        originals: list[int] = []
        for i, node in enumerate(self._results):
            owner = self._owner[node]
            for name in [n for n, m in model.items() if m == owner] if owner else [""]:
                found.append(values[node, name])
                originals.append(i)
        return _finish(self._module, graph, found), originals

    def _copy(
        self, inputs: Sequence[UpdateValue], model: Mapping[str, str]
    ) -> tuple[fx.Graph, dict[tuple[fx.Node, str], fx.Node]]:
        graph = fx.Graph()
        original = {x: n for n, x in self._placeholders.items()}
        values: dict[tuple[fx.Node, str], fx.Node] = {}
        for i, x in enumerate(inputs):
            source = original[dataclasses.replace(x, parameter=model.get(x.parameter, ""))]
            node = graph.placeholder(f"input_{i}")
            node.meta = dict(source.meta)
            values[source, x.parameter] = node
        for name in ("", *model):
            for call in self._calls:
                if self._owner[call] == model.get(name, ""):

                    def argument(n: fx.Node, name: str = name) -> fx.Node:
                        return values[n, name if self._owner[n] else ""]

                    values[call, name] = graph.node_copy(call, argument)
        return graph, values


def _finish(module: fx.GraphModule, graph: fx.Graph, results: list[Any]) -> fx.GraphModule:
    graph.output(tuple(results))
    graph.lint()
    return fx.GraphModule(module, graph)
