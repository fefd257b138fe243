"""Carries out the instructions of an `ExecutionPlan`. Every decision was made by the planner."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mlopt import ops
from mlopt.autodiff import FlatLayout
from mlopt.capture.output import silenced
from mlopt.errors import SolverWarning
from mlopt.linalg import FunctionOperator, Outcome, Solution
from mlopt.planner import ExecutionPlan, Gradient, Linearize, MixedProduct, Solve, Update
from mlopt.planner.instructions import HYPERGRADIENT
from mlopt.problem import Problem
from mlopt.runtime.data import Batch, BatchStream
from mlopt.runtime.derivatives import AbstractDerivatives, AbstractLinearization, GradientResult
from mlopt.runtime.rng import RandomState, frozen_random_state, get_random_state

Derive = Callable[[str, Batch], AbstractDerivatives]


@dataclasses.dataclass
class ProblemState:
    """What the runtime remembers of one problem.

    Attributes:
        stream: Its batches.
        num_steps: Optimizer steps made.
        steps_seen: For each lower problem, its `num_steps` when this problem last stepped.
        batch: The batch of the last step.
        random_state: The generators before the last step's loss, so that a hypergradient sees that step's masks.
    """

    stream: BatchStream
    num_steps: int = 0
    steps_seen: dict[str, int] = dataclasses.field(default_factory=dict)
    batch: Batch | None = None
    random_state: RandomState | None = None


@dataclasses.dataclass
class Pass:
    """The slots of one run of a problem's instructions."""

    slots: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    linearizations: dict[str, AbstractLinearization] = dataclasses.field(default_factory=dict)
    result: GradientResult | None = None

    def add(self, slot: str, value: torch.Tensor) -> None:
        """Add a vector into a slot; an empty slot takes it over."""
        present = self.slots.get(slot)
        self.slots[slot] = value if present is None else present + value


