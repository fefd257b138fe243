"""`Engine`: a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from mlopt.errors import NonFiniteError
from mlopt.runtime.finite import NonFiniteGuard
from mlopt.runtime.plan import Plan, StepResult
from mlopt.runtime.warm_up import WarmUp

History = dict[str, list[tuple[int, float]]]


class Callback:
    """Hooks into an `Engine` run; override what you need. The engine is given so that hooks can read its state."""

    def on_start(self, engine: Engine) -> None:
        """Run before the first step."""

    def on_step_end(self, engine: Engine, results: StepResult) -> None:
        """Run after every global step, with what ``plan.step()`` returned."""

    def on_end(self, engine: Engine) -> None:
        """Run after the last step."""


class Engine:
    """Runs a plan for a number of steps.

    Args:
        plan: The compiled program.
        steps: Global steps to make; every lowest problem steps once in each.
        callbacks: Hooks.
        validate: Called with no argument every `validate_every` steps and after the last one; may return a dict of
            numbers, which join the history and the progress bar. Modules are in whatever mode they are: switch to
            ``eval()`` and back inside.
        validate_every: Interval of `validate` in steps.
        log_every: Interval in steps at which losses and metrics are read from the device, recorded and shown. Reading
            them waits for the device.
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

    Raises:
        ValueError: A count is not a positive integer, or an argument is unknown.
    """

    def __init__(
        self,
        plan: Plan,
        steps: int,
        *,
        callbacks: Sequence[Callback] = (),
        validate: Callable[[], dict[str, float] | None] | None = None,
        validate_every: int = 100,
        log_every: int = 10,
        non_finite: str | None = None,
        snapshot_every: int = 100,
        warm_up: str | None = None,
        progress: bool = True,
    ) -> None:
        for argument, value in (("steps", steps), ("validate_every", validate_every), ("log_every", log_every)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Engine, argument `{argument}`: expected an integer >= 1, got {value!r}")
        self.plan = plan
        self.steps = steps
        self.step = 0
        self.history: History = {}
        self._callbacks = tuple(callbacks)
        self._validate = validate
        self._validate_every = validate_every
        self._log_every = log_every
        self._progress = progress
        self._guard = None if non_finite is None else NonFiniteGuard(non_finite, snapshot_every=snapshot_every)
        if warm_up not in (None, "eager"):
            raise ValueError(f"Engine, argument `warm_up`: expected 'eager' or None, got {warm_up!r}")
        self._warm_up = warm_up
        self._warming: WarmUp | None = None
        self._latest: StepResult = {}
        self._shown: dict[str, float] = {}

    @property
    def num_left_out(self) -> dict[str, int]:
        """Problem -> steps that were not finite and have been skipped or rolled back."""
        return {} if self._guard is None else dict(self._guard.num_refused)

    def run(self) -> History:
        """Make the steps.

        Returns:
            `history`.

        Raises:
            NonFiniteError: A loss is NaN or infinite at a logged step; or `non_finite` asks for it, or did not help.
        """
        self.plan.set_guard(self._guard)
        self._warming = self.plan.warm_up() if self._warm_up and self.step < self.steps else None
        try:
            return self._run()
        finally:
            self.plan.set_guard(None)
            if self._warming is not None:
                self._warming.stop()

    def _run(self) -> History:
        for callback in self._callbacks:
            callback.on_start(self)
        with tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=not self._progress) as bar:
            while self.step < self.steps:
                if self._warming is not None:
                    self._warming.poll()
                count = self._steps_to_next_look()
                results = self.plan.run(count)
                self.step += count
                self._latest.update(results)
                for callback in self._callbacks:
                    callback.on_step_end(self, results)
                last = self.step == self.steps
                if last or self.step % self._log_every == 0:
                    self._log()
                if self._validate is not None and (last or self.step % self._validate_every == 0):
                    self._record("", self._validate() or {})
                bar.set_postfix(self._shown, refresh=False)
                bar.update(count)
        for callback in self._callbacks:
            callback.on_end(self)
        return self.history

    def _steps_to_next_look(self) -> int:
        """Return how many steps may be made before anything of the engine's looks at the program."""
        if any(type(c).on_step_end is not Callback.on_step_end for c in self._callbacks):
            return 1
        intervals = [self._log_every] + ([self._validate_every] if self._validate is not None else [])
        return min(self.steps - self.step, *(interval - self.step % interval for interval in intervals))

    def _log(self) -> None:
        for problem, result in self._latest.items():
            loss = float(result["loss"])
            if not torch.isfinite(result["loss"]):
                if self._guard is not None:  # which has left that step out
                    continue
                raise NonFiniteError(
                    f"problem {problem!r}: its loss is {loss} at step {self.step}; lower its learning rate or look at "
                    "its data. Engine(..., non_finite='raise') tells at which step and tensor it begins, 'skip' and "
                    "'roll_back' go on"
                )
            self._record(problem, result)
        self._latest = {}

    def _record(self, problem: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                if value.numel() != 1:
                    continue
                value = value.item()
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            key = f"{problem}.{name}" if problem else name
            self.history.setdefault(key, []).append((self.step, float(value)))
            self._shown[problem if name == "loss" else key] = value
