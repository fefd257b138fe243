"""`Engine`: a training run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlopt.engine import ranks
from mlopt.engine.callback import Callback
from mlopt.engine.description import describe
from mlopt.engine.loggers import AbstractLogger
from mlopt.engine.metrics import RunningMeans, flatten
from mlopt.engine.progress import Progress
from mlopt.engine.stopping import EarlyStopping, find_metric
from mlopt.errors import NonFiniteError
from mlopt.runtime.finite import NonFiniteGuard
from mlopt.runtime.plan import Plan, StepResult
from mlopt.runtime.warm_up import WarmUp

History = dict[str, list[tuple[int, float]]]


class Engine:
    """Runs a plan for a number of steps, for a time, or until validation no longer improves.

    Args:
        plan: The compiled program.
        steps: Global steps to make; every lowest problem steps once in each. May be None if `seconds` is given.
        seconds: Time after which the run ends, with the step that is being made. What a resumed run has spent before
            counts.
        callbacks: Hooks.
        validate: Called with no argument every `validate_every` steps and after the last one; may return a dict of
            numbers, which join the history and the progress bar; those in nested dicts are named like ``"acc/top1"``.
            Modules are in whatever mode they are: switch to ``eval()`` and back inside. In a distributed run every rank
            calls it, and the numbers are averaged over the ranks that return them.
        validate_every: Interval of `validate` in steps.
        early_stopping: Ends the run when a number that `validate` returns no longer improves.
        log_every: Interval in steps at which losses and metrics are read from the device, recorded and shown. Reading
            them waits for the device. What is recorded is the mean over the steps since the last time; of steps that
            run together as one native loop, the last one's.
        loggers: Take the recorded numbers, too: `mlopt.CSVLogger`, `mlopt.TensorBoardLogger`, ...
        non_finite: What is done with a step whose loss, gradient or new buffers are NaN or infinite, before it changes
            anything: ``"raise"`` an error that names problem, step and tensor; ``"skip"`` the step; ``"roll_back"`` all
            problems to the last snapshot (see `mlopt.NonFiniteGuard`). Every step then waits for the device. Default:
            only the losses that are logged are looked at.
        snapshot_every: Global steps between two snapshots, which are kept in memory, for ``"roll_back"``.
        warm_up: ``"eager"`` to train on eager graphs while they are compiled in the background, and change over between
            two steps. For a plan of ``mlopt.compile(graph, backend="eager")``, which is there in a moment; what is
            compiled already stays. A graph for which machine code is no faster stays eager, too.
        progress: Show a progress bar (on standard error; a plain line per tenth of the run when that is no terminal).

    Attributes:
        step: Global steps made by this engine.
        history: ``"problem.metric"`` -> list of (step, value), one entry per `log_every`.
        stop_reason: Why the run is over: ``"steps"``, ``"seconds"``, ``"early stopping"``, or what `stop` was given;
            "" while it is not.

    Raises:
        ValueError: A count is not a positive integer, an argument is unknown, neither `steps` nor `seconds` is given,
            or something needs `validate`.
    """

    def __init__(
        self,
        plan: Plan,
        steps: int | None = None,
        *,
        seconds: float | None = None,
        callbacks: Sequence[Callback] = (),
        validate: Callable[[], Mapping[str, Any] | None] | None = None,
        validate_every: int = 100,
        early_stopping: EarlyStopping | None = None,
        log_every: int = 10,
        loggers: Sequence[AbstractLogger] = (),
        non_finite: str | None = None,
        snapshot_every: int = 100,
        warm_up: str | None = None,
        progress: bool = True,
    ) -> None:
        for argument, value in (("steps", steps), ("validate_every", validate_every), ("log_every", log_every)):
            if argument == "steps" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Engine, argument `{argument}`: expected an integer >= 1, got {value!r}")
        if steps is None and seconds is None:
            raise ValueError("Engine: expected `steps` or `seconds`, got neither; say when the run is over")
        if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
            raise ValueError(f"Engine, argument `seconds`: expected a number > 0, got {seconds!r}")
        if warm_up not in (None, "eager"):
            raise ValueError(f"Engine, argument `warm_up`: expected 'eager' or None, got {warm_up!r}")
        self.plan = plan
        self.steps = steps
        self.step = 0
        self.history: History = {}
        self.stop_reason = ""
        self.early_stopping = early_stopping
        self.options = {
            **{"steps": steps, "seconds": seconds, "validate_every": validate_every, "log_every": log_every},
            **{"early_stopping": None if early_stopping is None else repr(early_stopping), "non_finite": non_finite},
            **{"snapshot_every": snapshot_every, "warm_up": warm_up},
        }
        self._budget = seconds
        self._callbacks = tuple(callbacks)
        self._validate = validate
        self._validate_every = validate_every
        self._log_every = log_every
        self._loggers = tuple(loggers) if ranks.rank() == 0 else ()
        self._progress = progress and ranks.rank() == 0
        self._guard = None if non_finite is None else NonFiniteGuard(non_finite, snapshot_every=snapshot_every)
        self._warm_up = warm_up
        self._warming: WarmUp | None = None
        self._means = RunningMeans()
        self._shown: dict[str, float] = {}
        self._asked_to_stop = ""
        self._seconds_before = 0.0
        self._began: float | None = None
        self._pace = math.inf  # seconds per step, lately
        self._scheduled = {n: p.scheduler_metric for n, p in plan.graph.problems.items() if p.scheduler_metric}
        if validate is None and (early_stopping is not None or self._scheduled):
            what = (
                "`early_stopping`"
                if early_stopping is not None
                else f"the scheduler of {next(iter(self._scheduled))!r}"
            )
            raise ValueError(f"Engine: {what} looks at a number of `validate`, which is not given")

    @property
    def num_left_out(self) -> dict[str, int]:
        """Problem -> steps that were not finite and have been skipped or rolled back."""
        return {} if self._guard is None else dict(self._guard.num_refused)

    @property
    def seconds(self) -> float:
        """Time spent in `run` so far, that before a resumption included."""
        return self._seconds_before + (0.0 if self._began is None else time.monotonic() - self._began)

    def stop(self, reason: str = "stop()") -> None:
        """End the run after the present step; for callbacks and `validate`."""
        self._asked_to_stop = reason

    def config(self) -> dict[str, Any]:
        """Describe the run as plain data: options, problems with optimizers and estimators, versions, the seed."""
        return describe(self.plan, self.options)

    def run(self) -> History:
        """Make the steps.

        Returns:
            `history`.

        Raises:
            NonFiniteError: A loss is NaN or infinite at a logged step; or `non_finite` asks for it, or did not help.
        """
        self.plan.set_guard(self._guard)
        self._asked_to_stop = ""
        self._warming = self.plan.warm_up() if self._warm_up and not self._is_over() else None
        self._began = time.monotonic()
        started: list[AbstractLogger] = []
        try:
            config = self.config() if self._loggers else {}
            for logger in self._loggers:
                logger.start(self.step, config)
                started.append(logger)
            self._run()
            return self.history
        finally:
            self._seconds_before, self._began = self.seconds, None
            self.plan.set_guard(None)
            if self._warming is not None:
                self._warming.stop()
            for logger in started:
                logger.close()

    def _run(self) -> None:
        for callback in self._callbacks:
            callback.on_start(self)
        progress = Progress(self.steps, self.step, self._budget, enabled=self._progress)
        try:
            while not self._is_over():
                if self._warming is not None:
                    self._warming.poll()
                count = self._steps_to_next_look()
                began = time.monotonic()
                results = self.plan.run(count, on_results=self._add)
                self._pace = (time.monotonic() - began) / count
                self.step += count
                for callback in self._callbacks:
                    callback.on_step_end(self, results)
                self._look()
                progress.update(self.step, self.seconds, self._shown, last=bool(self.stop_reason))
        finally:
            progress.close()
        for callback in self._callbacks:
            callback.on_end(self)

    def _is_over(self) -> bool:
        """Whether no step is to be made any more; a run that is over may go on if it is given more of what ended it."""
        if self.early_stopping is not None and self.early_stopping.is_over:
            self.stop_reason = "early stopping"
        elif self.steps is not None and self.step >= self.steps:
            self.stop_reason = "steps"
        else:
            late = self._budget is not None and self.seconds >= self._budget
            reasons = ranks.gather("seconds" if late else self._asked_to_stop)  # of one rank, for all
            self.stop_reason = next(filter(None, reasons), "")
        return bool(self.stop_reason)

    def _steps_to_next_look(self) -> int:
        """Return how many steps may be made before anything of the engine's looks at the program."""
        if any(type(c).on_step_end is not Callback.on_step_end for c in self._callbacks):
            return 1
        intervals = [self._log_every] + ([self._validate_every] if self._validate is not None else [])
        count = min(interval - self.step % interval for interval in intervals)
        if self.steps is not None:
            count = min(count, self.steps - self.step)
        if self._budget is not None:
            # Half of what is left at the present pace, so that the end comes between two single steps.
            fitting = (self._budget - self.seconds) / self._pace / 2 if self._pace else count
            count = min(ranks.gather(max(1, min(count, int(fitting)))))
        return count

    def _add(self, results: StepResult) -> None:
        """Take the results of a step for the means."""
        if self._guard is not None:  # which waits for every step anyway, and has left out those that are not finite
            results = {name: r for name, r in results.items() if math.isfinite(float(r["loss"]))}
        self._means.add(results)

    def _look(self) -> None:
        """Do what is due after the steps made."""
        over = self._is_over()
        values: dict[str, float] = {}
        if over or self.step % self._log_every == 0:
            values.update(self._log())
        is_due = self.step % self._validate_every == 0
        if self._validate is not None and (over or is_due):
            values.update(self._run_validation(is_due=is_due))
            if not over and self._is_over():
                values.update(self._log())
        if values:
            for logger in self._loggers:
                logger.log(self.step, self.seconds, values)

    def _log(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for problem, result in self._means.take().items():
            loss = result["loss"]
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"problem {problem!r}: its loss is {loss} at step {self.step} or shortly before; lower its "
                    "learning rate or look at its data. Engine(..., non_finite='raise') tells at which step and tensor "
                    "it begins, 'skip' and 'roll_back' go on"
                )
            for name, value in result.items():
                values[f"{problem}.{name}"] = value
                self._shown[problem if name == "loss" else f"{problem}.{name}"] = value
        self._record(values)
        for callback in self._callbacks:
            callback.on_log(self, values)
        return values

    def _run_validation(self, *, is_due: bool) -> dict[str, float]:
        """Validate; schedulers and early stopping look at what is due, not at the result that ends every run."""
        assert self._validate is not None
        values = ranks.average(flatten(self._validate() or {}))
        self._record(values)
        self._shown.update(values)
        if is_due:
            for name, metric in self._scheduled.items():
                problem = self.plan.graph.problems[name]
                problem.scheduler.step(find_metric(metric, values, f"the scheduler of problem {name!r}"))
            if self.early_stopping is not None:
                self.early_stopping.update(self.step, values)
        for callback in self._callbacks:
            callback.on_validation_end(self, values)
        return values

    def _record(self, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.history.setdefault(key, []).append((self.step, value))
