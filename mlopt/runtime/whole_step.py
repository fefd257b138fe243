"""Adds the graph of a whole optimizer step to the derivatives of a problem."""

from __future__ import annotations

import dataclasses

from mlopt.autodiff import FlatLayout, present_gradients, step_graph
from mlopt.capture import capture_update, warmed_twin
from mlopt.errors import UpdateError
from mlopt.problem import Problem
from mlopt.runtime.derivatives import DerivativeGraphs


def add_step(graphs: DerivativeGraphs, problem: Problem, layout: FlatLayout) -> DerivativeGraphs | str:
    """Capture a step of the optimizer and join it to the gradient.

    Args:
        graphs: The derivatives of a problem whose step is made of its own loss alone.
        problem: The problem.
        layout: Its layout.

    Returns:
        The graphs with `DerivativeGraphs.step`, or why there is none.
    """
    if layout.device.type != "cpu":
        return "steps as one graph are compiled for CPUs only"
    if problem.loss_scale is not None:
        return "its loss scale decides after each gradient whether a step is made"
    if problem.step_hooks():
        return f"it has hooks around its step: {', '.join(problem.step_hooks())}"
    trained = problem.trained_parameters()
    present = present_gradients(graphs.gradient, len(graphs.loss.metrics))
    parameters = {n: trained[n] for n in present}
    try:
        twin, copies = warmed_twin(problem.name, problem.optimizer, parameters)
        update = capture_update(problem.name, twin, copies).of(problem.optimizer, parameters)
        step = step_graph(graphs.loss, graphs.gradient, update, problem.clip_norm, normalize=problem.normalize_gradient)
    except UpdateError as error:
        return str(error)
    return dataclasses.replace(graphs, step=step)
