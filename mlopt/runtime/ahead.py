"""Lets a lowest problem run ahead: many of its steps as one native loop, while no other problem is due."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from mlopt.runtime.data import distinct
from mlopt.runtime.execute import Executor
from mlopt.runtime.schedule import ScheduleAhead
from mlopt.runtime.shield import shield
from mlopt.runtime.state import Sample

StepResult = dict[str, dict[str, Any]]
OnResults = Callable[[StepResult, int], None]

# How many batches wait in memory for a native loop: those of a list are there anyway.
_MOST_STILL, _MOST_FETCHED = 10_000, 64


class AheadRunner:
    """Makes steps of lowest problems several at a time; what they do is what as many single steps do.

    Args:
        executor: Holds the state, and makes single steps.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def steps_until_due(self, limit: int) -> int:
        """Return how many global steps may be made by letting every lowest problem make so many steps on its own.

        After fewer steps no other problem would be due. It is 1 where that would change a result: random numbers are
        drawn by torch's one generator, so only one of all data and losses concerned may draw; and where lowest problems
        depend on each other. It is 1 with a guard, too, which looks at every single step.

        Args:
            limit: The most that are wanted, at least 1.
        """
        plan = self._executor.plan
        calendar = self._executor.calendar
        alone = self._executor.keep_gradients or self._executor.check.guard is not None
        if limit == 1 or alone or not any(plan[name].runs_ahead for name in calendar.lowest):
            return 1
        if not self._executor.lowest_are_independent:
            return 1
        streams = {name: self._executor.states[name].stream for name in calendar.lowest}
        if not all(stream.may_run_ahead for stream in streams.values()):
            return 1
        compiled, num_drawing = False, sum(not stream.is_still for stream in streams.values())
        for name in streams:
            derivatives = self._executor.derivatives(name, self._executor.next_batches(name, 1)[0])
            num_drawing += derivatives.is_random
            compiled |= derivatives.step is not None and derivatives.step.is_used()
        if num_drawing > 1 or not compiled:
            return 1
        return calendar.steps_until_due(limit)

    def steps(self, name: str, count: int, on_results: OnResults | None) -> dict[str, Any]:
        """Make several optimizer steps of a lowest problem.

        Args:
            name: The problem.
            count: How many.
            on_results: Called with the results of one step, or of several that ran as one loop, and their number.

        Returns:
            Loss and metrics of the last.
        """
        latest: dict[str, Any] = {}
        while count > 0:
            made, latest, every = self._run_ahead(name, count, keep_results=on_results is not None)
            shield.release()
            if on_results is not None and made:
                on_results({name: every}, made)
                self._executor.derive.user_code_ran()
            count -= made
        return latest

    def _run_ahead(self, name: str, count: int, *, keep_results: bool) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Make the next few of `count` steps, in one loop if that can be.

        Returns:
            How many were made, the results of the last, and those of all of them.
        """
        state, problem = self._executor.states[name], self._executor.problems[name]
        if count == 1 or not self._executor.plan[name].runs_ahead:
            return self._single(name)
        batches = self._executor.next_batches(name, min(count, _MOST_STILL if state.stream.is_still else _MOST_FETCHED))
        derivatives = self._executor.derivatives(name, batches[0])
        if derivatives.is_random and len(batches) == count:
            batches.pop()  # the last step is made by itself: hypergradients need the random numbers it began with
        if not state.stream.has_one_batch:
            kinds, order = distinct(batches)
            same = [b.signature() == batches[0].signature() for b in kinds]
            batches = [b for b, _ in itertools.takewhile(lambda pair: same[pair[1]], zip(batches, order, strict=True))]
        compiled = self._executor.compiled_step(name, derivatives)
        if compiled is None or not compiled.can_repeat or len(batches) < 2:
            return self._single(name)
        schedule = ScheduleAhead.of(problem, compiled, len(batches))
        if schedule is None or len(schedule.rows) < 2:
            if schedule is not None:
                schedule.settle(0)
            return self._single(name)
        try:
            outcome = compiled.run(batches[: len(schedule.rows)], schedule.rows, keep_results=keep_results)
        except BaseException:
            schedule.settle(0)
            raise
        schedule.settle(outcome.num_steps)
        if problem.scheduler is not None:
            self._executor.derive.user_code_ran()
        if outcome.num_steps:
            state.samples = (Sample(batches[outcome.num_steps - 1]),)
            self._executor.account(name, outcome.num_steps, outcome.num_steps)
        if outcome.error is not None:
            if not isinstance(outcome.error, Exception):  # Ctrl-C
                raise outcome.error
            compiled.give_up(str(outcome.error))  # what is wrong with this step shows when the loss runs by itself
        if outcome.outputs is None:
            return outcome.num_steps, {}, {}
        return (
            outcome.num_steps,
            compiled.metrics(outcome.outputs),
            compiled.kept_metrics(outcome) if keep_results else {},
        )

    def _single(self, name: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
        results = self._executor.step(name)
        return 1, results, results
