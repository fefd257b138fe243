"""Compares a compiled step with the step of the user's own optimizer, on copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlopt.autodiff import FlatLayout, scale_gradients
from mlopt.capture import UpdateGraph, UpdateRole, warmed_twin
from mlopt.problem import Problem
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import GraphDerivatives
from mlopt.runtime.rng import frozen_random_state, get_random_state
from mlopt.runtime.steps import CompiledStep
from mlopt.runtime.verify import TOLERANCES, tolerance_of

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
    state = get_random_state(layout.device)
    with frozen_random_state(state):
        result = derivatives.gradient(batch)
    twin = _Twin(step.graph.update, problem, layout, result.own)
    with frozen_random_state(state):
        outputs = step.compute(batch, twin.update)
    several = _find_several_disagreement(step, twin.update, batch, twin.tolerance)
    start = 1 + step.graph.num_metrics
    difference = twin.find_disagreement(outputs[start : start + len(twin.update.outputs)])
    if difference is not None:
        return difference
    loss, expected_loss = float(outputs[0]), float(result.loss)
    if math.isfinite(expected_loss) and not abs(loss - expected_loss) <= twin.tolerance * (1 + abs(expected_loss)):
        return f"loss: {loss:.6e}, and {expected_loss:.6e} in the gradient graph"
    return several


def find_update_disagreement(
    derivatives: GraphDerivatives, problem: Problem, layout: FlatLayout, batch: Batch
) -> str | None:
    """Do what `find_step_disagreement` does with the update of a problem above others.

    The direct gradients are those of the gradient graph, the indirect one is random.
    """
    compiled = derivatives.update
    assert compiled is not None
    with frozen_random_state(get_random_state(layout.device)):
        own = derivatives.gradient(batch).own
    present = [g for g in own if g is not None]
    size = max((float(g.double().square().mean().sqrt()) for g in present if g.numel()), default=0.0) or 1.0
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(layout.vector_shape, generator=generator, dtype=torch.float64) * size
    indirect = noise.to(layout.dtype).to(layout.device)
    totals = [
        part if direct is None else direct + part for direct, part in zip(own, layout.split(indirect), strict=True)
    ]
    reached = [
        total if name in compiled.graph.parameters else None for name, total in zip(layout.names, totals, strict=True)
    ]
    twin = _Twin(compiled.graph.update, problem, layout, reached)
    return twin.find_disagreement(compiled.compute(own, indirect, twin.update, twin.copies))


class _Twin:
    """A copy of an optimizer that makes the step to compare with.

    Args:
        update: The captured update.
        problem: The problem.
        layout: Its layout.
        gradients: Those of the step, in layout order, before they are scaled.
    """

    def __init__(
        self, update: UpdateGraph, problem: Problem, layout: FlatLayout, gradients: list[torch.Tensor | None]
    ) -> None:
        scaled = scale_gradients(gradients, problem.clip_norm, normalize=problem.normalize_gradient)
        self._gradients = {n: g for n, g in zip(layout.names, scaled, strict=True) if g is not None}
        scales = {n: float(g.double().square().mean().sqrt()) or 1.0 for n, g in self._gradients.items() if g.numel()}
        self._optimizer, self.copies = warmed_twin(problem.name, problem.optimizer, update.parameters, scales)
        self._layout = layout
        self.update = update.of(self._optimizer, self.copies)
        self.tolerance = tolerance_of(problem, layout)
        if any(map(_computes_with_tensors, problem.optimizer.param_groups)):
            self.tolerance = max(self.tolerance, TOLERANCES[torch.float32])

    def find_disagreement(self, outputs: Sequence[torch.Tensor]) -> str | None:
        """Make the step and compare; `outputs` are new values in the order of ``update.outputs``."""
        for name, copy in self.copies.items():
            copy.grad = self._gradients[name].detach().clone().to(copy.dtype)
        before = {x: self.update.live(x).detach().clone() for x in self.update.outputs}
        type(self._optimizer).step(self._optimizer)
        for x, got in zip(self.update.outputs, outputs, strict=True):
            expected = self.update.live(x).detach()
            move = float((expected.double() - before[x].double()).norm())
            dtype = expected.dtype if x.role is UpdateRole.PARAMETER else self._layout.dtype
            floor = _ROUNDINGS * torch.finfo(dtype).eps * float(expected.double().norm())
            difference = float((got.double() - expected.double()).norm())
            if not difference <= self.tolerance * move + floor and bool(expected.isfinite().all()):
                return f"{x}: it differs by {difference:.2e}, and moved by {move:.2e} (tolerance {self.tolerance:.0e})"
        return None


def _computes_with_tensors(group: Mapping[str, Any]) -> bool:
    """Whether an optimizer takes powers of counters, and products of settings, as float32 tensors; a graph does not."""
    return bool(group.get("capturable")) or any(isinstance(v, torch.Tensor) for k, v in group.items() if k != "params")


def _find_several_disagreement(step: CompiledStep, update: UpdateGraph, batch: Batch, tolerance: float) -> str | None:
    """Compare what makes several steps at once with as many single ones."""
    for what, times, together, one_by_one in step.compute_several(batch, update):
        for k, (got, expected) in enumerate(zip(together, one_by_one, strict=True)):
            difference = float((got.double() - expected.double()).norm())
            allowed = times * tolerance * (1e-30 + float(expected.double().norm()))
            if not difference <= allowed and bool(expected.isfinite().all()):
                return f"{times} steps by {what} differ from single ones by {difference:.2e} in result {k}"
    return None
