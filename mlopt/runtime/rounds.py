"""`RoundRunner`: a round of steps in one call, where each of them is a native program.

A round is what leads to the next step above: some steps of every lowest problem, and one of each problem that is due
then. In small programs the arithmetic takes less time than Python takes to lead from one step to the next. So where
all steps of a round have programs (`Programs`), and no code of the user's is to run between them, the modules and
optimizers are looked at once, everything is handed over, and the programs run and write one after the other. Where
data is a list, several rounds are made at once.

What a round does is what its steps do one by one, bit for bit. Whatever it cannot do, it leaves to them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Any

from mlopt import ops
from mlopt.planner import Linearize
from mlopt.problem import Problem
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import GraphDerivatives
from mlopt.runtime.execute import Executor
from mlopt.runtime.programs import ReadyStep
from mlopt.runtime.schedule import mark_stepped
from mlopt.runtime.shield import shield
from mlopt.runtime.state import Sample

logger = logging.getLogger(__name__)

_MOST_AT_ONCE = 64  # rounds
_MOST_KNOWN = 256  # parts, of which each has its batches
_LONGEST_REST = 64  # calls in which no round is tried, after many vain ones: trying takes as long as a small step


@dataclasses.dataclass(frozen=True)
class RoundsOutcome:
    """What came of rounds.

    Attributes:
        num_steps: Global steps of whole rounds.
        results: The latest of every problem that stepped; empty if none did.
        count: How many steps of lowest problems a round has.
        begun: The problems that have made their steps of a round that is not whole.
        error: Why it is not: `KeyboardInterrupt`, or a warning that is an error; None if it is to be ended in the usual
            way.
    """

    num_steps: int
    results: dict[str, dict[str, Any]]
    count: int
    begun: tuple[str, ...] = ()
    error: BaseException | None = None


@dataclasses.dataclass(frozen=True)
class _Part:
    """Steps of one problem within a round.

    Attributes:
        name: The problem.
        count: How many.
        batch: That of the last.
        sources: Everything that they are evaluated on: problem, batch, derivatives, what these run by.
        ready: The steps.
    """

    name: str
    count: int
    batch: Batch
    sources: list[tuple[str, Batch, GraphDerivatives, object]]
    ready: ReadyStep


@functools.cache
def _extension() -> Any:
    return importlib.import_module("mlopt._C")


class RoundRunner:
    """Makes rounds.

    Args:
        executor: Holds the state, and makes single steps.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        problems = executor.problems.values()
        self._never = bool(
            executor.histories
            or any(p.rolled_back for p in executor.plan.problems)
            or any(p.gradient_accumulation > 1 for p in problems)
            or not ops.available()
        )
        self._linearized = {
            p.name: [] if p.is_whole else [i.problem for i in p.instructions if isinstance(i, Linearize)]
            for p in executor.plan.problems
        }
        self._rest, self._resting = 0, 0
        self._most = 1  # rounds at once
        self._known: dict[tuple[object, ...], _Part] = {}  # by name, count, and the ids of the batches

    def run(self, limit: int) -> RoundsOutcome | None:
        """Make rounds of at most `limit` global steps together; None if none can be made, and nothing was changed."""
        if self._never or self._resting:
            self._resting = max(self._resting - 1, 0)
            return None
        executor = self._executor
        found = None
        if not executor.keep_gradients and executor.check.guard is None:
            found = self._parts(limit)
        if found is None:
            self._rest = min(2 * self._rest + 1, _LONGEST_REST)
            self._resting = self._rest
            return None
        self._rest = 0
        count, rounds = found
        return self._run(count, rounds)

    def _parts(self, limit: int) -> tuple[int, list[list[_Part]]] | None:
        """Return how many steps lowest problems make in a round, and the parts of each round."""
        executor, calendar = self._executor, self._executor.calendar
        count = calendar.steps_until_due(limit if executor.lowest_are_independent else 1)
        due = calendar.due_after(count)
        names = [*calendar.lowest, *due]
        if not all(map(self._is_plain, names)):
            return None
        streams = {name: executor.states[name].stream for name in names}
        times = 1
        is_cycle = calendar.is_beginning() and len(names) == len(executor.problems)  # the next round is the same
        if is_cycle and all(stream.is_still for stream in streams.values()):
            times = max(1, min(limit // count, self._most))
        executor.derive.begin()
        batches: dict[str, list[Batch]] = {}
        for name in names:
            steps = count if name in calendar.lowest else 1
            if not streams[name].may_run_ahead or (steps > 1 and not streams[name].has_one_batch):
                return None
            batches[name] = self._fetch(name, 1 if streams[name].has_one_batch else times)
            # Before another loader draws: it may not draw before a loss does that is evaluated first.
            if not self._is_known(name, batches[name][0]):
                return None
        rounds: list[list[_Part]] = []
        for k in range(times):
            now = {key: given[min(k, len(given) - 1)] for key, given in batches.items()}
            parts = []
            for name in names:
                part = self._part(name, count if name in calendar.lowest else 1, now)
                if part is None:
                    return (count, rounds) if k else None
                parts.append(part)
            rounds.append(parts)
        return count, rounds

    def _fetch(self, name: str, count: int) -> list[Batch]:
        try:
            return self._executor.next_batches(name, count)
        except Exception as error:
            self._executor.say_where(name, error)
            raise

    def _is_known(self, name: str, batch: Batch) -> bool:
        """Whether a loss can be evaluated on a batch without drawing random numbers."""
        try:
            return not self._executor.derive(name, batch).is_random
        except Exception:  # the step by itself will say what is wrong, and where
            logger.debug("no round can be made", exc_info=True)
            return False

    def _is_plain(self, name: str) -> bool:
        """Whether no code of the user's runs around a step of a problem that has a compiled one."""
        problem = self._executor.problems[name]
        learned = type(problem).optimizer_hyperparameters is not Problem.optimizer_hyperparameters
        return problem.scheduler is None and not learned and not problem.has_inner_loop_hook

    def _part(self, name: str, count: int, batches: dict[str, Batch]) -> _Part | None:
        """Return the steps of a problem."""
        given = {name: batches[name]}
        for lower in self._linearized[name]:
            last = self._batch(lower, batches)
            if last is None:
                return None
            given[lower] = last
        key = (name, count, *map(id, given.values()))
        known = self._known.get(key)
        if known is not None and self._is_current(known, given):
            return known
        part = self._find(name, count, given)
        if part is not None and all(self._executor.states[n].stream.is_still for n in given):  # others come once
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = part
        return part

    def _is_current(self, part: _Part, given: dict[str, Batch]) -> bool:
        derive = self._executor.derive
        return part.ready.is_current() and all(
            given[name] is batch and derive(name, batch) is known and known.backend is backend
            for name, batch, known, backend in part.sources
        )

    def _batch(self, name: str, batches: dict[str, Batch]) -> Batch | None:
        """Return the batch of a problem's last step, in this round or before, if that is all that it depends on."""
        if name in batches:
            return batches[name]
        samples = self._executor.lower_samples(name)
        return samples[0].batch if len(samples) == 1 and samples[0].random_state is None else None

    def _find(self, name: str, count: int, given: dict[str, Batch]) -> _Part | None:
        executor, batch = self._executor, given[name]
        if executor.plan[name].is_whole:
            step = executor.compiled_step(name, executor.derive(name, batch))
            ready = None if step is None else step.ready(batch, count)
        else:
            update = executor.total_update(name, executor.derive(name, batch)) if len(given) > 1 else None
            ready = None if update is None else executor.native.ready(name, given, executor.derive)
        if ready is None:
            return None
        sources: list[tuple[str, Batch, GraphDerivatives, object]] = []
        for key, each in given.items():
            derivatives = executor.derive(key, each)
            assert isinstance(derivatives, GraphDerivatives)  # others have no programs
            sources.append((key, each, derivatives, derivatives.backend))
        return _Part(name, count, batch, sources, ready)

    def _run(self, count: int, rounds: list[list[_Part]]) -> RoundsOutcome:
        executor = self._executor
        parts = [part for parts in rounds for part in parts]
        distinct = list({id(part): part for part in parts}.values())
        position = {id(part): k for k, part in enumerate(distinct)}
        device = executor.layouts[parts[0].name].device
        calls, order = [part.ready.call for part in distinct], [position[id(part)] for part in parts]
        made = _extension().run_programs(calls, order, ops.recorder_for(device), shield)
        latest: dict[str, tuple[_Part, Sequence[Any]]] = {}
        done = made.values
        for part, values in zip(parts, done, strict=False):
            self._account(part)
            latest[part.name] = part, values
        results = {name: part.ready.results(values) for name, (part, values) in latest.items()}
        num_made = len(done)
        error: BaseException | None = None
        try:
            if made.doubtful is not None:
                part = parts[num_made]
                values = made.doubtful.values
                for instruction, solution in part.ready.solutions(values):
                    executor.report(part.name, instruction, solution.outcome)  # may be an error; nothing is written
                shield.held = True
                made.doubtful.write()
                self._account(part)
                results[part.name] = part.ready.results(values)
                num_made += 1
                self._most = 1
            elif num_made < len(parts):
                made.raise_error()
            else:
                self._most = min(2 * self._most, _MOST_AT_ONCE)
        except RuntimeError as failure:
            parts[num_made].ready.give_up(failure)
            self._known.clear()
        except BaseException as interrupt:  # Ctrl-C, or a warning that is an error
            error = interrupt
        num_whole = num_made // len(rounds[0])
        begun = tuple(part.name for part in parts[num_whole * len(rounds[0]) : num_made])
        return RoundsOutcome(num_whole * count, results, count, begun, error)

    def _account(self, part: _Part) -> None:
        """Do what there is to do once steps have been made and written."""
        executor, state = self._executor, self._executor.states[part.name]
        part.ready.written()
        mark_stepped(executor.problems[part.name].optimizer)
        state.samples = (Sample(part.batch),)
        state.stream.take_restart()
        executor.account(part.name, part.count, part.count)
