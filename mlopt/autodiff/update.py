"""Derivatives of one optimizer step: SAMA's factor and the reverse-mode product that unrolling needs."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from mlopt.autodiff.layout import FlatLayout
from mlopt.autodiff.trace import Outputs, TracedGraph, trace
from mlopt.capture.update import UpdateGraph, UpdateRole, UpdateValue
from mlopt.errors import UpdateError
from mlopt.passes import run_default_passes


@dataclasses.dataclass
class UpdateFactorGraph:
    """The diagonal of ``-d theta_new / d g``.

    Attributes:
        traced: Inputs as `UpdateGraph.inputs`, at the step's *old* parameters and state; one output: the factor [N]
            in the layout's order and dtype, 0 for parameters that the step does not move.
    """

    traced: TracedGraph


@dataclasses.dataclass
class UpdateVjpGraph:
    """The transpose of one step.

    Attributes:
        traced: Inputs as `UpdateGraph.inputs`, then one cotangent per entry of `cotangents`; one output per entry of
            `targets`, shaped like that input, or None where no cotangent reaches it.
        cotangents: The outputs of the update that a cotangent is given for.
        targets: The inputs of the update that a cotangent is returned for.
    """

    traced: TracedGraph
    cotangents: tuple[UpdateValue, ...]
    targets: tuple[UpdateValue, ...]


def update_factor(update: UpdateGraph, layout: FlatLayout) -> UpdateFactorGraph:
    """Build SAMA's factor of an element-wise optimizer: ``D_i = -d theta_new_i / d g_i``.

    SAMA (Choe et al. 2023, arXiv 2310.05674) writes an adaptive optimizer's step as ``theta_new = theta - u(g)`` and
    multiplies the cotangent of the parameters by ``du/dg``, which is diagonal. ``D`` is that derivative as it is: of
    the real update, at the parameters, gradient and state of one step, with bias correction and the learning rate
    inside and nothing divided out. For SGD without momentum it is the learning rate in every element; for Adam, with
    g the gradient after weight decay,

        D = lr / (1 - beta1^t) * [(1 - beta1) / d - m (1 - beta2) g / (d0 (1 - beta2^t) d^2)],

    with m, v the new moments, ``d0 = sqrt(v / (1 - beta2^t))``, ``d = d0 + eps``, and the second term 0 where v is 0
    (see `mlopt.capture.update`). Divide by the learning rate for the factor per unit of it.

    The Jacobian of an element-wise update is diagonal, so one vector-Jacobian product with ones gives all of it. That
    the update is element-wise is proved on the graph.

    Args:
        update: The captured step.
        layout: Layout of the problem's trained parameters.

    Returns:
        The graph, already through the default passes.

    Raises:
        UpdateError: The update is not element-wise (Muon, Adafactor); names the operation that mixes elements.
    """
    _check_elementwise(update)
    gradients = update.positions(UpdateRole.GRADIENT)
    results = update.output_positions(UpdateRole.PARAMETER)

    def compute(tensors: list[torch.Tensor]) -> Outputs:
        values = [t.detach() for t in tensors]
        for i in gradients:
            values[i].requires_grad_()
        outputs = update.module(*values)
        moved = [outputs[i] for i in results if outputs[i].requires_grad]
        found = torch.autograd.grad(
            moved, [values[i] for i in gradients], [torch.ones_like(t) for t in moved], allow_unused=True
        )
        by_name = {update.inputs[i].parameter: d for i, d in zip(gradients, found, strict=True) if d is not None}
        return [-layout.flatten([by_name.get(name) for name in layout.names])]

    return UpdateFactorGraph(_traced(update, compute, []))


def update_vjp(update: UpdateGraph) -> UpdateVjpGraph:
    """Build the vector-Jacobian product of one step, the unit of reverse-mode unrolling.

    With ``(theta', s') = F(theta, g, s, h)`` (s the state, h the hyperparameters) and cotangents ``v'`` of the outputs:
    ``v_x = v_theta' dF_theta/dx + v_s' dF_s/dx`` for every floating input x. Counters, whose new value depends on
    nothing but counters, have no cotangent: nothing that one would differentiate by reaches them.

    Returns:
        The graph, already through the default passes.
    """
    counters = _counters(update)
    outputs = [
        i
        for i, x in enumerate(update.outputs)
        if (x.parameter, x.key) not in counters and _output(update, i).is_floating_point()
    ]
    placeholders = [n.meta["val"] for n in update.module.graph.nodes if n.op == "placeholder"]
    targets = [
        i
        for i, x in enumerate(update.inputs)
        if (x.role is not UpdateRole.STATE or (x.parameter, x.key) not in counters)
        and placeholders[i].is_floating_point()
    ]

    def compute(tensors: list[torch.Tensor]) -> Outputs:
        values = [t.detach() for t in tensors[: len(update.inputs)]]
        cotangents = tensors[len(update.inputs) :]
        for i in targets:
            values[i].requires_grad_()
        results = update.module(*values)
        pairs = [(results[i], v) for i, v in zip(outputs, cotangents, strict=True) if results[i].requires_grad]
        return list(
            torch.autograd.grad(
                [r for r, _ in pairs], [values[i] for i in targets], [v for _, v in pairs], allow_unused=True
            )
        )

    traced = _traced(update, compute, [_output(update, i) for i in outputs])
    return UpdateVjpGraph(traced, tuple(update.outputs[i] for i in outputs), tuple(update.inputs[i] for i in targets))


def _traced(update: UpdateGraph, compute: object, extra: list[torch.Tensor]) -> TracedGraph:
    fakes = [n.meta["val"] for n in update.module.graph.nodes if n.op == "placeholder"] + extra
    # Of another fake mode than the trace's: only their metadata is wanted.
    examples = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in fakes]
    traced = trace(compute, examples, [frozenset()] * len(examples), [])
    run_default_passes(traced.module)
    return traced


def _output(update: UpdateGraph, position: int) -> torch.Tensor:
    output = next(n for n in update.module.graph.nodes if n.op == "output")
    return output.args[0][position].meta["val"]


def _roles_read(update: UpdateGraph) -> dict[fx.Node, set[UpdateValue]]:
    """Map every node to the inputs that it depends on."""
    read: dict[fx.Node, set[UpdateValue]] = {}
    inputs = iter(update.inputs)
    for node in update.module.graph.nodes:
        read[node] = (
            {next(inputs)} if node.op == "placeholder" else set().union(*(read[n] for n in node.all_input_nodes))
        )
    return read


def _counters(update: UpdateGraph) -> set[tuple[str, str]]:
    """Return the state entries (parameter, key) whose new value depends on themselves and constants only."""
    read = _roles_read(update)
    output = next(n for n in update.module.graph.nodes if n.op == "output")
    return {
        (x.parameter, x.key)
        for x, node in zip(update.outputs, output.args[0], strict=True)
        if x.role is UpdateRole.STATE
        and all((y.parameter, y.key) == (x.parameter, x.key) for y in read[node])
        and node.meta["val"].ndim == 0
    }


def _check_elementwise(update: UpdateGraph) -> None:
    """Prove that element i of a new parameter depends on element i of its own gradient only.

    Every node between a gradient and a new parameter must be a pointwise operation among tensors of the parameter's
    shape and tensors that no gradient reaches, and the gradient must be that of the same parameter.

    Raises:
        UpdateError: It is not so.
    """
    read = _roles_read(update)
    output = next(n for n in update.module.graph.nodes if n.op == "output")
    new = [(update.outputs[i], output.args[0][i]) for i in update.output_positions(UpdateRole.PARAMETER)]
    for x, root in new:
        between = _ancestors(root)
        for node in update.module.graph.nodes:  # in order, so that the first operation that mixes is the one named
            gradients = {y.parameter for y in read[node] if y.role is UpdateRole.GRADIENT}
            if node not in between or not gradients:
                continue
            if gradients != {x.parameter}:
                other = next(iter(gradients - {x.parameter}))
                raise _not_elementwise(update, f"the new value of {x.parameter!r} depends on the gradient of {other!r}")
            aligned = all(
                n.meta["val"].shape == node.meta["val"].shape
                for n in node.all_input_nodes
                if any(y.role is UpdateRole.GRADIENT for y in read[n])
            )
            if node.op != "placeholder" and not (aligned and _is_pointwise(node)):
                raise _not_elementwise(update, f"{node.target} mixes elements of the gradient of {x.parameter!r}")


def _ancestors(root: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _is_pointwise(node: fx.Node) -> bool:
    aten = torch.ops.aten
    target = node.target
    copies = (aten.clone.default, aten._to_copy.default)  # not tagged, since they take memory formats
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or target in copies)


def _not_elementwise(update: UpdateGraph, reason: str) -> UpdateError:
    return UpdateError(
        f"problem {update.problem!r}: the factor of its optimizer {type(update.optimizer).__name__} was asked for, but "
        f"its update is not element-wise: {reason}; take another estimator, or an element-wise optimizer (SGD, Adam)"
    )