class Executor:
    """Runs instructions on the live state.

    Args:
        plan: What to run.
        problems: The problems by name.
        layouts: Their flat layouts.
        derive: Gives the derivatives of a problem that are valid for a batch.
        streams: Their batches.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        problems: Mapping[str, Problem],
        layouts: Mapping[str, FlatLayout],
        derive: Derive,
        streams: Mapping[str, BatchStream],
    ) -> None:
        self.plan = plan
        self.problems = problems
        self.layouts = layouts
        self.states = {name: ProblemState(streams[name]) for name in problems}
        self.guesses: dict[tuple[str, str], torch.Tensor] = {}  # (problem stepped, slot) -> previous q
        self.solutions: dict[tuple[str, str], Solution] = {}  # the same, for reports
        self._derive = derive
        self._warned: set[tuple[str, str, Outcome]] = set()

    def is_due(self, name: str) -> bool:
        """Whether a problem steps now: its lower problems have made their steps since its last one."""
        state = self.states[name]
        for lower in self.plan[name].lowers:
            problem, made = self.problems[lower], self.states[lower].num_steps
            since = made - max(state.steps_seen.get(lower, 0), problem.warmup_steps)
            if since < problem.unroll_steps:
                return False
        return True

    def step(self, name: str) -> dict[str, Any]:
        """Make one optimizer step of a problem; return its loss and metrics."""
        state = self.states[name]
        batch = state.stream.peek()
        before = get_random_state(self.layouts[name].device) if self._derive(name, batch).is_random else None
        run = self._run(name, batch, keep_guesses=True)
        result = run.result
        assert result is not None
        gradients = self._total_gradient(name, run)
        state.stream.next()
        state.batch, state.random_state = batch, before
        with torch.no_grad():
            for live, value in result.buffers:
                live.copy_(value)
        self._update(name, gradients)
        state.num_steps += 1
        state.steps_seen = {lower: self.states[lower].num_steps for lower in self.plan[name].lowers}
        return {"loss": result.loss, **result.metrics}

    def hypergradient(self, name: str, batch: Batch | None) -> list[torch.Tensor | None]:
        """Return the total gradient of a problem at the present state; nothing is changed."""
        batch = self.states[name].stream.peek() if batch is None else batch
        with silenced(), frozen_random_state(get_random_state(self.layouts[name].device)):
            run = self._run(name, batch, keep_guesses=False)
        return self._total_gradient(name, run)

    def lower_point(self, name: str) -> tuple[Batch, RandomState | None]:
        """Return the batch and the random state at which a lower problem is differentiated: those of its last step."""
        state = self.states[name]
        if state.batch is None:  # not stepped yet: the batch it will take next
            return state.stream.peek(), None
        return state.batch, state.random_state

    def _run(self, name: str, batch: Batch, *, keep_guesses: bool) -> Pass:
        run = Pass()
        for instruction in self.plan[name].instructions:
            if isinstance(instruction, Gradient):
                run.result = self._derive(name, batch).gradient(batch)
                for read, slot in instruction.cotangents:
                    run.add(slot, run.result.cotangents[read])
            elif isinstance(instruction, Linearize):
                at, random_state = self.lower_point(instruction.problem)
                with frozen_random_state(random_state):
                    run.linearizations[instruction.problem] = self._derive(instruction.problem, at).linearize(at)
            elif isinstance(instruction, Solve):
                self._solve(name, instruction, run, keep_guesses=keep_guesses)
            elif isinstance(instruction, MixedProduct):
                for slot, value in self._mixed(instruction, run):
                    run.add(slot, -value)
            else:
                assert isinstance(instruction, Update)  # by the caller, once nothing can fail any more
        return run

    def _solve(self, name: str, instruction: Solve, run: Pass, *, keep_guesses: bool) -> None:
        key = (name, instruction.out)
        layout = self.layouts[instruction.problem]
        linearization = run.linearizations.get(instruction.problem)

        def no_product(_: torch.Tensor) -> torch.Tensor:
            raise ValueError(
                f"{instruction.estimator!r} multiplies with H in solve(), but its `uses_hvp` is False; set it to True"
            )

        product: Callable[[torch.Tensor], torch.Tensor] = no_product
        native = None
        if linearization and instruction.estimator.uses_hvp:
            product, native = linearization.hvp, linearization.native_hvp()
        operator = FunctionOperator(product, layout.size, dtype=layout.dtype, device=layout.device, native=native)
        guess = self.guesses.get(key) if instruction.estimator.warm_start else None
        with torch.no_grad():
            solution = instruction.estimator.solve(operator, run.slots[instruction.rhs], guess)
        run.slots[instruction.out] = solution.value
        if keep_guesses:
            self.solutions[key] = solution
            if instruction.estimator.warm_start:
                self.guesses[key] = solution.value
        self._report(name, instruction, solution.outcome)

    def _report(self, name: str, instruction: Solve, outcome: Outcome) -> None:
        key = (name, instruction.out, outcome)
        if outcome < Outcome.DIVERGING or key in self._warned:
            return
        self._warned.add(key)
        warnings.warn(
            f"the solve at problem {instruction.problem!r} for the hypergradient of {name!r} by "
            f"{instruction.estimator!r}: {outcome.name.lower().replace('_', ' ')}: {outcome.advice} (said once)",
            SolverWarning,
            stacklevel=6,
        )

    def _mixed(self, instruction: MixedProduct, run: Pass) -> list[tuple[str, torch.Tensor]]:
        vector = run.slots[instruction.vector]
        if instruction.step is None:
            products = run.linearizations[instruction.problem].mixed(vector)
        else:
            products = self._central_difference(instruction.problem, vector, instruction.step)
        return [(slot, products[r]) for r, slot in instruction.targets]

    def _central_difference(self, name: str, vector: torch.Tensor, step: float) -> dict[str, torch.Tensor]:
        at, random_state = self.lower_point(name)
        random_state = random_state or get_random_state(self.layouts[name].device)
        derivatives = self._derive(name, at)
        with torch.no_grad():
            own = self.layouts[name].flatten([p.detach() for p in self.problems[name].trained_parameters().values()])
            norm = ops.norm(vector)
            # A zero vector has a zero product; the epsilon stays finite so that 0 / (2 eps) is 0.
            epsilon = step / torch.where(norm > 0, norm, torch.ones_like(norm))
            sides = []
            for sign in (1, -1):
                with frozen_random_state(random_state):  # common random numbers: the masks cancel
                    sides.append(derivatives.read_gradient(at, ops.perturb(own, vector, sign * epsilon)))
            plus, minus = sides
            return {r: (plus[r] - minus[r]) / (2 * epsilon) for r in plus}

    def _total_gradient(self, name: str, run: Pass) -> list[torch.Tensor | None]:
        assert run.result is not None
        indirect = run.slots.get(HYPERGRADIENT)
        if indirect is None:
            return list(run.result.own)
        gradients: list[torch.Tensor | None] = []
        layout, reached = self.layouts[name], self.plan[name].reached
        for parameter, direct, part in zip(layout.names, run.result.own, layout.split(indirect), strict=True):
            if direct is None:  # as in PyTorch, a parameter that no loss uses has no gradient, not a zero one
                gradients.append(part if parameter in reached else None)
            else:
                gradients.append(direct + part)
        return gradients

    def _update(self, name: str, gradients: list[torch.Tensor | None]) -> None:
        problem = self.problems[name]
        for parameter, gradient in zip(problem.trained_parameters().values(), gradients, strict=True):
            parameter.grad = gradient
        problem.optimizer.step()
        if problem.scheduler is not None:
            problem.scheduler.step()
