"""The whole step of a problem in one graph: loss, backward, scaling, and the update of the user's optimizer.

Three graphs are put one behind the other: the gradient graph, `scale_gradients`, and the captured update. Nothing is
differentiated here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from mlopt.autodiff.gradient import GradientGraph
from mlopt.autodiff.join import JoinedGraph, placeholders_of, results_of
from mlopt.autodiff.scaling import scale_gradients
from mlopt.autodiff.trace import Outputs, trace
from mlopt.capture import InputRole, LossGraph, UpdateGraph, UpdateRole, UpdateValue
from mlopt.errors import UpdateError
from mlopt.passes import is_random


@dataclasses.dataclass
class StepGraph:
    """``(loss inputs, optimizer state, hyperparameters) -> loss, metrics, new values, new buffers``.

    Attributes:
        module: The graph. It holds for the shapes that the gradient graph holds for.
        update: The captured update.
        num_loss_inputs: How many inputs are those of the loss; then come `settings`.
        settings: State and hyperparameters, in input order.
        num_metrics: How many outputs follow the loss; then come ``update.outputs``, then the buffers.
        written_buffers: Input positions of the buffers whose new values are returned.
        feedback: (output, input) pairs: what one step returns and the next one takes.
    """

    module: fx.GraphModule
    update: UpdateGraph
    num_loss_inputs: int
    settings: tuple[UpdateValue, ...]
    num_metrics: int
    written_buffers: tuple[int, ...]
    feedback: tuple[tuple[int, int], ...]


def present_gradients(gradient: GradientGraph, num_metrics: int) -> list[str]:
    """Return the names of the trained parameters that the loss has a gradient for."""
    results = results_of(gradient.traced.module)[1 + num_metrics :]
    return [name for name, node in zip(gradient.own, results, strict=False) if isinstance(node, fx.Node)]


def step_graph(
    loss: LossGraph, gradient: GradientGraph, update: UpdateGraph, clip_norm: float | None, *, normalize: bool
) -> StepGraph:
    """Put gradient, scaling and update together.

    Args:
        loss: The captured loss.
        gradient: Its gradient graph, without cotangents.
        update: The update of the parameters of `present_gradients`, of a later than the first step.
        clip_norm: See `Problem`.
        normalize: See `Problem.normalize_gradient`.

    Raises:
        UpdateError: The update is not one that can be repeated: it makes new state, or draws random numbers.
    """
    assert not gradient.cotangents, "a step with an indirect gradient is more than its own loss's gradient"
    check_repeatable(update)
    num_metrics = len(loss.metrics)
    joined = JoinedGraph()
    first = placeholders_of(gradient.traced.module)
    inputs = joined.inputs(first)
    results = joined.append(gradient.traced.module, inputs)
    value, metrics = results[0], results[1 : 1 + num_metrics]
    own = dict(zip(gradient.own, results[1 + num_metrics :], strict=False))
    buffers = results[1 + num_metrics + len(gradient.own) :]

    names = [name for name, node in own.items() if node is not None]
    if clip_norm is not None or normalize:
        scaling = _scaling([own[name] for name in names], clip_norm, normalize=normalize)
        own.update(zip(names, joined.append(scaling, [own[name] for name in names]), strict=True))

    position = {loss.inputs[i].name: i for i in loss.positions(InputRole.OWN)}
    parameters = {name: inputs[i] for name, i in position.items()}
    updated, settings = append_update(joined, update, parameters, own, inputs[-1])
    module = joined.finish([value, *metrics, *updated, *buffers])

    inputs_of = {x: len(inputs) + i for i, x in enumerate(settings)}
    inputs_of |= {x: position[x.parameter] for x in update.inputs if x.role is UpdateRole.PARAMETER}
    start = 1 + num_metrics
    feedback = [(start + i, inputs_of[x]) for i, x in enumerate(update.outputs)]
    feedback += [(start + len(update.outputs) + i, k) for i, k in enumerate(gradient.written_buffers)]
    return StepGraph(
        module=module,
        update=update,
        num_loss_inputs=len(inputs),
        settings=settings,
        num_metrics=num_metrics,
        written_buffers=gradient.written_buffers,
        feedback=tuple(feedback),
    )


def append_update(
    joined: JoinedGraph,
    update: UpdateGraph,
    parameters: Mapping[str, fx.Node],
    gradients: Mapping[str, fx.Node],
    last: fx.Node,
) -> tuple[list[fx.Node], tuple[UpdateValue, ...]]:
    """Add an optimizer's update to a graph.

    Args:
        joined: The graph; state and settings of the optimizer become inputs of it.
        update: The update.
        parameters: Its parameters by name.
        gradients: Their gradients by name.
        last: The last input so far.

    Returns:
        The new values in the order of ``update.outputs``, and what the new inputs are.
    """
    taken: list[fx.Node] = []
    settings: list[UpdateValue] = []
    for x, placeholder in zip(update.inputs, placeholders_of(update.module), strict=True):
        if x.role is UpdateRole.PARAMETER:
            taken.append(parameters[x.parameter])
        elif x.role is UpdateRole.GRADIENT:
            taken.append(gradients[x.parameter])
        else:
            (last,) = joined.inputs([placeholder], after=last)
            taken.append(last)
            settings.append(x)
    return joined.append(update.module, taken), tuple(settings)


def check_repeatable(update: UpdateGraph) -> None:
    """Refuse an update that cannot be made again and again by one graph.

    Raises:
        UpdateError: It makes new state, or draws random numbers.
    """
    where = f"problem {update.problem!r}: a step of its optimizer {type(update.optimizer).__name__}"
    new = [x for x in update.outputs if x.role is not UpdateRole.PARAMETER and x not in update.inputs]
    if new or update.made:
        raise UpdateError(f"{where} makes new state ({new[0] if new else next(iter(update.made))}) again and again")
    if is_random(update.module):
        raise UpdateError(f"{where} draws random numbers")


def _scaling(gradients: Sequence[fx.Node], clip_norm: float | None, *, normalize: bool) -> fx.GraphModule:
    def compute(tensors: list[torch.Tensor]) -> Outputs:
        return [*scale_gradients([*tensors], clip_norm, normalize=normalize)]

    fakes = [g.meta["val"] for g in gradients]
    # Of another fake mode than the trace's: only their metadata is wanted.
    examples = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in fakes]
    return trace(compute, examples, [frozenset()] * len(examples), []).module
