"""Reverse-mode differentiation through recorded optimizer steps.

One step is ``g_t = dL/dtheta(theta_t, r) + c_t`` and ``theta_{t+1}, s_{t+1} = U(theta_t, g_t, s_t, h)`` with s the
optimizer's state and h its settings. From cotangents of the left-hand sides the vector-Jacobian product of U gives
those of theta_t, g_t, s_t and h; the cotangent w of g_t then adds ``H_t w`` to that of theta_t, and
``(d2L/dr dtheta)^T w`` to that of every problem r that the loss reads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from mlopt.autodiff import FlatLayout
from mlopt.autodiff.update import OptimizerState, apply_update
from mlopt.problem import Problem
from mlopt.runtime.derivatives import AbstractLinearization, GradientResult
from mlopt.runtime.exchange import exchanged
from mlopt.runtime.history import History, State, StepRecord, point
from mlopt.runtime.state import Sample

Tensors = list[torch.Tensor]
Scale = Callable[[list[torch.Tensor | None]], list[torch.Tensor | None]]


class Evaluator(Protocol):
    """What reversal needs of the executor: a problem's loss at a recorded point."""

    def gradient_at(self, name: str, samples: Sequence[Sample], values: Mapping[int, torch.Tensor]) -> GradientResult:
        """Return the mean loss of the samples and its gradient, where live tensors have other values."""
        ...

    def linearize_at(
        self, name: str, samples: Sequence[Sample], values: Mapping[int, torch.Tensor]
    ) -> contextlib.AbstractContextManager[AbstractLinearization]:
        """Return its second-order products there, to be used inside of the context."""
        ...


