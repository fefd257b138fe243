"""Adds graphs with the optimizer's update in them to the derivatives of a problem."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from mlopt.autodiff import (
    FlatLayout,
    StepGraph,
    draws_random,
    present_gradients,
    repeated_steps,
    step_graph,
    total_update_graph,
    with_gradient,
)
from mlopt.capture import capture_update, warmed_twin
from mlopt.errors import UpdateError
from mlopt.passes import size_hint
from mlopt.planner import ProblemPlan
from mlopt.problem import Problem
from mlopt.runtime.derivatives import DerivativeGraphs

# More numbers than that take longer to read than a package takes to be called.
_MOST_NUMBERS = 1 << 17
_TIMES = range(4, 13)  # compiling takes longer the more steps there are


def add_updates(
    graphs: DerivativeGraphs, problem: Problem, layout: FlatLayout, planned: ProblemPlan
) -> DerivativeGraphs | str:
    """Capture a step of the optimizer and join it to the gradients.

    Where a step is no more than the gradient of the problem's own loss, all of it becomes one graph; where products of
    problems below are added to that, what follows them does.

    Args:
        graphs: The derivatives of a problem.
        problem: The problem.
        layout: Its layout.
        planned: What its step is made of.

    Returns:
        The graphs with `DerivativeGraphs.step` or `DerivativeGraphs.update`, or why there is none.
    """
    if not planned.is_whole and not planned.reached:
        return graphs
    if layout.device.type != "cpu":
        return "steps as one graph are compiled for CPUs only"
    if problem.loss_scale is not None:
        return "its loss scale decides after each gradient whether a step is made"
    if problem.step_hooks():
        return f"it has hooks around its step: {', '.join(problem.step_hooks())}"
    trained = problem.trained_parameters()
    num_metrics = len(graphs.loss.metrics)
    if planned.is_whole:
        present = present_gradients(graphs.gradient, num_metrics)
    else:
        present = with_gradient(graphs.gradient, num_metrics, planned.reached)
    parameters = {n: trained[n] for n in present}
    scaling: dict[str, Any] = {"clip_norm": problem.clip_norm, "normalize": problem.normalize_gradient}
    try:
        twin, copies = warmed_twin(problem.name, problem.optimizer, parameters)
        update = capture_update(problem.name, twin, copies).of(problem.optimizer, parameters)
        if not planned.is_whole:
            total = total_update_graph(graphs.gradient, num_metrics, layout, update, **scaling)
            return dataclasses.replace(graphs, update=total)
        step = step_graph(graphs.loss, graphs.gradient, update, **scaling)
    except UpdateError as error:
        return str(error)
    times = _times(problem, step) if planned.runs_ahead else 0
    return dataclasses.replace(graphs, step=step, repeated=repeated_steps(step, times) if times else None)


def _times(problem: Problem, step: StepGraph) -> int:
    """Return how many steps one graph should make; 0 for no such graph.

    They are worth having where there is one batch, and steps are so small that their calls count. Of `unroll_steps`
    the last is made by itself, for its loss: the rest should be a multiple, or little more.
    """
    data = problem.data
    still = data is None or (type(data) in (list, tuple) and problem.loaders() is None and len(data) == 1)  # type: ignore[arg-type]
    others = problem.unroll_steps - 1
    if not still or others < min(_TIMES) or any(draws_random(n) for n in step.module.graph.nodes):
        return 0
    inputs = [n.meta["val"] for n in step.module.graph.nodes if n.op == "placeholder"]
    if sum(math.prod(size_hint(n) for n in x.shape) for x in inputs if isinstance(x, torch.Tensor)) > _MOST_NUMBERS:
        return 0
    return min((t for t in _TIMES if t <= others), key=lambda t: (others % t, -t))
