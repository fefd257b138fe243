"""Betty's `Engine`."""

from __future__ import annotations

import collections
import graphlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import mlopt
from mlopt.compat.betty.configs import EngineConfig, as_dict, warn_once
from mlopt.compat.betty.env import Env
from mlopt.compat.betty.logger import Logger
from mlopt.compat.betty.problems import Problem
from mlopt.engine import ranks
from mlopt.engine.metrics import flatten
from mlopt.errors import GraphError, ProblemError

Dependencies = Mapping[str, Mapping[Problem, Sequence[Problem]]]


class Engine:
    """Runs a program as Betty does: override ``validation``, call ``run``.

    Args:
        problems: The problems; the lowest first if there are no `dependencies`.
        config: See `EngineConfig`; the defaults if None.
        dependencies: ``{"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}``. The edges themselves are found in the
            losses; what is declared decides who is above whom, and is compared with them.
        env: The problems' environment.

    Attributes:
        plan: The compiled program.
        global_step: Global steps made: micro-batches of the lowest problems.
        logger: ``info``, ``log``.

    Raises:
        GraphError: The dependencies have a cycle.
        ProblemError: A problem is put together wrongly, or a setting is unknown.
    """

    def __init__(
        self,
        problems: Any = None,
        config: Any = None,
        dependencies: Dependencies | None = None,
        env: Env | None = None,
    ) -> None:
        if isinstance(problems, EngineConfig):  # the order of other versions
            problems, config = config, problems
        self.config: EngineConfig = EngineConfig() if config is None else config
        self.problems: list[Problem] = list(problems or [])
        self.env = env
        self.global_step = 0
        self.dependencies = {"u2l": {}, "l2u": {}} if dependencies is None else dependencies
        self._check_config()
        self.logger = Logger(self.config.logger_type)
        self._best: float | None = None
        self._since_best = 0
        _number_names(self.problems)
        self.leaves: list[Problem] = []
        self.plan = self._compile(declared=dependencies is not None)

    def run(self) -> None:
        """Make ``train_iters`` global steps, with validations in between."""
        size, config = self._step_size, self.config
        self.logger.start(as_dict(config))
        intervals = [p.config.log_step for p in self.problems if p.config.log_step > 0]
        engine = mlopt.Engine(
            self.plan,
            steps=max(1, config.train_iters // size),
            callbacks=[_Count(self)],
            validate=self._validate if self.is_implemented("validation") else None,
            validate_every=max(1, config.valid_step // size),
            log_every=max(1, math.gcd(*intervals) // size) if intervals else max(1, config.valid_step // size),
        )
        self._runner = engine
        self.train()
        try:
            engine.run()
        finally:
            self.logger.close()

    def train_step(self) -> None:
        """Make one global step: one micro-batch of every lowest problem, or as many as make up an optimizer step."""
        self.plan.step()
        self.global_step = self.plan.num_steps * self._step_size

    def train(self) -> None:
        """Put all modules into training mode."""
        for problem in self.problems:
            problem.train()

    def eval(self) -> None:
        """Put all modules into evaluation mode."""
        for problem in self.problems:
            problem.eval()

    def is_implemented(self, fn_name: str) -> bool:
        """Whether there is a method of this name."""
        return callable(getattr(self, fn_name, None))

    def is_rank_zero(self) -> bool:
        """Whether this is the first process."""
        return self.problems[0].is_rank_zero()

    @property
    def train_iters(self) -> int:
        """As configured."""
        return self.config.train_iters

    @property
    def valid_step(self) -> int:
        """As configured."""
        return self.config.valid_step

    @property
    def _step_size(self) -> int:
        """Micro-batches per global step of mlopt."""
        return max((p.config.gradient_accumulation for p in self.leaves), default=1)

    def _check_config(self) -> None:
        config = self.config
        if not self.problems:
            raise ProblemError("Engine: no problems; pass problems=[...]")
        for argument in ("train_iters", "valid_step"):
            value = getattr(config, argument)
            if not isinstance(value, int) or value < 1:
                raise ProblemError(f"EngineConfig({argument}=...): expected an integer >= 1, got {value!r}")
        native = (
            "use mlopt.Problem and mlopt.Engine, which run under torchrun, and average .grad over the ranks in "
            "grad_callback(self)"
        )
        if config.strategy not in ("default", None):
            raise ProblemError(
                f"EngineConfig(strategy={config.strategy!r}): only 'default' is supported; run on one device, or "
                + native
            )
        if config.distributed and max(ranks.num_ranks(), int(os.environ.get("WORLD_SIZE", "1"))) > 1:
            raise ProblemError(
                "EngineConfig(distributed=True): there are several processes, and scripts of Betty's run in one here; "
                f"start this one without torchrun, or {native}"
            )
        if config.distributed and torch.cuda.device_count() > 1:
            warn_once(
                "distributed",
                "EngineConfig(distributed=True): Betty splits every batch over all devices of the process; mlopt "
                "computes the same on one",
            )
        if config.early_stopping and config.early_stopping_mode not in ("min", "max"):
            raise ProblemError(
                f"EngineConfig(early_stopping_mode=...): expected 'min' or 'max', got {config.early_stopping_mode!r}"
            )

    def _compile(self, *, declared: bool) -> mlopt.Plan:
        l2u: Mapping[Problem, Sequence[Problem]] = self.dependencies.get("l2u", {})
        order = self._order(l2u) if declared else self.problems
        for problem in self.problems:
            if not isinstance(problem, Problem):
                raise ProblemError(
                    f"Engine: expected problems of mlopt.compat.betty, got {type(problem).__name__}; derive it from "
                    "ImplicitProblem"
                )
        pairs = [(lower, upper) for lower, uppers in l2u.items() for upper in uppers]
        if not declared:
            # Who reads whom is not known yet. Every problem gets an estimator; only those that are read use it.
            pairs = [(a, b) for k, a in enumerate(order) for b in order[k + 1 :]]
        for lower, upper in pairs:
            lower._uppers.append(upper)
            upper._lowers.append(lower)
        self.leaves = [p for p in order if not p._lowers]
        for problem in order:
            problem.logger, problem.env = self.logger, self.env
            problem.initialize(self.config)
            setattr(self, problem.name, problem)
            if self.env is not None:
                self.env.set_problem_attr(problem)
        self.train()
        graph = _Graph(order, declared=declared)
        plan = mlopt.compile(graph, backend=self.config.mlopt_backend)
        for problem in order:
            problem._plan = plan
            problem._lowers = [graph.problems[name] for name in graph.lowers(problem.name)]  # type: ignore[misc]
            problem._uppers = [p for p in order if problem.name in graph.lowers(p.name)]
        self.leaves = [p for p in order if not p._lowers]
        if declared:
            self._compare(graph)
        return plan

    def _order(self, l2u: Mapping[Problem, Sequence[Problem]]) -> list[Problem]:
        """Sort the problems, lowest first."""
        position = {problem: k for k, problem in enumerate(self.problems)}
        below: dict[Problem, set[Problem]] = {problem: set() for problem in self.problems}
        for lower, uppers in l2u.items():
            for upper in uppers:
                for problem in (lower, upper):
                    if problem not in position:
                        raise GraphError(f"Engine: dependencies name {problem!r}, which is not among the problems")
                below[upper].add(lower)
        sorter = graphlib.TopologicalSorter(below)
        try:
            sorter.prepare()
        except graphlib.CycleError as error:
            cycle = " -> ".join(p.name for p in error.args[1])
            raise GraphError(f"Engine: dependencies['l2u'] has a cycle: {cycle}; one problem must be lowest") from None
        order: list[Problem] = []
        while sorter.is_active():
            ready = sorted(sorter.get_ready(), key=position.__getitem__, reverse=True)  # often listed from above
            order += ready
            sorter.done(*ready)
        return order

    def _compare(self, graph: mlopt.Graph) -> None:
        """Say where the declared dependencies are not those of the losses."""
        declared = {
            (upper.name, lower.name) for upper, lowers in self.dependencies.get("u2l", {}).items() for lower in lowers
        }
        found = {
            (read, name) for name in graph.problems for read in graph.reads(name) if not graph.is_below(read, name)
        }
        for upper, lower in sorted(found - declared):
            warn_once(
                f"u2l {upper} {lower}",
                f"dependencies['u2l'] does not say that {lower!r} depends on {upper!r}, and its loss does; Betty then "
                "leaves the gradient through it out, mlopt does not",
            )
        for upper, lower in sorted(declared - found):
            warn_once(
                f"unread {upper} {lower}",
                f"dependencies['u2l'] says that {lower!r} depends on {upper!r}, but its loss reads none of its "
                "parameters: nothing reaches it that way",
            )

    def _validate(self) -> dict[str, float]:
        self.global_step = self.plan.num_steps * self._step_size
        self.eval()
        try:
            stats = self.validation() or {}  # type: ignore[attr-defined]
        finally:
            self.train()
        values = flatten(stats)
        if values:
            self.logger.log(values, tag="validation", step=self.global_step)
        if self.config.early_stopping:
            self._stop_early(values)
        return values

    def _stop_early(self, values: Mapping[str, float]) -> None:
        """Count as Betty does, to whom a value that equals the best is an improvement."""
        config, metric = self.config, self.config.early_stopping_metric
        if metric not in values:
            raise ProblemError(
                f"EngineConfig(early_stopping_metric={metric!r}): validation() returned "
                f"{', '.join(map(repr, values)) or 'no numbers'}"
            )
        value, best = values[metric], self._best
        improved = best is None or (value <= best if config.early_stopping_mode == "min" else value >= best)
        if improved and not math.isnan(value):
            self._best, self._since_best = value, 0
            return
        self._since_best += 1
        if self._since_best >= config.early_stopping_tolerance:
            self.logger.info("early stopping")
            self._runner.stop("early stopping")


class _Graph(mlopt.Graph):
    """The problems in the order that the dependencies give them, or the list if there are none."""

    def __init__(self, problems: Sequence[Problem], *, declared: bool) -> None:
        super().__init__(problems)
        self._is_declared = declared

    def advice_on_order(self, names: Sequence[str]) -> str:
        """Say what to change in the engine's arguments."""
        low, up = names[0], names[-1]
        if self._is_declared:
            return (
                "are 'l2u' and 'u2l' swapped in the dependencies? l2u is {lower: [upper]}, u2l {upper: [lower]}, and "
                f"from the lowest on the order should be {', '.join(names)}"
            )
        return (
            f"list the lowest first, problems=[{', '.join(names)}], or say what is above what by dependencies="
            f"{{'l2u': {{{low}: [{up}]}}, 'u2l': {{{up}: [{low}]}}}}"
        )


class _Count(mlopt.Callback):
    """Keeps ``global_step`` and logs what `Config.log_step` asks for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def on_log(self, engine: mlopt.Engine, values: Mapping[str, float]) -> None:
        """Log the numbers of the problems whose turn it is."""
        betty = self._engine
        betty.global_step = betty.plan.num_steps * betty._step_size
        by_problem: dict[str, dict[str, float]] = collections.defaultdict(dict)
        for key, value in values.items():
            owner, _, name = key.partition(".")
            by_problem[owner][name] = value
        for problem in betty.problems:
            stats, every = by_problem.get(problem.name), problem.config.log_step
            if stats and every > 0 and engine.step * betty._step_size % every == 0:
                step = problem.count if problem.config.log_local_step else betty.global_step
                betty.logger.log(stats, tag=problem.name, step=step)


def _number_names(problems: Sequence[Problem]) -> None:
    """Let problems of one name be name_0, name_1, ..., as Betty does."""
    counts = collections.Counter(p.name for p in problems)
    seen: collections.Counter[str] = collections.Counter()
    for problem in problems:
        name = problem.name
        if counts[name] > 1:
            problem.name = f"{name}_{seen[name]}"
            seen[name] += 1
