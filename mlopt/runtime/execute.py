"""Carries out the instructions of an `ExecutionPlan`. Every decision was made by the planner."""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mlopt import ops
from mlopt.autodiff import FlatLayout, scale_gradients
from mlopt.autodiff.update import OptimizerState, update_factor
from mlopt.capture.output import silenced
from mlopt.errors import SolverWarning
from mlopt.linalg import (
    AbstractLinearOperator,
    BlockOperator,
    DiagonalOperator,
    FunctionOperator,
    Outcome,
)
from mlopt.planner import ExecutionPlan, Gradient, Linearize, MixedProduct, ReverseSteps, Solve, Update
from mlopt.planner.instructions import HYPERGRADIENT
from mlopt.problem import Problem
from mlopt.runtime.data import Batch, BatchStream
from mlopt.runtime.derivatives import (
    AbstractDerivatives,
    AbstractLinearization,
    GradientResult,
    MeanLinearization,
    NoProducts,
    mean_of_each,
    mean_result,
)
from mlopt.runtime.derive import Derivation, Derive
from mlopt.runtime.due import Calendar
from mlopt.runtime.finite import StepCheck
from mlopt.runtime.history import History
from mlopt.runtime.lowered_update import CompiledUpdate
from mlopt.runtime.native_step import NativeSteps
from mlopt.runtime.rng import frozen_random_state, get_random_state, set_random_state
from mlopt.runtime.rollback import Snapshot, Unroll
from mlopt.runtime.schedule import mark_stepped, step_scheduler
from mlopt.runtime.shield import shield
from mlopt.runtime.state import ProblemState, Sample
from mlopt.runtime.step_pass import Made, Pass
from mlopt.runtime.steps import CompiledStep
from mlopt.runtime.unroll import Reversal


