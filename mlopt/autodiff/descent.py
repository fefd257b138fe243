"""Steps of a problem as descent on a linear model: the graph of what all of them have in common."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mlopt.autodiff.join import placeholders_of
from mlopt.autodiff.step import StepGraph
from mlopt.autodiff.trace import trace
from mlopt.capture import LossGraph, UpdateRole
from mlopt.passes import GlmDescentStructure, find_descent, is_random, run_default_passes

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class DescentGraph:
    """``(inputs of the step) -> what the steps have in common``, see `GlmDescentStructure.tables`.

    Attributes:
        module: The graph.
        structure: What it was read off.
        num_steps: How many steps are usually made in a row.
    """

    module: fx.GraphModule
    structure: GlmDescentStructure
    num_steps: int


def descent_graph(
    step: StepGraph, loss: LossGraph, tensors: Sequence[torch.Tensor], num_steps: int
) -> DescentGraph | None:
    """Look whether a step is one of descent on a linear model.

    Args:
        step: The step.
        loss: Its loss.
        tensors: A batch.
        num_steps: How many steps are usually made in a row.

    Returns:
        The graph, or None where it was not proved that it is.
    """
    states = _states(step)
    if states is None or is_random(step.module):
        return None
    values = [n.meta["val"] for n in placeholders_of(step.module)]
    if any(isinstance(n, torch.SymInt) for v in values for n in (v.shape if isinstance(v, torch.Tensor) else (v,))):
        return None
    update, device = step.update, tensors[0].device if tensors else None
    inputs: list[Any] = list(loss.bind(tensors))
    for x, value in zip(step.settings, values[len(inputs) :], strict=True):
        known = x.role is UpdateRole.HYPERPARAMETER  # the state may not be there yet
        inputs.append(update.live(x) if known else torch.zeros(value.shape, dtype=value.dtype, device=device))
    try:
        with torch.no_grad():
            structure = find_descent(step.module, step.feedback, states, [t.detach() for t in inputs])
            if structure is None:
                return None
            tables = trace(lambda given: [*structure.tables(given)], inputs, [frozenset[int]()] * len(inputs), [])
        return DescentGraph(run_default_passes(tables.module), structure, num_steps)
    except Exception:  # pieces of a graph are run on inputs it was not made for; without this, steps are single ones
        logger.debug("looking for descent on a linear model failed", exc_info=True)
        return None


def _states(step: StepGraph) -> list[list[int]] | None:
    """Return which pairs of the feedback are the parameters, and which their velocities, in one order."""
    outputs = step.update.outputs
    parameters = [k for k, x in enumerate(outputs) if x.role is UpdateRole.PARAMETER]
    others = {x.parameter: k for k, x in enumerate(outputs) if x.role is UpdateRole.STATE and x.number is None}
    if len(parameters) + len(others) != len(step.feedback):
        return None
    if not others:
        return [parameters]
    names = [outputs[k].parameter for k in parameters]
    return [parameters, [others[name] for name in names]] if set(names) == set(others) else None
