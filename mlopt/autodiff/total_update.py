"""The step of a problem above others, once its gradients are there: their sum, scaling, and the optimizer's update.

The gradient of such a problem is a direct one, per parameter, and an indirect one, a flat vector in which the products
of the problems below have been summed. By torch calls, what follows takes longer than a small solve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import fx

from mlopt.autodiff.gradient import GradientGraph
from mlopt.autodiff.join import JoinedGraph, placeholders_of, results_of
from mlopt.autodiff.layout import FlatLayout
from mlopt.autodiff.scaling import scale_gradients
from mlopt.autodiff.step import append_update, check_repeatable, present_gradients
from mlopt.autodiff.trace import Outputs, trace
from mlopt.capture import UpdateGraph, UpdateRole, UpdateValue


@dataclasses.dataclass
class TotalUpdateGraph:
    """``(parameters, direct gradients, indirect gradient [N], settings) -> new values``.

    Attributes:
        module: The graph.
        update: The captured update; outputs are in its order.
        parameters: Names of the parameters, in input order.
        direct: Positions in the layout of those that have a direct gradient, in input order.
        settings: State and hyperparameters, in input order.
    """

    module: fx.GraphModule
    update: UpdateGraph
    parameters: tuple[str, ...]
    direct: tuple[int, ...]
    settings: tuple[UpdateValue, ...]


def with_gradient(gradient: GradientGraph, num_metrics: int, reached: Collection[str]) -> list[str]:
    """Return the names of the trained parameters that have a total gradient, in order.

    Args:
        gradient: The gradient graph of the problem's own loss.
        num_metrics: How many metrics it returns.
        reached: The parameters that the indirect gradient reaches.
    """
    direct = present_gradients(gradient, num_metrics)
    return [name for name in gradient.own if name in direct or name in reached]


def total_update_graph(
    gradient: GradientGraph,
    num_metrics: int,
    layout: FlatLayout,
    update: UpdateGraph,
    clip_norm: float | None,
    *,
    normalize: bool,
) -> TotalUpdateGraph:
    """Put sum, scaling and update together.

    Args:
        gradient: The gradient graph of the problem's own loss.
        num_metrics: How many metrics it returns.
        layout: The layout of the problem's parameters.
        update: The update of the parameters of `with_gradient`, of a later than the first step.
        clip_norm: See `Problem`.
        normalize: See `Problem.normalize_gradient`.

    Raises:
        UpdateError: The update is not one that can be repeated.
    """
    check_repeatable(update)
    results = results_of(gradient.traced.module)[1 + num_metrics :]
    own = dict(zip(gradient.own, results, strict=False))
    direct = [name for name in layout.names if isinstance(own[name], fx.Node)]
    names = [name for name in layout.names if name in update.parameters]

    def compute(tensors: list[torch.Tensor]) -> Outputs:
        *given, indirect = tensors
        by_name = dict(zip(direct, given, strict=True))
        parts = dict(zip(layout.names, layout.split(indirect), strict=True))
        totals: list[torch.Tensor | None] = [by_name[n] + parts[n] if n in by_name else parts[n] for n in names]
        return [*scale_gradients(totals, clip_norm, normalize=normalize)]

    examples = [_like(own[name].meta["val"]) for name in direct]
    examples.append(torch.empty(layout.vector_shape, dtype=layout.dtype, device=layout.device))
    total = trace(compute, examples, [frozenset()] * len(examples), []).module

    joined = JoinedGraph()
    pairs = zip(update.inputs, placeholders_of(update.module), strict=True)
    placeholders = {x.parameter: node for x, node in pairs if x.role is UpdateRole.PARAMETER}
    parameters = dict(zip(names, joined.inputs([placeholders[name] for name in names]), strict=True))
    given = joined.inputs(placeholders_of(total))
    gradients = dict(zip(names, joined.append(total, given), strict=True))
    updated, settings = append_update(joined, update, parameters, gradients, given[-1])
    positions = tuple(layout.names.index(name) for name in direct)
    return TotalUpdateGraph(joined.finish(updated), update, tuple(names), positions, settings)


def _like(fake: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the metadata of one of another fake mode."""
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=fake.device)
