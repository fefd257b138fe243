"""`Calendar`: which problem steps when, as the counters of their steps say."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mlopt.planner import ExecutionPlan
from mlopt.problem import Problem
from mlopt.runtime.state import ProblemState


class Calendar:
    """Reads the counters; it has none of its own.

    Args:
        plan: Who is above whom.
        problems: The problems by name, in the order in which those that are due step.
        states: Their counters.

    Attributes:
        lowest: The problems that step in every global step.
    """

    def __init__(
        self, plan: ExecutionPlan, problems: Mapping[str, Problem], states: Mapping[str, ProblemState]
    ) -> None:
        self._plan = plan
        self._problems = problems
        self._states = states
        self.lowest = [p.name for p in plan.problems if not p.lowers]
        self._above = [name for name in problems if name not in self.lowest]

    def unroll_start(self, name: str, lower: str) -> int:
        """Return the step of a lower problem from which its steps count for the next one of `name`."""
        return max(self._states[name].steps_seen.get(lower, 0), self._problems[lower].warmup_steps)

    def is_due(self, name: str) -> bool:
        """Whether a problem steps now: its lower problems have made their steps since its last one."""
        return all(self.missing(name, lower) <= 0 for lower in self._plan[name].lowers)

    def missing(self, name: str, lower: str) -> int:
        """Return how many steps of a lower problem are to come before `name` can be due."""
        since = self._states[lower].num_steps - self.unroll_start(name, lower)
        return self._problems[lower].unroll_steps - since

    def steps_until_due(self, limit: int) -> int:
        """Return the number of global steps, at most `limit`, before the last of which only lowest problems step."""
        for name in self._above:
            wait: float = 1
            for lower in self._plan[name].lowers:
                missing = self.missing(name, lower)
                wait = max(wait, missing if lower in self.lowest or missing <= 0 else math.inf)
            limit = int(min(limit, wait))
        return limit

    def due_after(self, count: int) -> list[str]:
        """Return the problems, in order, that step after `count` steps of every lowest one."""
        made = dict.fromkeys(self.lowest, count)
        due = []
        for name in self._above:
            if all(self.missing(name, lower) <= made.get(lower, 0) for lower in self._plan[name].lowers):
                due.append(name)
                made[name] = 1
        return due

    def is_beginning(self) -> bool:
        """Whether no problem has made a step that one above it has not seen: the next steps are those of a cycle."""
        return all(
            self._states[lower].num_steps == self.unroll_start(name, lower)
            for name in self._above
            for lower in self._plan[name].lowers
        )
