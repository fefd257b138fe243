"""Adds graphs with the optimizer's update in them to the derivatives of a problem."""

from __future__ import annotations

import dataclasses
from typing import Any

from mlopt.autodiff import (
    FlatLayout,
    descent_graph,
    num_repeated,
    present_gradients,
    repeated_steps,
    step_graph,
    total_update_graph,
    with_gradient,
)
from mlopt.backends import FEWEST_STEPS
from mlopt.capture import capture_update, warmed_twin
from mlopt.errors import UpdateError
from mlopt.planner import ProblemPlan
from mlopt.problem import Problem
from mlopt.runtime.data import BatchStream
from mlopt.runtime.derivatives import DerivativeGraphs


def add_updates(
    graphs: DerivativeGraphs,
    problem: Problem,
    layout: FlatLayout,
    planned: ProblemPlan,
    stream: BatchStream,
    *,
    has_kernels: bool,
) -> DerivativeGraphs | str:
    """Capture a step of the optimizer and join it to the gradients.

    Where a step is no more than the gradient of the problem's own loss, all of it becomes one graph; where products of
    problems below are added to that, what follows them does.

    Args:
        graphs: The derivatives of a problem.
        problem: The problem.
        layout: Its layout.
        planned: What its step is made of.
        stream: Its batches.
        has_kernels: Whether the backend has kernels for whole descents.

    Returns:
        The graphs with `DerivativeGraphs.step` or `DerivativeGraphs.update`, or why there is none.
    """
    if not planned.is_whole and not planned.reached:
        return graphs
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
    joined = dataclasses.replace(graphs, step=step)
    if not planned.runs_ahead or not stream.has_one_batch:
        return joined
    # All but the last, which is made by itself, for its loss.
    count = problem.unroll_steps - 1
    if has_kernels and count >= FEWEST_STEPS and not graphs.has_tasks:
        batch, loss = stream.peek(), graphs.loss
        fits = batch.spec == loss.batch_spec and loss.guard.accepts(batch.tensors)
        descent = descent_graph(step, loss, batch.tensors, count) if fits else None
        if descent is not None:
            return dataclasses.replace(joined, descent=descent)
    times = num_repeated(step, count)
    return dataclasses.replace(joined, repeated=repeated_steps(step, times)) if times else joined
