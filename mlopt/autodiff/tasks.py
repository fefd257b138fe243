"""Losses of problems with tasks: graphs of one task, evaluated for T tasks at once.

A loss is written, captured and differentiated for one task. The graphs are then batched with `torch.func.vmap`: the
parameters of problems with tasks and every tensor of the batch have a leading axis T, everything else is common.

A problem with tasks has T losses, one for each copy of its parameters. A problem that reads one with tasks, and has
none itself, has one loss: the mean over the tasks. So with weight w = 1 for the former and 1/T for the latter, a
derivative with respect to parameters that each task has its own copy of is ``w * [T, ...]``, and one with respect to
common parameters is ``w * sum`` over the tasks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import fx

from mlopt.autodiff.gradient import GradientGraph, ReadGradientGraph
from mlopt.autodiff.linearization import LinearizationGraphs
from mlopt.autodiff.trace import Outputs, TracedGraph, trace
from mlopt.capture.record import InputRole, LossGraph
from mlopt.passes import ONE_TASK, run_default_passes

Combine = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class TaskAxis:
    """The task axis of one problem's loss.

    Attributes:
        num_tasks: T.
        problem: The problem.
        with_tasks: The problems of the graph that have tasks.
    """

    num_tasks: int
    problem: str
    with_tasks: frozenset[str]

    def combine(self, values: torch.Tensor, target: str) -> torch.Tensor:
        """Turn derivatives of each task's loss [T, ...] into that of the problem's loss.

        Args:
            values: Derivatives with respect to parameters of `target`.
            target: The problem whose parameters they belong to.
        """
        if self.problem not in self.with_tasks:
            values = values / self.num_tasks
        return values if target in self.with_tasks else values.sum(0)

    def combine_for(self, target: str) -> Combine:
        """Return `combine` for one target."""
        return functools.partial(self.combine, target=target)

    def of_buffer(self, values: torch.Tensor) -> torch.Tensor:
        """Buffers are common: the tasks' new values [T, ...] are averaged (integers: those of the first task)."""
        return values.mean(0) if values.is_floating_point() else values[0]

    def input_dims(self, loss: LossGraph) -> list[int | None]:
        """Return which inputs of the loss have the leading axis."""
        dims: list[int | None] = []
        for x in loss.inputs:
            trained = x.role in (InputRole.OWN, InputRole.READ) and x.problem in self.with_tasks
            dims.append(0 if trained or x.role is InputRole.BATCH else None)
        return dims


def gradient_over_tasks(
    graph: GradientGraph, loss: LossGraph, inputs: Sequence[torch.Tensor], axis: TaskAxis
) -> GradientGraph:
    """Batch a gradient graph. Loss and metrics are means over the tasks.

    Args:
        graph: The graph of one task.
        loss: Its loss.
        inputs: Example tensors with their leading axes.
        axis: The task axis.
    """

    def average(values: torch.Tensor) -> torch.Tensor:
        return (values if values.is_floating_point() else values.float()).mean(0)

    combines: list[Combine] = [average] * (1 + len(loss.metrics))
    combines += [axis.combine_for(loss.problem)] * len(graph.own)
    combines += [axis.combine_for(r) for r in graph.cotangents]
    combines += [axis.of_buffer] * len(graph.written_buffers)
    traced = _over_tasks(graph.traced.module, inputs, axis.input_dims(loss), combines)
    return dataclasses.replace(graph, traced=traced)


def read_gradient_over_tasks(
    graph: ReadGradientGraph, loss: LossGraph, inputs: Sequence[torch.Tensor], own: torch.Tensor, axis: TaskAxis
) -> ReadGradientGraph:
    """Batch a read-gradient graph; `own` is an example of the flat own parameters."""
    dims = [*axis.input_dims(loss), 0 if loss.problem in axis.with_tasks else None]
    combines: list[Combine] = [axis.combine_for(r) for r in graph.targets]
    traced = _over_tasks(graph.traced.module, [*inputs, own], dims, combines)
    return dataclasses.replace(graph, traced=traced)


def linearization_over_tasks(
    graphs: LinearizationGraphs, loss: LossGraph, inputs: Sequence[torch.Tensor], own: torch.Tensor, axis: TaskAxis
) -> LinearizationGraphs:
    """Batch the halves of second-order products; `own` is an example of the vector they take."""
    num_residuals = graphs.num_residuals
    primal = _over_tasks(graphs.primal, inputs, axis.input_dims(loss), [lambda values: values] * num_residuals)
    output = next(n for n in primal.module.graph.nodes if n.op == "output")
    residuals = [_example(node) for node in output.args[0]]
    dims = [*([0] * num_residuals), 0 if loss.problem in axis.with_tasks else None]
    hvp = mixed = None
    if graphs.hvp is not None:
        combines: list[Combine] = [axis.combine_for(loss.problem)]
        hvp = _over_tasks(graphs.hvp, [*residuals, own], dims, combines).module
        if loss.problem in axis.with_tasks:  # a kernel that finds its structure in one task runs them side by side
            hvp.meta[ONE_TASK] = graphs.hvp
    if graphs.mixed is not None:
        combines = [axis.combine_for(r) for r in graphs.targets]
        mixed = _over_tasks(graphs.mixed, [*residuals, own], dims, combines).module
    num_bytes = graphs.residual_bytes * axis.num_tasks
    return dataclasses.replace(
        graphs, traced=primal, primal=primal.module, hvp=hvp, mixed=mixed, residual_bytes=num_bytes
    )


def _over_tasks(
    module: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    in_dims: Sequence[int | None],
    combines: Sequence[Combine],
) -> TracedGraph:
    module = _contiguous(module)
    outputs = next(n for n in module.graph.nodes if n.op == "output").args[0]
    tensors = [i for i, node in enumerate(outputs) if isinstance(node, fx.Node)]

    def of_one_task(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = module(*values)
        return tuple(found[i] for i in tensors)

    def compute(values: list[torch.Tensor]) -> Outputs:
        with torch.no_grad():
            batched = torch.func.vmap(of_one_task, tuple(in_dims), randomness="different")(*values)
            combined: Outputs = [None] * len(outputs)
            for i, value in zip(tensors, batched, strict=True):
                combined[i] = combines[i](value)
        return combined

    traced = trace(compute, inputs, [frozenset[int]()] * len(inputs), [])
    run_default_passes(traced.module)
    return traced


def _contiguous(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without copies into the channels-last order, which cannot be batched; the values are the same.

    Autograd makes such copies of images with one channel, whose strides are those of both orders.
    """
    last = (torch.channels_last, torch.channels_last_3d)
    if not any(n.kwargs.get("memory_format") in last for n in module.graph.nodes):
        return module
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.kwargs.get("memory_format") in last:
            node.kwargs = {**node.kwargs, "memory_format": torch.contiguous_format}
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # what it views may lie in another order now
    return fx.GraphModule(module, graph)


def _example(node: fx.Node) -> torch.Tensor:
    """Return a tensor of the layout that a traced node has; its values do not matter."""
    value = node.meta["val"]
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
