"""`CompiledStep`: a problem's optimizer step as one lowered graph, in place of its gradient and ``optimizer.step()``.

The user's objects stay the truth: every run reads the live parameters, buffers, optimizer state and group settings, and
writes the new values back into the same tensors. They are written when all steps of a run are made, in one call into
torch, so that an error or Ctrl-C never leaves half of a step behind.

What differs from ``optimizer.step()``: gradients are never made as tensors of their own, so ``.grad`` of the trained
parameters is None afterwards (a gradient of some earlier step would be worse). `Plan.keep_gradients` asks for the
other way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from mlopt.autodiff import StepGraph
from mlopt.backends import Changing, Compiled, StepsOutcome, run_steps
from mlopt.capture import InputRole, LossGraph, UpdateGraph, UpdateRole
from mlopt.runtime.data import Batch
from mlopt.runtime.finite import all_finite

logger = logging.getLogger(__name__)


class CompiledStep:
    """Makes steps of one problem by a lowered `StepGraph`.

    Args:
        graph: The step.
        loss: The loss that it was made from.
        call: The lowered graph.

    Attributes:
        given_up: Why it is not used any more, or "".
    """

    def __init__(self, graph: StepGraph, loss: LossGraph, call: Compiled) -> None:
        self.graph = graph
        self.call = call
        self.given_up = ""
        self._loss = loss
        self._update = graph.update
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
        self._checked: object = None

    def is_used(self) -> bool:
        """Whether it is machine code; a graph that runs by torch calls gains nothing over ``optimizer.step()``."""
        return not self.given_up and self.call.lowering.backend != "eager"

    @property
    def can_repeat(self) -> bool:
        """Whether several steps can follow each other unseen: what the optimizer's code branches on stays the same."""
        return not self._update.guard_reads(UpdateRole.STATE)

    @property
    def changes_settings(self) -> bool:
        """Whether a step changes numbers of the parameter groups."""
        return any(x.role is UpdateRole.HYPERPARAMETER for x in self._update.outputs)

    def accepts(self) -> bool:
        """Whether it is the step that the live optimizer would make now; cheap where nothing was changed."""
        key = self._update.fingerprint()
        if key is not None and key == self._checked:
            return True
        accepted = self._update.is_free() and self._update.accepts()
        self._checked = key if accepted else None
        return accepted

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

    def run(
        self, batches: Sequence[Batch], schedule: Sequence[Sequence[float]], *, finite_only: bool = False
    ) -> StepsOutcome:
        """Make one step per batch and write the new values into the live tensors.

        Args:
            batches: All of the sizes of the first.
            schedule: `settings` of each step.
            finite_only: Write nothing, and report no step, if a new value or the last loss is not finite. (A parameter
                that is not finite stays so, whatever the later steps do.)
        """
        distinct: dict[int, int] = {}
        order = [distinct.setdefault(id(batch), len(distinct)) for batch in batches]
        by_id = {id(batch): batch for batch in batches}
        numbers = torch.tensor(schedule, dtype=torch.float64).reshape(len(batches), len(self._scheduled))
        outcome = run_steps(
            self.call,
            # The scheduled numbers come from the rows.
            [*self._loss.bind(batches[0].tensors), *(self._update.live(x) if x else self._unset for x in self._read)],
            self._changing,
            [by_id[key].tensors for key in distinct],
            order,
            numbers,
        )
        if finite_only and outcome.outputs is not None and not all_finite([outcome.outputs[0], *outcome.fed]):
            return StepsOutcome(0, [], None, None)
        if outcome.num_steps:
            self._write(outcome.fed)
        return outcome

    def metrics(self, outputs: Sequence[Any]) -> dict[str, Any]:
        """Return loss and metrics of a step, as the user named them."""
        return {"loss": outputs[0], **self._loss.named_metrics(outputs[1 : 1 + self.graph.num_metrics])}

    def give_up(self, reason: str) -> None:
        """Use it no more."""
        logger.warning("a compiled step of problem %r is not used any more: %s", self._loss.problem, reason)
        self.given_up = reason

    def _arguments(self, batch: Batch, update: UpdateGraph) -> list[torch.Tensor]:
        live = self._update.parameters
        values = {id(live[name]): value for name, value in update.parameters.items() if value is not live[name]}
        return [*self._loss.bind(batch.tensors, values), *(update.live(x) for x in self.graph.settings)]

    def _write(self, fed: Sequence[torch.Tensor]) -> None:
        outputs = self._update.outputs
        buffers = [self._loss.live(i) for i in self.graph.written_buffers]
        self._update.commit(fed[: len(outputs)], also=list(zip(buffers, fed[len(outputs) :], strict=True)))
        for parameter in self._update.parameters.values():
            parameter.grad = None
