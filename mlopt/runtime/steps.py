"""`CompiledStep`: a problem's optimizer step as one lowered graph, in place of its gradient and ``optimizer.step()``.

New values are written when all steps of a run are made, in one call into torch, so that an error or Ctrl-C never leaves
half of a step behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mlopt.autodiff import RepeatedSteps, StepGraph, is_random
from mlopt.backends import Changing, Compiled, Descent, Leap, StepsLoop, StepsOutcome
from mlopt.capture import InputRole, LossGraph, UpdateGraph, UpdateRole
from mlopt.runtime.data import Batch, distinct
from mlopt.runtime.finite import all_finite
from mlopt.runtime.lowered_update import LoweredUpdate
from mlopt.runtime.programs import Programs, ReadyStep, Wanted
from mlopt.runtime.step_program import StepProgram

_CHECKED = 4  # steps that are compared


class CompiledStep(LoweredUpdate):
    """Makes steps of one problem by a lowered `StepGraph`.

    Args:
        graph: The step.
        loss: The loss that it was made from.
        call: The lowered graph.
        several: A graph of several of these steps, and what it was lowered to.
        descent: What makes many of them by a kernel.

    Attributes:
        graph: As given.
        several: As given.
        descent: As given.
    """

    def __init__(
        self,
        graph: StepGraph,
        loss: LossGraph,
        call: Compiled,
        several: tuple[RepeatedSteps, Compiled] | None = None,
        descent: Descent | None = None,
    ) -> None:
        super().__init__(graph.update, call)
        self.graph = graph
        self.several = several
        self.descent = descent
        self._loss = loss
        numbers = [i for i, x in enumerate(graph.settings) if x.role is UpdateRole.HYPERPARAMETER]
        # A number that the step itself changes is fed back; the others may be changed by a scheduler.
        self._scheduled = [i for i in numbers if graph.settings[i] not in graph.update.outputs]
        changing = Changing(
            graph.feedback,
            tuple(loss.positions(InputRole.BATCH)),
            tuple(graph.num_loss_inputs + i for i in self._scheduled),
        )
        leap = None
        if several is not None and several[1].lowering.backend != "eager":
            repeated, several_call = several
            leap = Leap(several_call, dataclasses.replace(changing, feedback=repeated.feedback), repeated.times)
        draws = is_random(graph.module)
        keeping = dataclasses.replace(changing, num_kept=1 + graph.num_metrics)
        self._loop = StepsLoop(call, changing, leap, descent=descent, is_random=draws)
        self._keeping_loop = StepsLoop(call, keeping, is_random=draws)
        self._read = [None if i in self._scheduled else x for i, x in enumerate(graph.settings)]
        self._unset = torch.zeros((), dtype=torch.float64)
        self._constant: tuple[tuple[float, ...], torch.Tensor] | None = None
        self._is_random = draws
        self._programs: Programs[StepProgram] = Programs()

    @property
    def can_repeat(self) -> bool:
        """Whether several steps can follow each other unseen: what the optimizer's code branches on stays the same."""
        return not self._update.guard_reads(UpdateRole.STATE)

    @property
    def changes_settings(self) -> bool:
        """Whether a step changes numbers of the parameter groups."""
        return any(x.role is UpdateRole.HYPERPARAMETER for x in self._update.outputs)

    def settings(self) -> list[float]:
        """Return the present values of the numbers that a scheduler may change."""
        return [self._update.number(self.graph.settings[i]) for i in self._scheduled]

    def compute(self, batch: Batch, update: UpdateGraph) -> Sequence[Any]:
        """Run the graph once and write nothing.

        Args:
            batch: The batch.
            update: The update with the optimizer whose state and settings are taken, and its parameters.
        """
        return self.call(*self._arguments(batch, update))

    def compute_several(
        self, batch: Batch, update: UpdateGraph
    ) -> Iterator[tuple[str, int, Sequence[Any], Sequence[Any]]]:
        """Make several steps at once, in every way there is, and one by one; write nothing.

        Args:
            batch: As in `compute`.
            update: As in `compute`.

        Yields:
            What made the steps, how many, what it feeds back, and what single steps do.
        """
        arguments: list[Any] = self._arguments(batch, update)
        if self.several is not None:
            repeated, call = self.several
            yield "one graph", repeated.times, call(*arguments), self._one_by_one(arguments, repeated.times)
        if self.descent is not None:
            outcome = self.descent.make(arguments, self.graph.feedback, _CHECKED)
            if outcome is not None and outcome.error is not None:
                raise outcome.error
            if outcome is not None:
                yield "a kernel", _CHECKED, outcome.fed, self._one_by_one(arguments, _CHECKED)

    def _one_by_one(self, arguments: Sequence[Any], times: int) -> list[Any]:
        present = list(arguments)
        for _ in range(times):
            results = self.call(*present)
            for output, position in self.graph.feedback:
                present[position] = results[output]
        return [present[position] for _, position in self.graph.feedback]

    def run(
        self,
        batches: Sequence[Batch],
        schedule: Sequence[Sequence[float]],
        *,
        finite_only: bool = False,
        keep_results: bool = False,
    ) -> StepsOutcome:
        """Make one step per batch and write the new values into the live tensors.

        Args:
            batches: All of the sizes of the first.
            schedule: `settings` of each step.
            finite_only: Write nothing, and report no step, if a new value or the last loss is not finite. (A parameter
                that is not finite stays so, whatever the later steps do.)
            keep_results: Keep loss and metrics of every step, not of the last alone: see `kept_metrics`.
        """
        kinds, order = distinct(batches)
        if not (finite_only or keep_results or self._is_random) and len(kinds) == 1:
            outcome = self._run_program(kinds[0], schedule)
            if outcome is not None:
                return outcome
        numbers = self._rows(schedule)
        # The scheduled numbers come from the rows.
        settings = [self._live(x) if x else self._unset for x in self._read]
        arguments = [*self._loss.bind(batches[0].tensors), *settings]
        loop = self._keeping_loop if keep_results else self._loop
        outcome = loop.run(arguments, [batch.tensors for batch in kinds], order, numbers)
        if finite_only and outcome.outputs is not None and not all_finite([outcome.outputs[0], *outcome.fed]):
            return StepsOutcome(0, [], None, (), None)
        if outcome.num_steps:
            self._write(outcome.fed)
        return outcome

    def _run_program(self, batch: Batch, schedule: Sequence[Sequence[float]]) -> StepsOutcome | None:
        """Make the steps by a native program; None if they are to be made in the usual way, and nothing was written."""
        if schedule.count(schedule[0]) != len(schedule):
            return None
        asked = self._program(batch, schedule[0], len(schedule))
        program = None if asked is None else self._programs.get(asked[0])
        if asked is None or program is None:
            return None
        wanted, arguments = asked
        try:
            outputs = program.run(arguments)
        except RuntimeError as error:
            self._programs.give_up(wanted, error)
            return None
        except BaseException as error:  # Ctrl-C
            return StepsOutcome(0, [], None, (), error)
        self.written()
        return StepsOutcome(len(schedule), [], outputs, (), None)

    def ready(self, batch: Batch, count: int) -> ReadyStep | None:
        """Return what makes steps by a native program, if there is one.

        Args:
            batch: The batch of all of them.
            count: How many.
        """
        asked = None if self._is_random else self._program(batch, self.settings(), count)
        program = None if asked is None else self._programs.ready(asked[0])
        if asked is None or program is None:
            return None
        wanted, arguments = asked
        return ReadyStep(
            program.call(arguments),
            self.unchanged(),
            self.metrics,
            lambda values: [],
            self.written,
            lambda error: self._programs.give_up(wanted, error),
        )

    def _program(
        self, batch: Batch, row: Sequence[float], count: int
    ) -> tuple[Wanted[StepProgram], list[torch.Tensor]] | None:
        """Return the program of some steps, and what it is given; None if they cannot be one, or not yet."""
        arguments = [*self._loss.bind(batch.tensors), *self.settings_now(self.graph.settings)]
        for position, value in zip(self._scheduled, row, strict=True):
            known = self._numbers.get(id(self.graph.settings[position]))
            if known is None or known[0] != value:  # it is that of a later step
                return None
        descent = None
        if count > 1:
            native = None if self.descent is None else self.descent.native(count - 1, arguments[0].device)
            if native is None:
                return None  # it may become known that a kernel is faster
            descent = (native, count - 1)
        targets = [*self.targets(), *(self._loss.live(i) for i in self.graph.written_buffers)]
        num_results = 1 + self.graph.num_metrics
        wanted = Wanted[StepProgram](
            self._loss.problem,
            (count, *(t.shape for t in batch.tensors)),
            lambda known: known.writes_into(targets),
            lambda: StepProgram(self.call, self.graph.feedback, targets, num_results, arguments, descent),
        )
        return wanted, arguments

    def metrics(self, outputs: Sequence[Any]) -> dict[str, Any]:
        """Return loss and metrics of a step, as the user named them."""
        return {"loss": outputs[0], **self._loss.named_metrics(outputs[1 : 1 + self.graph.num_metrics])}

    def kept_metrics(self, outcome: StepsOutcome) -> dict[str, Any]:
        """Return loss and metrics of the steps of a run that kept them: [steps] if they are tensors, constants once."""
        return {"loss": outcome.kept[0], **self._loss.metrics_of_steps(outcome.kept[1:])}

    def _arguments(self, batch: Batch, update: UpdateGraph) -> list[torch.Tensor]:
        live = self._update.parameters
        values = {id(live[name]): value for name, value in update.parameters.items() if value is not live[name]}
        return [*self._loss.bind(batch.tensors, values), *(update.live(x) for x in self.graph.settings)]

    def _write(self, fed: Sequence[torch.Tensor]) -> None:
        count = len(self._update.outputs)
        buffers = [self._loss.live(i) for i in self.graph.written_buffers]
        self._commit(fed[:count], also=list(zip(buffers, fed[count:], strict=True)))

    def _rows(self, schedule: Sequence[Sequence[float]]) -> torch.Tensor:
        """Return rows of numbers as a tensor, of stride 0 where all are equal; as they often are, and were before."""
        count, first, width = len(schedule), schedule[0], len(self._scheduled)
        if schedule.count(first) != count:
            return torch.tensor(schedule, dtype=torch.float64).reshape(count, width)
        key = (count, *first)
        if self._constant is None or self._constant[0] != key:
            self._constant = key, torch.tensor([first], dtype=torch.float64).expand(count, width)
        return self._constant[1]
