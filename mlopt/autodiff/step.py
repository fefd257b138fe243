"""The whole step of a problem in one graph: loss, backward, scaling, and the update of the user's optimizer.

Three graphs are put one behind the other: the gradient graph, `scale_gradients`, and the captured update. Nothing is
differentiated here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from mlopt.autodiff.gradient import GradientGraph
from mlopt.autodiff.scaling import scale_gradients
from mlopt.autodiff.trace import Outputs, trace
from mlopt.capture import InputRole, LossGraph, UpdateGraph, UpdateRole, UpdateValue
from mlopt.errors import UpdateError
from mlopt.passes import draws_random, remove_dead_nodes_pass


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
    results = _results(gradient.traced.module)[1 + num_metrics :]
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
    _check_repeatable(update)
    num_metrics = len(loss.metrics)
    joined = _Joined()
    first = _placeholders(gradient.traced.module)
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
    taken: list[fx.Node] = []
    settings: list[tuple[UpdateValue, fx.Node]] = []
    for x, placeholder in zip(update.inputs, _placeholders(update.module), strict=True):
        if x.role is UpdateRole.PARAMETER:
            taken.append(inputs[position[x.parameter]])
        elif x.role is UpdateRole.GRADIENT:
            taken.append(own[x.parameter])
        else:
            (node,) = joined.inputs([placeholder], after=(settings[-1][1] if settings else inputs[-1]))
            taken.append(node)
            settings.append((x, node))
    module = joined.finish([value, *metrics, *joined.append(update.module, taken), *buffers])

    inputs_of = {x: len(inputs) + i for i, (x, _) in enumerate(settings)}
    inputs_of |= {x: position[x.parameter] for x in update.inputs if x.role is UpdateRole.PARAMETER}
    start = 1 + num_metrics
    feedback = [(start + i, inputs_of[x]) for i, x in enumerate(update.outputs)]
    feedback += [(start + len(update.outputs) + i, k) for i, k in enumerate(gradient.written_buffers)]
    return StepGraph(
        module=module,
        update=update,
        num_loss_inputs=len(inputs),
        settings=tuple(x for x, _ in settings),
        num_metrics=num_metrics,
        written_buffers=gradient.written_buffers,
        feedback=tuple(feedback),
    )


def _check_repeatable(update: UpdateGraph) -> None:
    where = f"problem {update.problem!r}: a step of its optimizer {type(update.optimizer).__name__}"
    new = [x for x in update.outputs if x.role is not UpdateRole.PARAMETER and x not in update.inputs]
    if new or update.made:
        raise UpdateError(f"{where} makes new state ({new[0] if new else next(iter(update.made))}) again and again")
    if any(draws_random(node) for node in update.module.graph.nodes):
        raise UpdateError(f"{where} draws random numbers")


def _scaling(gradients: Sequence[fx.Node], clip_norm: float | None, *, normalize: bool) -> fx.GraphModule:
    def compute(tensors: list[torch.Tensor]) -> Outputs:
        return [*scale_gradients([*tensors], clip_norm, normalize=normalize)]

    fakes = [g.meta["val"] for g in gradients]
    # Of another fake mode than the trace's: only their metadata is wanted.
    examples = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in fakes]
    return trace(compute, examples, [frozenset()] * len(examples), []).module


class _Joined:
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
        values: Mapping[fx.Node, fx.Node] = dict(zip(_placeholders(module), arguments, strict=True))
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
        return [values[n] if isinstance(n, fx.Node) else n for n in _results(module)]

    def finish(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """Return the module."""
        self._graph.output(tuple(results))
        self._graph.lint()
        return remove_dead_nodes_pass(fx.GraphModule(self._root, self._graph))


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _results(module: fx.GraphModule) -> list[fx.Node]:
    return list(next(n for n in module.graph.nodes if n.op == "output").args[0])
