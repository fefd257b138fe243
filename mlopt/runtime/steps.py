"""`CompiledStep`: a problem's optimizer step as one lowered graph, in place of its gradient and ``optimizer.step()``.

New values are written when all steps of a run are made, in one call into torch, so that an error or Ctrl-C never leaves
half of a step behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mlopt.autodiff import RepeatedSteps, StepGraph
from mlopt.backends import Changing, Compiled, StepsOutcome, run_steps
from mlopt.capture import InputRole, LossGraph, UpdateGraph, UpdateRole
from mlopt.runtime.data import Batch
from mlopt.runtime.finite import all_finite
from mlopt.runtime.lowered_update import LoweredUpdate


class CompiledStep(LoweredUpdate):
    """Makes steps of one problem by a lowered `StepGraph`.

    Args:
        graph: The step.
        loss: The loss that it was made from.
        call: The lowered graph.
        several: A graph of several of these steps, and what it was lowered to.
    """

    def __init__(
        self,
        graph: StepGraph,
        loss: LossGraph,
        call: Compiled,
        several: tuple[RepeatedSteps, Compiled] | None = None,
    ) -> None:
        super().__init__(graph.update, call)
        self.graph = graph
        self.several = several
        self._loss = loss
        numbers = [i for i, x in enumerate(graph.settings) if x.role is UpdateRole.HYPERPARAMETER]
        # A number that the step itself changes is fed back; the others may be changed by a scheduler.
        self._scheduled = [i for i in numbers if graph.settings[i] not in graph.update.outputs]
        self._changing = Changing(
            graph.feedback,
            tuple(loss.positions(InputRole.BATCH)),
            tuple(graph.num_loss_inputs + i for i in self._scheduled),
        )
        self._read = [None if i in self._scheduled else x for i, x in enumerate(graph.settings)]
        self._unset = torch.zeros((), dtype=torch.float64)

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

    def compute_several(self, batch: Batch, update: UpdateGraph) -> tuple[Sequence[Any], Sequence[Any]]:
        """Make the steps of the graph of several of them, by it and one by one; write nothing.

        Args:
            batch: As in `compute`.
            update: As in `compute`.

        Returns:
            What both feed back.
        """
        assert self.several is not None
        repeated, call = self.several
        arguments: list[Any] = self._arguments(batch, update)
        together = call(*arguments)
        for _ in range(repeated.times):
            results = self.call(*arguments)
            for output, position in self.graph.feedback:
                arguments[position] = results[output]
        return together, [arguments[position] for _, position in repeated.feedback]

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
        position = {key: k for k, key in enumerate(dict.fromkeys(map(id, batches)))}
        order = [position[id(batch)] for batch in batches] if len(position) > 1 else [0] * len(batches)
        by_id = {id(batch): batch for batch in batches} if len(position) > 1 else {id(batches[0]): batches[0]}
        numbers = _rows(schedule, len(self._scheduled))
        # The scheduled numbers come from the rows.
        settings = [self._update.live(x) if x else self._unset for x in self._read]
        arguments = [*self._loss.bind(batches[0].tensors), *settings]
        tensors = [by_id[key].tensors for key in position]
        made, first = (0, None) if keep_results else self._run_several(arguments, tensors, order, numbers)
        if first is not None and first.error is not None:
            outcome = first
        else:
            changing = self._changing
            if keep_results:
                changing = dataclasses.replace(changing, num_kept=1 + self.graph.num_metrics)
            outcome = run_steps(self.call, arguments, changing, tensors, order[made:], numbers[made:])
        outcome = dataclasses.replace(outcome, num_steps=outcome.num_steps + made)
        if finite_only and outcome.outputs is not None and not all_finite([outcome.outputs[0], *outcome.fed]):
            return StepsOutcome(0, [], None, (), None)
        if outcome.num_steps:
            self._write(outcome.fed)
        return outcome

    def _run_several(
        self, arguments: list[torch.Tensor], batches: Sequence[Sequence[torch.Tensor]], order: list[int], numbers: Any
    ) -> tuple[int, StepsOutcome | None]:
        """Make all steps but the last, or as many as come out even, by the graph of several, where there is one.

        Args:
            arguments: Of the first step; replaced by those of the next one to make.
            batches: The distinct batches.
            order: Which each step takes.
            numbers: See `run`.

        Returns:
            How many were made, and what came of them, outputs excepted.
        """
        if self.several is None or self.several[1].lowering.backend == "eager" or len(batches) > 1:
            return 0, None
        repeated, call = self.several
        count = (len(order) - 1) // repeated.times
        if count == 0 or not torch.equal(numbers, numbers[:1].expand_as(numbers)):
            return 0, None
        changing = dataclasses.replace(self._changing, feedback=repeated.feedback)
        outcome = run_steps(call, arguments, changing, batches, [0] * count, numbers[:count])
        for (_, position), value in zip(repeated.feedback, outcome.fed, strict=True):
            arguments[position] = value
        made = outcome.num_steps * repeated.times
        return made, StepsOutcome(0, outcome.fed, None, (), outcome.error)

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


def _rows(schedule: Sequence[Sequence[float]], width: int) -> torch.Tensor:
    """Return rows of numbers as a tensor; often all of them are the same list."""
    count = len(schedule)
    if all(row is schedule[0] for row in schedule):
        schedule = [[*schedule[0]] * count]
    return torch.tensor(schedule, dtype=torch.float64).reshape(count, width)
