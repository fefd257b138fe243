"""`Engine`: a training run."""

from __future__ import annotations

import collections
import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlopt.engine import ranks
from mlopt.engine.callback import Callback
from mlopt.engine.checkpoint_file import read_checkpoint
from mlopt.engine.checkpoints import Checkpoints, newest
from mlopt.engine.description import describe
from mlopt.engine.interruption import Interruption
from mlopt.engine.loggers import AbstractLogger
from mlopt.engine.metrics import RunningMeans, flatten
from mlopt.engine.progress import Progress
from mlopt.engine.run_dir import RunDirectory
from mlopt.engine.stopping import EarlyStopping, find_metric
from mlopt.errors import NonFiniteError, StateError
from mlopt.graph import Graph
from mlopt.runtime.finite import NonFiniteGuard
from mlopt.runtime.plan import Plan, StepResult
from mlopt.runtime.warm_up import WarmUp

History = dict[str, list[tuple[int, float]]]

FORMAT = 1  # of the state


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
        run_dir: A folder for the options, the plan as text and picture, the numbers as CSV, JSON lines and curves, and
            the checkpoints.
        checkpoints: Keeps states of the run, from which it can go on after it was cut off. SIGTERM and Ctrl-C then end
            the run after the present step, with a checkpoint.
        resume: True to go on from the last intact checkpoint, if there is one; a file or folder to go on from that (see
            `resume`).
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
        early_stopping: As given.
        checkpoints: As given.
        stop_reason: Why the run is over: ``"steps"``, ``"seconds"``, ``"early stopping"``, or what `stop` was given;
            "" while it is not.

    Raises:
        ValueError: An argument is of the wrong kind, a count is not a positive integer, neither `steps` nor `seconds`
            is given, or something needs `validate`.
        CheckpointError: There is something to resume from, and it is damaged.
        StateError: It is of another program.
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
        run_dir: str | os.PathLike[str] | None = None,
        checkpoints: Checkpoints | None = None,
        resume: bool | str | os.PathLike[str] = False,
        non_finite: str | None = None,
        snapshot_every: int = 100,
        warm_up: str | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(plan, Plan):
            advice = "; compile it: mlopt.Engine(mlopt.compile(graph), ...)" if isinstance(plan, Graph) else ""
            raise ValueError(f"Engine, argument `plan`: expected an mlopt.Plan, got {_kind(plan)}{advice}")
        callbacks = _items("callbacks", callbacks, Callback, "derive a class from it and write the hooks that you need")
        loggers = _items("loggers", loggers, AbstractLogger, "pass for example mlopt.CSVLogger('numbers.csv')")
        if validate is not None and not callable(validate):
            raise ValueError(
                f"Engine, argument `validate`: expected a function without arguments, got {_kind(validate)}; it is "
                "called, and returns a dict of numbers"
            )
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
        self.checkpoints = checkpoints
        self._options = {
            **{"steps": steps, "seconds": seconds, "validate_every": validate_every, "log_every": log_every},
            **{"early_stopping": None if early_stopping is None else repr(early_stopping), "non_finite": non_finite},
            **{"snapshot_every": snapshot_every, "warm_up": warm_up},
        }
        self._budget = seconds
        self._callbacks = callbacks
        self._validate = validate
        self._validate_every = validate_every
        self._log_every = log_every
        is_first = ranks.rank() == 0
        self._run_dir = RunDirectory(Path(run_dir)) if run_dir is not None and is_first else None
        self._loggers = (*loggers, *(self._run_dir.loggers if self._run_dir else ())) if is_first else ()
        self._progress = progress and is_first
        self._guard = None if non_finite is None else NonFiniteGuard(non_finite, snapshot_every=snapshot_every)
        self._warm_up = warm_up
        self._warming: WarmUp | None = None
        self._means = RunningMeans()
        self._shown: dict[str, float] = {}
        self._asked_to_stop = ""
        self._seconds_before = 0.0
        self._began: float | None = None
        self._pace = math.inf  # seconds per step, lately
        self._owns_folders = False  # what lies in them is of this run
        self._scheduled = {n: p.scheduler_metric for n, p in plan.graph.problems.items() if p.scheduler_metric}
        if validate is None and (early_stopping is not None or self._scheduled):
            what = (
                "`early_stopping`"
                if early_stopping is not None
                else f"the scheduler of {next(iter(self._scheduled))!r}"
            )
            raise ValueError(f"Engine: {what} looks at a number of `validate`, which is not given")
        if checkpoints is not None and checkpoints.folder is None:
            if run_dir is None:
                raise ValueError("Engine, argument `checkpoints`: give it a `dir`, or the engine a `run_dir`")
            checkpoints.folder = Path(run_dir) / "checkpoints"
        if resume is True:
            self.resume()
        elif resume is not False:
            self.resume(resume)

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
        return describe(self.plan, self._options)

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that going on with the run needs: ``plan.state_dict()`` and what the engine has counted.

        Returns:
            Plain data and tensors. The snapshot of ``non_finite="roll_back"`` is not in it: a resumed run takes a new
            one.
        """
        return {
            "format": FORMAT,
            "step": self.step,
            "seconds": self.seconds,
            "history": copy.deepcopy(self.history),
            "means": self._means.state_dict(),
            "shown": dict(self._shown),
            "early_stopping": None if self.early_stopping is None else self.early_stopping.state_dict(),
            "checkpoints": None if self.checkpoints is None else self.checkpoints.state_dict(),
            "left_out": self.num_left_out,
            "callbacks": [copy.deepcopy(callback.state_dict()) for callback in self._callbacks],
            "plan": self.plan.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put engine, plan and the user's live objects into a state that `state_dict` returned.

        Args:
            state: From an engine with the same kinds of callbacks around an equal program.

        Raises:
            StateError: The state is that of something else.
        """
        if state.get("format") != FORMAT:
            raise StateError(
                f"the state has the format {state.get('format')!r}, expected {FORMAT}: that of Engine.state_dict()"
            )
        if len(state["callbacks"]) != len(self._callbacks):
            raise StateError(
                f"the state is of an engine with {len(state['callbacks'])} callbacks, this one has "
                f"{len(self._callbacks)}; give the same ones in the same order"
            )
        self.plan.load_state_dict(state["plan"])
        self.step = state["step"]
        self._seconds_before = state["seconds"]
        self.history = {key: [(step, value) for step, value in entries] for key, entries in state["history"].items()}
        self._means.load_state_dict(state["means"])
        self._shown = dict(state["shown"])
        for ours, saved in ((self.early_stopping, "early_stopping"), (self.checkpoints, "checkpoints")):
            if ours is not None and state[saved] is not None:
                ours.load_state_dict(state[saved])
        if self._guard is not None:
            self._guard.num_refused = collections.Counter(state["left_out"])
        for callback, saved in zip(self._callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(saved)

    def save(self) -> Path:
        """Write a checkpoint now; for callbacks and loops of your own.

        Returns:
            The file.

        Raises:
            ValueError: The engine has no `checkpoints`.
        """
        if self.checkpoints is None:
            raise ValueError("Engine.save: the engine has no `checkpoints`; give it mlopt.Checkpoints(...)")
        return self.checkpoints.write(self.step, self.state_dict())

    def resume(self, path: str | os.PathLike[str] | None = None) -> int | None:
        """Go on from a checkpoint: the run goes on bit for bit as if it had not been cut off.

        With a folder, from the last checkpoint in it that is intact: a damaged one is reported, and the one before it
        taken. Entries and checkpoints of later steps, which a run that was cut off has left in the folders of this
        engine, are dropped as it goes on.

        Args:
            path: A checkpoint, a folder with some, or the `run_dir` of a run that has some; default: the folder of
                `checkpoints`.

        Returns:
            The step from which the run goes on; None if there is no checkpoint, so that it begins anew.

        Raises:
            CheckpointError: The file is damaged, or all of those in the folder are.
            FileNotFoundError: There is no such file or folder.
            StateError: The checkpoint is of another program.
            ValueError: Neither a path nor `checkpoints` is given.
        """
        own = None if self.checkpoints is None else self.checkpoints.folder
        if path is None and own is None:
            raise ValueError("Engine: there is nothing to resume from; give a path, or mlopt.Checkpoints(...)")
        source = own if path is None else Path(path)
        assert source is not None
        if path is not None and not source.exists():
            raise FileNotFoundError(f"Engine: there is no checkpoint {source} to resume from")
        if (source / "checkpoints").is_dir():
            source = source / "checkpoints"
        state = read_checkpoint(source) if source.is_file() else newest(source)
        if state is not None:
            self.load_state_dict(state)
        folder = source.parent if source.is_file() else source
        self._owns_folders = own is None or folder.resolve() == own.resolve()
        return None if state is None else self.step

    def run(self) -> History:
        """Make the steps.

        Returns:
            `history`.

        Raises:
            NonFiniteError: A loss is NaN or infinite at a logged step; or `non_finite` asks for it, or did not help.
            ValueError: Another run has left its files in the folders of this one; or `validate` returns something else
                than a dict of numbers.
            SystemExit: With `checkpoints`: SIGTERM came, and a checkpoint was written.
        """
        self._take_folders()
        self._asked_to_stop = ""
        config = self.config() if self._loggers else {}
        if self._run_dir is not None:
            self._run_dir.begin(config)
            self._run_dir.describe(self.plan)
        self.plan.set_guard(self._guard)
        self._warming = self.plan.warm_up() if self._warm_up and not self._is_over() else None
        self._began = time.monotonic()
        started: list[AbstractLogger] = []
        interruption = Interruption()
        try:
            for logger in self._loggers:
                logger.start(self.step, config)
                started.append(logger)
            if self.checkpoints is None:
                self._run(interruption)
            else:
                with interruption:
                    self._run(interruption)
        finally:
            self._seconds_before, self._began = self.seconds, None
            self.plan.set_guard(None)
            if self._warming is not None:
                self._warming.stop()
            for logger in started:
                logger.close()
            if self._run_dir is not None:
                self._run_dir.draw(self.history, last=True)
        if self._run_dir is not None:
            self._run_dir.describe(self.plan)
        interruption.leave()
        return self.history

    def _take_folders(self) -> None:
        """Make sure that nothing of another run is overwritten."""
        used = None
        if not self._owns_folders:
            if self._run_dir is not None and self._run_dir.is_used():
                used = self._run_dir.path
            elif self.checkpoints is not None and not self.checkpoints.is_empty():
                used = self.checkpoints.folder
        for found in ranks.gather(used):
            if found is not None:
                raise ValueError(
                    f"Engine: {found} holds the files of another run; give resume=True to go on with that one, or "
                    "another folder"
                )
        self._owns_folders = True
        if self.checkpoints is not None:
            self.checkpoints.clean()

    def _run(self, interruption: Interruption) -> None:
        for callback in self._callbacks:
            callback.on_start(self)
        progress = Progress(self.steps, self.step, self._budget, enabled=self._progress)
        try:
            while not self._is_over():
                if self._warming is not None:
                    self._warming.poll()
                count = self._steps_to_next_look()
                began, before = time.monotonic(), self.plan.num_steps
                try:
                    results = self.plan.run(count, on_results=self._add)
                finally:  # an error in the middle of them: a run that goes on must not make them again
                    self.step += self.plan.num_steps - before
                self._pace = (time.monotonic() - began) / count
                for callback in self._callbacks:
                    callback.on_step_end(self, results)
                saved = self._look()
                progress.update(self.step, self.seconds, self._shown, last=bool(self.stop_reason))
                if self.checkpoints is not None and any(signals := ranks.gather(interruption.received)):
                    interruption.received = max(signals)
                    if not saved:
                        self.save()
                    return
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
        if self.checkpoints is not None:
            count = min(count, self.checkpoints.every - self.step % self.checkpoints.every)
        if self.steps is not None:
            count = min(count, self.steps - self.step)
        if self._budget is not None:
            # Half of what is left at the present pace, so that the end comes between two single steps.
            fitting = (self._budget - self.seconds) / self._pace / 2 if self._pace else count
            count = min(ranks.gather(max(1, min(count, int(fitting)))))
        return count

    def _add(self, results: StepResult, num_steps: int) -> None:
        """Take the results of a step, or of several, for the means."""
        if self._guard is not None:  # which waits for every step anyway, and has left out those that are not finite
            results = {name: r for name, r in results.items() if math.isfinite(float(r["loss"]))}
        self._means.add(results, num_steps)

    def _look(self) -> bool:
        """Do what is due after the steps made; return whether a checkpoint was written."""
        over = self._is_over()
        values: dict[str, float] = {}
        if over or self.step % self._log_every == 0:
            values.update(self._log())
        is_due = self.step % self._validate_every == 0
        is_best = False
        if self._validate is not None and (over or is_due):
            validated = self._run_validation(is_due=is_due)
            is_best = self.checkpoints is not None and self.checkpoints.update_best(self.step, validated)
            values.update(validated)
            if not over and self._is_over():
                over = True
                values.update(self._log())
        if values:
            for logger in self._loggers:
                logger.log(self.step, self.seconds, values)
            if self._run_dir is not None and self._validate is not None and is_due:
                self._run_dir.draw(self.history)
        if self.checkpoints is None or not (over or is_best or self.step % self.checkpoints.every == 0):
            return False
        self.save()
        return True

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
        values = ranks.average(_numbers(self._validate()))
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


def _kind(value: Any) -> str:
    """Name the type of an argument; a class that was passed in place of an instance, as such."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _items(argument: str, items: Any, kind: type, advice: str) -> tuple[Any, ...]:
    """Return the callbacks or loggers, once each of them is an instance of its kind."""
    expected = f"mlopt.{kind.__name__}"
    if not isinstance(items, Iterable):
        raise ValueError(f"Engine, argument `{argument}`: expected a list of {expected}, got {_kind(items)}")
    items = tuple(items)
    for k, item in enumerate(items):
        if not isinstance(item, kind):
            if isinstance(item, type) and issubclass(item, kind):
                advice = f"pass an instance, {item.__name__}(...)"
            raise ValueError(f"Engine, argument `{argument}`[{k}]: expected an {expected}, got {_kind(item)}; {advice}")
    return items


def _numbers(values: Any) -> dict[str, float]:
    """Return what `validate` returned as flat numbers.

    Raises:
        ValueError: It is no dict, or one without any number in it.
    """
    if values is None:
        return {}
    numbers = flatten(values) if isinstance(values, Mapping) else {}
    if isinstance(values, Mapping) and (numbers or not values):
        return numbers
    got = {name: _kind(value) for name, value in values.items()} if isinstance(values, Mapping) else _kind(values)
    raise ValueError(
        f"Engine, argument `validate`: expected a dict of numbers or None from it, got {got}; return for example "
        "{'accuracy': 0.9}"
    )
