"""First-order graphs: the gradient of a loss, and its gradient with respect to what it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mlopt.autodiff.layout import FlatLayout
from mlopt.autodiff.loss_scale import evaluate, scaled, unscaled
from mlopt.autodiff.trace import Outputs, TracedGraph, trace
from mlopt.capture.record import InputRole, LossGraph
from mlopt.passes import run_default_passes


@dataclasses.dataclass
class GradientGraph:
    """Loss, metrics, gradients and new buffers of one problem in one graph.

    Attributes:
        traced: Inputs as `LossGraph.inputs`; outputs: loss, metrics, one gradient per own trained parameter (None
            where the loss does not use it), one flat cotangent [N_r] per entry of `cotangents`, one value per entry
            of `written_buffers`.
        own: Names of the own trained parameters, in output order.
        cotangents: Problems whose parameters the loss is differentiated by as well.
        written_buffers: Input positions of the buffers whose new values are returned.
    """

    traced: TracedGraph
    own: tuple[str, ...]
    cotangents: tuple[str, ...]
    written_buffers: tuple[int, ...]


@dataclasses.dataclass
class ReadGradientGraph:
    """Gradient of a loss with respect to what it reads, at own parameters given as one vector.

    Attributes:
        traced: Inputs as `LossGraph.inputs`, then the own parameters [N]; one flat output [N_r] per target.
        targets: The problems r, in output order.
    """

    traced: TracedGraph
    targets: tuple[str, ...]


def gradient_graph(
    loss: LossGraph,
    inputs: Sequence[torch.Tensor],
    layouts: Mapping[str, FlatLayout],
    cotangents: Sequence[str],
) -> GradientGraph:
    """Build ``(inputs) -> loss, metrics, d loss/d own, d loss/d read, new buffers``: one forward, one backward.

    Args:
        loss: The captured loss.
        inputs: Example tensors in the order of ``loss.inputs``.
        layouts: Flat layouts of all problems by name.
        cotangents: Problems read by the loss whose cotangent (the gradient with respect to their parameters, as one
            flat vector) is wanted.

    Returns:
        The graph, already through the default passes.
    """

    def compute(tensors: list[torch.Tensor]) -> Outputs:
        values, own = prepare(loss, tensors, layouts[loss.problem])
        return first_order(loss, values, own, layouts, cotangents).outputs

    traced = trace(compute, inputs, loss.dynamic_dims, loss.positions(InputRole.BATCH))
    run_default_passes(traced.module)
    return gradient_graph_of(traced, loss, layouts, cotangents)


@dataclasses.dataclass(frozen=True)
class FirstOrder:
    """What one forward and one backward of a loss compute.

    Attributes:
        outputs: Those of `GradientGraph`, but for one value per buffer, written or not.
        scaled: The gradients of the scaled loss (see `mlopt.autodiff.loss_scale`), one per own trained parameter.
    """

    outputs: Outputs
    scaled: list[torch.Tensor | None]


def first_order(
    loss: LossGraph,
    values: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor | None],
    layouts: Mapping[str, FlatLayout],
    cotangents: Sequence[str],
    *,
    create_graph: bool = False,
) -> FirstOrder:
    """Run forward and backward; to be traced.

    Args:
        loss: The captured loss.
        values: What `prepare` returned.
        own: As well.
        layouts: Flat layouts of all problems by name.
        cotangents: See `gradient_graph`.
        create_graph: Whether the gradients are differentiated again.
    """
    reads = {name: read_parameters(loss, values, layouts[name]) for name in cotangents}
    result = evaluate(loss, values)
    wanted = _present([*own, *(t for group in reads.values() for t in group)])
    value = scaled(loss, values, result[0])
    made = torch.autograd.grad(value, wanted, create_graph=create_graph, allow_unused=True)
    gradients = iter(made)
    own_gradients = [None if t is None else next(gradients) for t in own]
    flat = [
        layouts[name].flatten([None if t is None else unscaled(loss, values, next(gradients)) for t in group])
        for name, group in reads.items()
    ]
    outputs = [
        *result,
        *(unscaled(loss, values, g) for g in own_gradients),
        *flat,
        *(values[i] for i in loss.positions(InputRole.BUFFER)),
    ]
    return FirstOrder([_without_graph(x) for x in outputs], own_gradients)


def gradient_graph_of(
    traced: TracedGraph, loss: LossGraph, layouts: Mapping[str, FlatLayout], cotangents: Sequence[str]
) -> GradientGraph:
    """Make the graph of a trace of `first_order` that has been through the default passes; it may be changed."""
    written = _drop_unwritten_buffers(traced.module, loss.positions(InputRole.BUFFER))
    _separate_results(traced.module, 1 + len(loss.metrics) + len(layouts[loss.problem].names))
    return GradientGraph(traced, layouts[loss.problem].names, tuple(cotangents), written)


def read_gradient_graph(
    loss: LossGraph,
    inputs: Sequence[torch.Tensor],
    layouts: Mapping[str, FlatLayout],
    targets: Sequence[str],
) -> ReadGradientGraph:
    """Build ``(inputs, own [N]) -> d loss/d read`` at given own parameters, for finite differences.

    The own parameters come as one flat vector, so that the caller can move them without touching the model.

    Returns:
        The graph, already through the default passes.
    """
    own_layout = layouts[loss.problem]

    def compute(tensors: list[torch.Tensor]) -> Outputs:
        *tensors, flat = tensors
        own_values = dict(zip(own_layout.names, own_layout.split(flat), strict=True))
        for i in loss.positions(InputRole.OWN):
            tensors[i] = own_values[loss.inputs[i].name]
        values, _ = prepare(loss, tensors, own_layout)
        groups = [read_parameters(loss, values, layouts[name]) for name in targets]
        result = evaluate(loss, values)
        wanted = _present([t for group in groups for t in group])
        gradients = _first_derivatives(loss, values, result[0], wanted)
        return [
            layouts[name].flatten([None if t is None else next(gradients) for t in group])
            for name, group in zip(targets, groups, strict=True)
        ]

    example = torch.empty(own_layout.size, dtype=own_layout.dtype, device=own_layout.device)
    dynamic_dims = [*loss.dynamic_dims, frozenset()]
    traced = trace(compute, [*inputs, example], dynamic_dims, loss.positions(InputRole.BATCH))
    run_default_passes(traced.module)
    return ReadGradientGraph(traced, tuple(targets))


def prepare(
    loss: LossGraph, tensors: Sequence[torch.Tensor], own_layout: FlatLayout
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """Turn graph inputs into autograd leaves and clone what the loss may write.

    Returns:
        The values to call ``loss.module`` with, and the own trained parameters among them in layout order (None for
        one that is no input of the graph).
    """
    values = list(tensors)
    for i, described in enumerate(loss.inputs):
        if described.role in (InputRole.BUFFER, InputRole.BATCH):
            values[i] = values[i].clone()
        elif described.role in (InputRole.OWN, InputRole.READ):
            values[i] = values[i].detach().requires_grad_()
    by_name = {loss.inputs[i].name: values[i] for i in loss.positions(InputRole.OWN)}
    return values, [by_name.get(name) for name in own_layout.names]


def read_parameters(loss: LossGraph, values: Sequence[torch.Tensor], layout: FlatLayout) -> list[torch.Tensor | None]:
    """Return another problem's parameters among the loss's inputs, in that problem's layout order."""
    by_name = {loss.inputs[i].name: values[i] for i in loss.positions(InputRole.READ, layout.problem)}
    return [by_name.get(name) for name in layout.names]