class Executor:
    """Runs instructions on the live state.

    Args:
        plan: What to run.
        problems: The problems by name.
        layouts: Their flat layouts.
        derive: Gives the derivatives of a problem that are valid for a batch.
        streams: Their batches.
        seen: For each problem, the others whose tensors its step depends on in any way (default: what its loss has
            derivatives for); their past values are needed to make a step again.
        quiet: Do not warn of solves that end badly.

    Attributes:
        calendar: Tells whose turn it is.
        derive: Gets the derivatives of problems.
        native: Steps of problems above others as programs.
        keep_gradients: See `Plan.keep_gradients`.
        seen: As given.
        histories: Of problems whose steps are differentiated, the last of these.
        unrolls: Of problems that roll the ones below them back, the steps below since their last one.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        problems: Mapping[str, Problem],
        layouts: Mapping[str, FlatLayout],
        derive: Derive,
        streams: Mapping[str, BatchStream],
        *,
        seen: Mapping[str, Sequence[str]] | None = None,
        quiet: bool = False,
    ) -> None:
        self.plan = plan
        self.problems = problems
        self.layouts = layouts
        self.states = {name: ProblemState(streams[name]) for name in problems}
        self.calendar = Calendar(plan, problems, self.states)
        self.guesses: dict[tuple[str, str], torch.Tensor] = {}  # (problem stepped, slot) -> previous q
        self.keep_gradients = False
        self.check = StepCheck(plan, problems)
        self.seen = {name: tuple((seen or {}).get(name, plan[name].reads)) for name in problems}
        self.derive = Derivation(derive)
        self._quiet = quiet
        self.native = NativeSteps(plan, layouts)
        self.unrolls: dict[str, Unroll] = {}
        self.histories = {
            i.problem: History(problems[i.problem], [problems[r] for r in self.seen[i.problem]], i.steps)
            for i in sorted(
                (i for p in plan.problems for i in p.instructions if isinstance(i, ReverseSteps)), key=lambda i: i.steps
            )
        }
        self._warned: set[tuple[str, str, Outcome]] = set()

    def derivatives(self, name: str, batch: Batch) -> AbstractDerivatives:
        """Return the derivatives of a problem that are valid for a batch."""
        self.derive.begin()
        return self.derive(name, batch)

    @property
    def lowest_are_independent(self) -> bool:
        """Whether a lowest problem may make several steps before another one makes its first.

        Not where one reads tensors of another, be it a buffer; nor where code of the user's runs around their steps.
        """
        lowest = self.calendar.lowest
        return len(lowest) == 1 or not any(
            self.problems[name].step_hooks() or set(lowest).intersection(self.seen[name]) for name in lowest
        )

    def next_batches(self, name: str, count: int) -> list[Batch]:
        """Fetch the next batches of a problem without using them up."""
        if not self.states[name].stream.is_still:
            self.derive.user_code_ran()  # it does, in the loader
        return self.states[name].stream.ahead(count)

    def compiled_step(self, name: str, derivatives: AbstractDerivatives) -> CompiledStep | None:
        """Return the compiled step if it is what the live optimizer would do now."""
        step = derivatives.step
        if step is None or self.keep_gradients or not step.is_used():
            return None
        self._set_hyperparameters(name)
        return step if step.accepts() else None

    def step(self, name: str) -> dict[str, Any]:
        """Make one optimizer step of a problem; return its loss and metrics."""
        try:
            return self._step(name)
        except Exception as error:
            self.say_where(name, error)
            raise

    def say_where(self, name: str, error: Exception) -> None:
        """Note in an error which step of which problem it happened in."""
        error.add_note(f"(in step {self.states[name].num_steps + 1} of problem {name!r})")

    def _step(self, name: str) -> dict[str, Any]:
        state = self.states[name]
        count = self.problems[name].gradient_accumulation
        draws = self.problems[name].draws_batches
        if draws:  # from an environment, say, that an inner loop begins by resetting
            self._start_inner_loop(name)
        batches = self.next_batches(name, count)
        if state.stream.take_restart() and self.problems[name].has_epoch_callback:
            self.problems[name].epoch_callback()
            self.derive.user_code_ran()
        if not draws:
            self._start_inner_loop(name)
        self._begin_unrolls(name)
        samples: Sequence[Sample] = [Sample(b) for b in batches]
        made = self._step_on(name, samples)
        self.account(name, count)
        if not made.left_out:
            for unroll in self._open_unrolls(name):
                unroll.steps.append((name, state.samples))
        unroll_below = self.unrolls.pop(name, None)
        interrupt = made.interrupt
        if unroll_below is not None and not made.left_out:
            unroll_below.restore()
            for lower, count in collections.Counter(n for n, _ in unroll_below.steps).items():
                if lower in self.histories:
                    self.histories[lower].rewind(count)
            for lower, samples in unroll_below.steps:
                interrupt = self._step_on(lower, samples).interrupt or interrupt
        if interrupt is not None:
            raise interrupt
        return made.results

    def account(self, name: str, num_batches: int, num_steps: int = 1) -> None:
        """Use up batches of a problem for steps that have been made, and count these."""
        state = self.states[name]
        state.stream.advance(num_batches)
        state.num_steps += num_steps
        state.steps_seen = {lower: self.states[lower].num_steps for lower in self.plan[name].lowers}

    def _step_on(self, name: str, samples: Sequence[Sample]) -> Made:
        """Make one optimizer step on given micro-batches, with their random numbers if they have been used."""
        if self.plan[name].is_whole:
            made = self._step_compiled(name, samples[0])
            if made is not None:
                return made
        elif (made := self._step_native(name, samples)) is not None:
            return made
        run = self._run(name, samples, keep_guesses=True)
        assert run.result is not None
        results = {"loss": run.result.loss, **run.result.metrics}
        if self._update_compiled(name, run):
            return Made(results)
        gradients = self.total_gradient(name, run)
        if not self.check.passes(name, run, gradients):
            self.guesses = {key: guess for key, guess in self.guesses.items() if key[0] != name}
            return Made(results, left_out=True)
        if name in self.histories:
            indirect = self.layouts[name].split(run.slots[HYPERGRADIENT]) if HYPERGRADIENT in run.slots else None
            extra = (
                None
                if indirect is None
                else [None if total is None else part for total, part in zip(gradients, indirect, strict=True)]
            )
            self.histories[name].record(run.samples, extra)
        shield.held = True
        self._keep_state(name, run)
        self._update(name, gradients)
        self._step_scheduler(name, run.result.loss)
        return Made(results)

    def _keep_state(self, name: str, run: Pass) -> None:
        assert run.result is not None
        self.states[name].samples = run.samples
        with torch.no_grad():
            for live, value in run.result.buffers:
                live.copy_(value)

    def _step_native(self, name: str, samples: Sequence[Sample]) -> Made | None:
        """Make one step by a native program; None if there is none, and nothing was changed."""
        lowers = [i.problem for i in self.plan[name].instructions if isinstance(i, Linearize)]
        if not lowers:
            return None
        given = {name: samples, **{lower: self.lower_samples(lower) for lower in lowers}}
        if any(len(each) != 1 or each[0].random_state is not None for each in given.values()):
            return None
        batches = {key: each[0].batch for key, each in given.items()}
        self.derive.begin()
        if self.total_update(name, self.derive(name, batches[name])) is None:
            return None
        made = self.native.step(name, batches, self.derive)
        if made is None:
            return None
        for instruction, solution in made.solutions:
            self.report(name, instruction, solution.outcome)
        self.states[name].samples = (Sample(batches[name]),)
        made.write()
        mark_stepped(self.problems[name].optimizer)
        self._step_scheduler(name, made.results["loss"])
        return Made(made.results)

    def total_update(self, name: str, derivatives: AbstractDerivatives | None) -> CompiledUpdate | None:
        """Return the compiled update, where there is one and nobody wants to see the gradient."""
        if self.keep_gradients or name in self.histories or self.check.looks_at(name):
            return None
        compiled = None if derivatives is None else derivatives.update
        if compiled is None or not compiled.is_used():
            return None
        self._set_hyperparameters(name)
        return compiled if compiled.accepts() else None

    def _update_compiled(self, name: str, run: Pass) -> bool:
        """Make the update by its compiled graph, where that can be."""
        indirect, compiled = run.slots.get(HYPERGRADIENT), self.total_update(name, run.derivatives)
        if indirect is None or compiled is None:
            return False
        assert run.result is not None
        shield.held = True
        self._keep_state(name, run)
        try:
            compiled.run(run.result.own, indirect)
        except RuntimeError as error:
            compiled.give_up(str(error))
            self._update(name, self.total_gradient(name, run))
        else:
            mark_stepped(self.problems[name].optimizer)
        self._step_scheduler(name, run.result.loss)
        return True

    def _step_compiled(self, name: str, sample: Sample) -> Made | None:
        """Make one step by its compiled graph; None if there is none, or if it failed and nothing was changed."""
        derivatives = self.derivatives(name, sample.batch)
        compiled = self.compiled_step(name, derivatives)
        if compiled is None:
            return None
        with frozen_random_state(sample.random_state):
            before = get_random_state(self.layouts[name].device) if derivatives.is_random else None
            samples = (Sample(sample.batch, before),)
            if name in self.histories:
                self.histories[name].record(samples, None)
            guard = self.check.guard
            outcome = compiled.run([sample.batch], [compiled.settings()], finite_only=guard is not None)
            if outcome.num_steps == 0 and before is not None:
                set_random_state(before)
        if outcome.num_steps == 0:
            if name in self.histories:
                self.histories[name].rewind(1)
            if outcome.error is None:
                return None  # not finite: the step by itself will tell where it begins
            if not isinstance(outcome.error, Exception):
                raise outcome.error
            compiled.give_up(str(outcome.error))
            return None
        if guard is not None:
            guard.accept(name)
        self.states[name].samples = samples
        assert outcome.outputs is not None
        mark_stepped(self.problems[name].optimizer)
        self._step_scheduler(name, outcome.outputs[0])
        return Made(compiled.metrics(outcome.outputs), outcome.error)

    def _step_scheduler(self, name: str, loss: torch.Tensor) -> None:
        step_scheduler(self.problems[name], loss)
        if self.problems[name].scheduler is not None:
            self.derive.user_code_ran()

    def snapshot(self) -> Callable[[], None]:
        """Copy what steps change; return a function that puts it back. Counters and batches go on."""
        copies = [Snapshot(problem) for problem in self.problems.values()]
        guesses = dict(self.guesses)
        ends = {name: history.end for name, history in self.histories.items()}

        def restore() -> None:
            for copy in copies:
                copy.restore()
            self.guesses = dict(guesses)
            self.unrolls.clear()
            for name, history in self.histories.items():
                history.rewind(history.end - ends[name])

        return restore

    def _start_inner_loop(self, name: str) -> None:
        """Run the user's hook if a problem is about to make the first step of an unroll."""
        problem = self.problems[name]
        since_warmup = self.states[name].num_steps - problem.warmup_steps
        starts = since_warmup >= 0 and since_warmup % problem.unroll_steps == 0
        if since_warmup == 0 and problem.warmup_steps:
            starts = False  # the warm-up steps have begun this unroll
        if self.states[name].num_steps != 0 and not starts:
            return
        if problem.has_inner_loop_hook:
            problem.on_inner_loop_start()
            self.derive.user_code_ran()
            if name in self.histories:
                self.histories[name].begin()

    def _begin_unrolls(self, name: str) -> None:
        """Copy the state below a problem that rolls back, if `name` is about to make the first step of an unroll."""
        for upper in self.plan.problems:
            if name in upper.rolled_back and upper.name not in self.unrolls:
                below = {lower: self.problems[lower] for lower in upper.rolled_back}
                if all(self.states[lower].num_steps >= problem.warmup_steps for lower, problem in below.items()):
                    self.unrolls[upper.name] = Unroll([Snapshot(problem) for problem in below.values()])

    def _open_unrolls(self, name: str) -> list[Unroll]:
        return [self.unrolls[p.name] for p in self.plan.problems if name in p.rolled_back and p.name in self.unrolls]

    def evaluate(self, name: str, batches: Sequence[Batch] | None = None) -> Pass:
        """Run a problem's instructions at the present state, its update excepted; nothing is changed."""
        if batches is None:
            batches = self.next_batches(name, self.problems[name].gradient_accumulation)
        with silenced(), frozen_random_state(get_random_state(self.layouts[name].device)):
            return self._run(name, [Sample(b) for b in batches], keep_guesses=False)

    def hypergradient(self, name: str, batches: Sequence[Batch] | None) -> list[torch.Tensor | None]:
        """Return the total gradient of a problem at the present state; nothing is changed."""
        while True:
            run = self.evaluate(name, batches)
            gradients = self.total_gradient(name, run)
            if not self.check.overflows(name, run, gradients):
                return gradients

    def lower_samples(self, name: str) -> tuple[Sample, ...]:
        """Return what a lower problem is differentiated on: the micro-batches of its last step.

        If it has made none, those it will take next.
        """
        count = self.problems[name].gradient_accumulation
        return self.states[name].samples or tuple(Sample(b) for b in self.next_batches(name, count))

    def latest_batch(self, name: str) -> Batch:
        """Return a batch of a problem's last step, or the one that was fetched for its first."""
        samples = self.states[name].samples
        return samples[0].batch if samples else self.states[name].stream.peek()

    def _run(self, name: str, samples: Sequence[Sample], *, keep_guesses: bool) -> Pass:
        run = Pass()
        self.derive.begin()
        for instruction in self.plan[name].instructions:
            if isinstance(instruction, Gradient):
                run.result, run.samples, run.derivatives = self._gradient(name, samples, {})
                for read, slot in instruction.cotangents:
                    run.add(slot, run.result.cotangents[read])
            elif isinstance(instruction, Linearize):
                run.linearizations[instruction.problem] = self.linearize(instruction.problem)
            elif isinstance(instruction, Solve):
                self._solve(name, instruction, run, keep_guesses=keep_guesses)
            elif isinstance(instruction, MixedProduct):
                products = self.mixed_products(instruction, run)
                for read, slot in instruction.targets:
                    run.add(slot, -products[read])
            elif isinstance(instruction, ReverseSteps):
                for read, value in self.reverse_steps(instruction, run).items():
                    run.add(dict(instruction.targets)[read], value)
            else:
                assert isinstance(instruction, Update)  # by the caller, once nothing can fail any more
        return run

    def gradient_at(self, name: str, samples: Sequence[Sample], values: Mapping[int, torch.Tensor]) -> GradientResult:
        """Evaluate a problem's loss again, where live tensors (by ``id``) have other values; nothing is changed."""
        with silenced(), frozen_random_state(get_random_state(self.layouts[name].device)):
            return self._gradient(name, samples, values)[0]

    def _gradient(
        self, name: str, given: Sequence[Sample], values: Mapping[int, torch.Tensor]
    ) -> tuple[GradientResult, tuple[Sample, ...], AbstractDerivatives]:
        """Evaluate the mean loss of the micro-batches; each sees the buffers that the one before left."""
        device = self.layouts[name].device
        results, samples = [], []
        moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for sample in given:
            derivatives = self.derive(name, sample.batch)
            if not (derivatives.is_random or values or moved):
                samples.append(Sample(sample.batch))
                results.append(derivatives.gradient(sample.batch))
            else:
                with frozen_random_state(sample.random_state):
                    before = get_random_state(device) if derivatives.is_random else None
                    samples.append(Sample(sample.batch, before))
                    with derivatives.at({**values, **{key: value for key, (_, value) in moved.items()}}):
                        results.append(derivatives.gradient(sample.batch))
            moved.update({id(live): (live, value) for live, value in results[-1].buffers})
        return mean_result(results, list(moved.values())), tuple(samples), derivatives

    def linearize(self, name: str) -> AbstractLinearization:
        """Return the second-order products of a lower problem at the present state."""
        parts = []
        for sample in self.lower_samples(name):
            with frozen_random_state(sample.random_state):
                parts.append(self.derive(name, sample.batch).linearize(sample.batch))
        return parts[0] if len(parts) == 1 else MeanLinearization(parts)

    @contextlib.contextmanager
    def linearize_at(
        self, name: str, samples: Sequence[Sample], values: Mapping[int, torch.Tensor]
    ) -> Iterator[AbstractLinearization]:
        """Give the second-order products where live tensors (by ``id``) have other values; to be used inside."""
        with contextlib.ExitStack() as stack:
            parts = []
            for sample in samples:
                derivatives = self.derive(name, sample.batch)
                stack.enter_context(derivatives.at(values))
                with frozen_random_state(sample.random_state):
                    parts.append(derivatives.linearize(sample.batch))
            yield parts[0] if len(parts) == 1 else MeanLinearization(parts)

    def reverse_steps(self, instruction: ReverseSteps, run: Pass) -> dict[str, torch.Tensor]:
        """Send a cotangent back through the recorded steps of a problem."""
        name = instruction.problem
        problem = self.problems[name]

        def scale(gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
            return scale_gradients(gradients, problem.clip_norm, normalize=problem.normalize_gradient)

        reversal = Reversal(problem, self.problems, self.layouts, self.histories[name], self, scale)
        return reversal.run(run.slots[instruction.rhs], [r for r, _ in instruction.targets], instruction.steps)

    def update_factor(self, name: str) -> torch.Tensor:
        """Return ``-d theta' / d gradient`` of the step that a problem's optimizer would make now, as a vector."""
        problem = self.problems[name]
        parameters = list(problem.trained_parameters().values())
        own = self.gradient_at(name, self.lower_samples(name), {}).own
        gradients = scale_gradients(own, problem.clip_norm, normalize=problem.normalize_gradient)
        state = OptimizerState.of(problem.optimizer, parameters)
        return self.layouts[name].flatten(update_factor(problem.optimizer, parameters, gradients, state, problem=name))

    def operator(self, name: str, linearization: AbstractLinearization) -> AbstractLinearOperator:
        """Return a problem's Hessian as an operator."""
        layout = self.layouts[name]
        dtype, device, product = layout.dtype, layout.device, linearization.hvp
        native = linearization.native_hvp()
        if layout.tasks is None:
            return FunctionOperator(
                product, layout.size, rows=linearization.hvps, dtype=dtype, device=device, native=native
            )
        return BlockOperator(product, layout.size, layout.tasks, dtype=dtype, device=device, native=native)

    def _solve(self, name: str, instruction: Solve, run: Pass, *, keep_guesses: bool) -> None:
        key = (name, instruction.out)
        estimator = instruction.estimator
        if not type(estimator).__module__.startswith("mlopt."):
            self.derive.user_code_ran()
        operator: AbstractLinearOperator
        if estimator.uses_update:
            operator = DiagonalOperator(self.update_factor(instruction.problem))
        elif estimator.uses_hvp:
            operator = self.operator(instruction.problem, run.linearizations[instruction.problem])
        else:
            operator = self.operator(instruction.problem, NoProducts(estimator))
        guess = self.guesses.get(key) if estimator.warm_start else None
        with torch.no_grad():
            solution = estimator.solve(operator, run.slots[instruction.rhs], guess)
        run.slots[instruction.out] = solution.value
        run.solutions[instruction.out] = solution
        if keep_guesses and estimator.warm_start:
            self.guesses[key] = solution.value
        self.report(name, instruction, solution.outcome)

    def report(self, name: str, instruction: Solve, outcome: Outcome) -> None:
        """Warn, once, of a solve for the step of a problem that ended badly."""
        key = (name, instruction.out, outcome)
        if outcome is Outcome.NON_FINITE and self.problems[instruction.problem].loss_scale is not None:
            return  # the loss scale is finding its value
        if self._quiet or outcome < Outcome.DIVERGING or key in self._warned:
            return
        self._warned.add(key)
        warnings.warn(
            f"the solve at problem {instruction.problem!r} for the hypergradient of {name!r} by "
            f"{instruction.estimator!r}: {outcome.name.lower().replace('_', ' ')}: {outcome.advice} (said once)",
            SolverWarning,
            stacklevel=6,
        )

    def mixed_products(self, instruction: MixedProduct, run: Pass) -> dict[str, torch.Tensor]:
        """Return the products of an instruction, by the problem they belong to."""
        vector = run.slots[instruction.vector]
        if instruction.step is None:
            return run.linearizations[instruction.problem].mixed(vector)
        return self._central_difference(instruction.problem, vector, instruction.step)

    def own_gradient(self, name: str) -> torch.Tensor:
        """Return the gradient of a lower problem's own loss where it is differentiated, as a vector."""
        return self.layouts[name].flatten(self.gradient_at(name, self.lower_samples(name), {}).own)

    def _central_difference(self, name: str, vector: torch.Tensor, step: float) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            own = self.layouts[name].flatten([p.detach() for p in self.problems[name].trained_parameters().values()])
            norm = ops.norm(vector.reshape(-1))  # with tasks, of all of them: their products are summed
            # A zero vector has a zero product; the epsilon stays finite so that 0 / (2 eps) is 0.
            epsilon = step / torch.where(norm > 0, norm, torch.ones_like(norm))
            plus, minus = (
                self._read_gradient(name, ops.perturb(own.view(-1), vector.view(-1), sign * epsilon).view_as(own))
                for sign in (1, -1)
            )
            return {r: (plus[r] - minus[r]) / (2 * epsilon) for r in plus}

    def _read_gradient(self, name: str, own: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return dg/dr at other own parameters; both sides of a difference draw the same random numbers."""
        parts = []
        for sample in self.lower_samples(name):
            with frozen_random_state(sample.random_state or get_random_state(self.layouts[name].device)):
                parts.append(self.derive(name, sample.batch).read_gradient(sample.batch, own))
        return mean_of_each(parts)

    def total_gradient(self, name: str, run: Pass) -> list[torch.Tensor | None]:
        """Return direct plus indirect gradient of a run, one entry per trained parameter."""
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
        self.derive.user_code_ran()  # it will have: callbacks, and an optimizer that may be anybody's
        parameters = list(problem.trained_parameters().values())
        if "grad_callback" in problem.step_hooks():
            _set_gradients(parameters, gradients)
            problem.grad_callback()
            gradients = [p.grad for p in parameters]
        _set_gradients(parameters, scale_gradients(gradients, problem.clip_norm, normalize=problem.normalize_gradient))
        self._set_hyperparameters(name)
        problem.optimizer_step()
        problem.param_callback()

    def _set_hyperparameters(self, name: str) -> None:
        """Write learned settings into the optimizer's groups."""
        problem = self.problems[name]
        if type(problem).optimizer_hyperparameters is Problem.optimizer_hyperparameters:
            return
        self.derive.user_code_ran()
        with torch.no_grad():
            for given, group in zip(problem.hyperparameters_by_group(), problem.optimizer.param_groups, strict=True):
                for key, value in given.items():
                    if isinstance(group[key], torch.Tensor):
                        group[key].copy_(value)
                    else:
                        group[key] = float(value)


def _set_gradients(parameters: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