class Reversal:
    """Differentiates the recorded steps of one problem.

    Args:
        problem: The problem.
        problems: All problems of the graph.
        layouts: Their layouts.
        history: The recorded steps.
        evaluator: Evaluates the problem's loss.
        scale: What is done to a gradient before the optimizer gets it.
    """

    def __init__(
        self,
        problem: Problem,
        problems: Mapping[str, Problem],
        layouts: Mapping[str, FlatLayout],
        history: History,
        evaluator: Evaluator,
        scale: Scale,
    ) -> None:
        self._problem = problem
        self._problems = problems
        self._layouts = layouts
        self._layout = layouts[problem.name]
        self._history = history
        self._evaluator = evaluator
        self._scale = scale

    def run(self, cotangent: torch.Tensor, targets: Iterable[str], num_steps: int) -> dict[str, torch.Tensor]:
        """Send a cotangent of the parameters back through the last steps.

        Args:
            cotangent: Of the present parameters, a vector of the layout.
            targets: The problems whose cotangents are wanted.
            num_steps: How many steps, at most.

        Returns:
            Target -> its cotangent, a vector of its layout.
        """
        history = self._history
        found = {
            r: torch.zeros(self._layouts[r].vector_shape, dtype=self._layouts[r].dtype, device=self._layouts[r].device)
            for r in targets
        }
        v_parameters: Tensors = self._layout.split(cotangent)
        v_state: Tensors | None = None
        start = history.start(num_steps)
        for first, end, state in reversed(history.segments(num_steps)):
            states = {}
            for number in range(first, end):
                if number >= start:
                    states[number] = state
                if number < end - 1:
                    state = self._advance(history[number], state)
            for number in reversed(range(max(first, start), end)):
                v_parameters, v_state = self._reverse(history[number], states.pop(number), v_parameters, v_state, found)
        return found

    def _advance(self, record: StepRecord, state: State) -> State:
        """Make a recorded step again."""
        result = self._gradient(record, state)
        with torch.no_grad():
            gradients = self._scale(_sum(result.own, record.extra))
            parameters, optimizer = apply_update(
                self._problem.optimizer,
                state.parameters,
                gradients,
                self._settings(record, state.optimizer),
                self._hyperparameters(record),
                problem=self._problem.name,
            )
        return State(parameters, optimizer)

    def _reverse(
        self,
        record: StepRecord,
        state: State,
        v_parameters: Tensors,
        v_state: Tensors | None,
        found: dict[str, torch.Tensor],
    ) -> tuple[Tensors, Tensors]:
        """Turn cotangents after a step into those before it; add what goes to other problems to `found`."""
        trained = self._problem.trained_parameters()
        own = self._gradient(record, state).own
        with torch.enable_grad():
            theta = [p.detach().clone().requires_grad_() for p in state.parameters]
            gradients = [None if g is None else g.detach().clone().requires_grad_() for g in _sum(own, record.extra)]
            moments = [t.detach().clone().requires_grad_() for t in state.optimizer.flat()]
            settings = self._settings(record, state.optimizer.with_tensors(moments))
            hyper = [
                {k: h.detach().clone().requires_grad_() for k, h in group.items()}
                for group in self._hyperparameters(record)
            ]
            updated, after = apply_update(
                self._problem.optimizer, theta, self._scale(gradients), settings, hyper, problem=self._problem.name
            )
            ends = after.flat()
            pairs = [*zip(updated, v_parameters, strict=True), *(zip(ends, v_state, strict=True) if v_state else ())]
            pairs = [(output, v) for output, v in pairs if output.requires_grad]
            present = [g for g in gradients if g is not None]
            leaves = [*theta, *present, *moments, *(h for group in hyper for h in group.values())]
            products = iter(
                torch.autograd.grad([o for o, _ in pairs], leaves, [v.to(o.dtype) for o, v in pairs], allow_unused=True)
            )
        v_theta = [_or_zeros(next(products), p) for p in theta]
        w = self._layout.flatten([None if g is None else _or_zeros(next(products), g) for g in gradients])
        v_moments = [_or_zeros(next(products), t) for t in moments]
        v_hyper = [{k: _or_zeros(next(products), h) for k, h in group.items()} for group in hyper]
        values = point(record, state, trained)
        with torch.no_grad(), self._evaluator.linearize_at(self._problem.name, record.samples, values) as linearization:
            curved = self._layout.split(linearization.hvp(w))
            mixed = linearization.mixed(w) if found else {}
        for r in found:
            found[r] = found[r] + mixed[r]
        self._send_hyper(record, v_hyper, found)
        return [a + b for a, b in zip(v_theta, curved, strict=True)], v_moments

    def _gradient(self, record: StepRecord, state: State) -> GradientResult:
        values = point(record, state, self._problem.trained_parameters())
        return self._evaluator.gradient_at(self._problem.name, record.samples, values)

    def _settings(self, record: StepRecord, state: OptimizerState) -> OptimizerState:
        return OptimizerState(state.tensors, state.others, record.settings, state.groups)

    def _hyperparameters(self, record: StepRecord) -> list[dict[str, torch.Tensor]]:
        with exchanged(self._problems.values(), record.reads), torch.no_grad():
            return self._problem.hyperparameters_by_group()

    def _send_hyper(
        self, record: StepRecord, cotangents: list[dict[str, torch.Tensor]], found: dict[str, torch.Tensor]
    ) -> None:
        """Send the cotangents of learned settings to the problems whose parameters they are made of."""
        if not any(cotangents):
            return
        with exchanged(self._problems.values(), record.reads), torch.enable_grad():
            settings = self._problem.hyperparameters_by_group()
            pairs = [
                (h, v[k])
                for group, v in zip(settings, cotangents, strict=True)
                for k, h in group.items()
                if h.requires_grad
            ]
            parameters = {r: list(self._problems[r].trained_parameters().values()) for r in found}
            products = iter(
                torch.autograd.grad(
                    [h for h, _ in pairs],
                    [p for group in parameters.values() for p in group],
                    [v.to(h.dtype) for h, v in pairs],
                    allow_unused=True,
                )
            )
            for r, group in parameters.items():
                found[r] = found[r] + self._layouts[r].flatten([next(products) for _ in group])


def _sum(own: Sequence[torch.Tensor | None], extra: Sequence[torch.Tensor | None] | None) -> list[torch.Tensor | None]:
    if extra is None:
        return list(own)
    return [b if a is None else a if b is None else a + b for a, b in zip(own, extra, strict=True)]


def _or_zeros(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if gradient is None else gradient