def _without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value


def _first_derivatives(
    loss: LossGraph, values: Sequence[torch.Tensor], value: torch.Tensor, wanted: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor | None]:
    gradients = torch.autograd.grad(scaled(loss, values, value), wanted, allow_unused=True)
    return iter([unscaled(loss, values, g) for g in gradients])


def _present(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    return [t for t in tensors if t is not None]


def _drop_unwritten_buffers(module: fx.GraphModule, buffers: Sequence[int]) -> tuple[int, ...]:
    """Remove the outputs of buffers that come back unchanged; return the positions of the others."""
    output = next(n for n in module.graph.nodes if n.op == "output")
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    values = list(output.args[0])
    first = len(values) - len(buffers)
    written = tuple(i for i, value in zip(buffers, values[first:], strict=True) if value is not placeholders[i])
    kept = values[:first] + [v for i, v in zip(buffers, values[first:], strict=True) if i in written]
    output.args = (tuple(kept),)
    module.graph.lint()
    module.recompile()
    return written


def _separate_results(module: fx.GraphModule, num_results: int) -> None:
    """Copy results that share memory with an input or a constant: what callers are given may outlive its value.

    A loss may return a parameter as a metric, and the gradient of ``w * v`` is v.
    """
    output = next(n for n in module.graph.nodes if n.op == "output")
    values = list(output.args[0])
    for k, node in enumerate(values[:num_results]):
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor) and _is_kept(node):
            with module.graph.inserting_before(output):
                # Plain clones are taken for copies that nobody needs.
                copied = module.graph.call_function(
                    torch.ops.aten.clone.default, (node,), {"memory_format": torch.preserve_format}
                )
            copied.meta = {**node.meta, "val": node.meta["val"].clone()}
            values[k] = copied
    output.args = (tuple(values),)
    module.graph.lint()
    module.recompile()


def _is_kept(node: fx.Node) -> bool:
    """Whether a value is, or is a view of, a tensor that lives longer than a call."""
    while isinstance(node.target, torch._ops.OpOverload):
        returned = node.target._schema.returns
        is_view = len(returned) == 1 and returned[0].alias_info is not None
        if not (is_view or node.target is torch.ops.aten._unsafe_view.default):
            return False
        node = node.args[0]
    return node.op in ("placeholder", "get_attr")
