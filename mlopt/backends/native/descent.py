"""`GlmDescent`: many steps of a problem whose loss reads its parameters through ``X W``, by one call of a kernel."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mlopt import ops
from mlopt.backends.base import Compiled, Lowering
from mlopt.backends.measure import device_of
from mlopt.backends.native.choice import Choice
from mlopt.backends.steps import FEWEST_STEPS, NativeDescent, StepsOutcome, error_of
from mlopt.passes import GlmDescentStructure

logger = logging.getLogger(__name__)

# How many steps are measured, and below how many seconds for the few it may be many.
_FEW, _MANY, _QUICK = 12, 1000, 0.005


class GlmDescent:
    """Makes steps that were found to be descent on a linear model.

    Args:
        structure: What was found.
        tables: The graph of what all steps from one point have in common.
        num_steps: How many steps are usually made in a row.
        choice: Which is faster, these steps or a loop over the graph of a single one; measured in the first run of so
            many, as it takes a few steps to make up for the tables.
    """

    def __init__(self, structure: GlmDescentStructure, tables: Compiled, num_steps: int, choice: Choice) -> None:
        self._structure = structure
        self._tables = tables
        self._num_steps = num_steps
        self._choice = choice
        self._steps: dict[torch.device, Any] = {}
        self._order = [k for state in structure.states for k in state]
        self._failed = ""

    @property
    def is_used(self) -> bool:
        """Whether it is the faster way, as far as is known."""
        return not self._failed and self._choice.first is not False

    @property
    def lowering(self) -> Lowering:
        """What is reported of the graph of the tables, and of the steps."""
        s, figures = self._structure, self._failed or self._choice.figures
        if not self.is_used:
            lowering = self._tables.lowering
            return Lowering(lowering.backend, "; ".join(filter(None, ["not used", figures])))
        features = s.positions.shape[1] - s.bias
        parts = [
            f"steps in one call: X [n, {features}], {len(s.positions)} column{'s' if len(s.positions) > 1 else ''}",
            f"{s.kind.value} gradient",
            *(["biases"] if s.bias else []),
            *(["momentum"] if len(s.states) > 1 else []),
            figures or "not measured yet",
        ]
        return Lowering("glm kernel", "; ".join(parts))

    def native(self, num_steps: int, device: torch.device) -> NativeDescent | None:
        """See `Descent`."""
        if self._failed or self._choice.first is not True or num_steps < FEWEST_STEPS:
            return None
        return NativeDescent(self._tables, self._on(device), self._order)

    def run(
        self,
        arguments: Sequence[Any],
        feedback: Sequence[tuple[int, int]],
        num_steps: int,
        otherwise: Callable[[int], Any],
    ) -> StepsOutcome | None:
        """See `Descent`."""
        if not self.is_used or num_steps < FEWEST_STEPS:
            return None
        if self._choice.first is None:
            if num_steps < self._num_steps:
                return None

            def kernel(count: int) -> StepsOutcome | None:
                made = self.make(arguments, feedback, count)
                if made is not None and made.error is not None:
                    raise made.error  # Ctrl-C; nothing has been written, and what was measured is worth nothing
                return made

            count, start = min(num_steps, _FEW), time.perf_counter()
            if kernel(count) is None:
                return None
            if time.perf_counter() - start < _QUICK:  # the price of beginning counts: as many steps as there will be
                count = min(num_steps, _MANY)
            device = device_of(arguments)
            self._choice.measure(lambda: kernel(count), lambda: otherwise(count), device, f"{count} steps")
        return self.make(arguments, feedback, num_steps) if self.is_used else None

    def make(
        self, arguments: Sequence[Any], feedback: Sequence[tuple[int, int]], num_steps: int
    ) -> StepsOutcome | None:
        """See `Descent`."""
        x, scales, targets, coefficients, holds = self._tables(*arguments)
        if not bool(holds):
            if all(bool(t.isfinite().all()) for t in (scales, targets, coefficients)):
                self._fail("the steps are not what they were found to be")
            return None
        if not ops.has_kernels(x.device, self._structure.dtype):
            self._fail(f"there are no kernels for {x.device}")
            return None
        present = [arguments[feedback[k][1]] for k in self._order]
        result = self._on(x.device).run(x, scales, targets, coefficients, present, num_steps)
        fed = dict(zip(self._order, result.fed, strict=True))
        return StepsOutcome(result.num_steps, [fed[k] for k in range(len(fed))], None, (), error_of(result))

    def _on(self, device: torch.device) -> Any:
        """Return the native steps for a device."""
        steps = self._steps.get(device)
        if steps is None:
            extension: Any = importlib.import_module("mlopt._C")
            s = self._structure
            steps = extension.GlmSteps(s.kind.value, s.positions.to(device), s.size, s.bias, len(s.states))
            self._steps[device] = steps
        return steps

    def _fail(self, reason: str) -> None:
        logger.warning("descent on a linear model is not used any more: %s", reason)
        self._failed = reason
