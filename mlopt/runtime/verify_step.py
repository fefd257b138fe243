"""Compares a compiled step with the step of the user's own optimizer, on copies."""

from __future__ import annotations

import math

import torch

from mlopt.autodiff import FlatLayout, scale_gradients
from mlopt.capture import UpdateRole, warmed_twin
from mlopt.problem import Problem
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import GraphDerivatives
from mlopt.runtime.rng import frozen_random_state, get_random_state
from mlopt.runtime.verify import tolerance_of

_ROUNDINGS = 10  # of the parameter itself: a new value is a rounded sum


def find_step_disagreement(
    derivatives: GraphDerivatives, problem: Problem, layout: FlatLayout, batch: Batch
) -> str | None:
    """Make one step by the graph and one by a copy of the optimizer, from the same state, and compare all new values.

    The copy has made some steps on random gradients of the true ones' size, so that no moment is zero. The gradients
    are those of the gradient graph, which has been verified before.

    Args:
        derivatives: They have a step.
        problem: The problem.
        layout: Its layout.
        batch: The batch to compare on.

    Returns:
        None if they agree, else one line that says where they do not.
    """
    step = derivatives.step
    assert step is not None
    update = step.graph.update
    state = get_random_state(layout.device)
    with frozen_random_state(state):
        result = derivatives.gradient(batch)
    gradients = scale_gradients(result.own, problem.clip_norm, normalize=problem.normalize_gradient)
    by_name = {n: g for n, g in zip(layout.names, gradients, strict=True) if g is not None}
    scales = {n: float(g.double().square().mean().sqrt()) or 1.0 for n, g in by_name.items() if g.numel()}
    twin, copies = warmed_twin(problem.name, problem.optimizer, update.parameters, scales)
    other = update.of(twin, copies)
    with frozen_random_state(state):
        outputs = step.compute(batch, other)
    for name, copy in copies.items():
        copy.grad = by_name[name].detach().clone().to(copy.dtype)
    before = {x: other.live(x).detach().clone() for x in update.outputs}
    type(twin).step(twin)
    tolerance = tolerance_of(problem, layout)
    start = 1 + step.graph.num_metrics
    for x, got in zip(update.outputs, outputs[start : start + len(update.outputs)], strict=True):
        expected = other.live(x).detach()
        move = float((expected.double() - before[x].double()).norm())
        dtype = expected.dtype if x.role is UpdateRole.PARAMETER else layout.dtype
        floor = _ROUNDINGS * torch.finfo(dtype).eps * float(expected.double().norm())
        difference = float((got.double() - expected.double()).norm())
        if not difference <= tolerance * move + floor and bool(expected.isfinite().all()):
            return f"{x}: it differs by {difference:.2e}, and moved by {move:.2e} (tolerance {tolerance:.0e})"
    loss, expected_loss = float(outputs[0]), float(result.loss)
    if math.isfinite(expected_loss) and not abs(loss - expected_loss) <= tolerance * (1 + abs(expected_loss)):
        return f"loss: {loss:.6e}, and {expected_loss:.6e} in the gradient graph"
    return None
