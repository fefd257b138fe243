"""`Plan`: a compiled multilevel program."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from mlopt.drawing import write_svg
from mlopt.graph import Graph
from mlopt.planner import ExecutionPlan
from mlopt.problem import Problem
from mlopt.runtime.ahead import AheadRunner, OnResults, StepResult
from mlopt.runtime.check import Reference, Report, check
from mlopt.runtime.data import Batch
from mlopt.runtime.execute import Executor
from mlopt.runtime.explain import CompileReport, explain
from mlopt.runtime.finite import NonFiniteGuard
from mlopt.runtime.plan_state import Unfinished, restore, state_of
from mlopt.runtime.rounds import RoundRunner, RoundsOutcome
from mlopt.runtime.saving.export import export_hypergradient
from mlopt.runtime.saving.write import save as write_plan
from mlopt.runtime.shield import shield
from mlopt.runtime.warm_up import WarmUp


class Plan:
    """A compiled program; made by `mlopt.compile`.

    The user's objects stay theirs: a plan reads the live parameters, steps the live optimizers, and keeps nothing
    else than counters, the last batches and the solvers' warm starts.

    Attributes:
        graph: The problem graph.
        program: The planned instructions.
        num_steps: Global steps made.
    """

    def __init__(
        self,
        graph: Graph,
        program: ExecutionPlan,
        executor: Executor,
        report: CompileReport,
        reference: Reference,
        warm_up: Callable[[Callable[[str], Batch]], WarmUp | None],
    ) -> None:
        self.graph = graph
        self.program = program
        self.num_steps = 0
        self._executor = executor
        self._ahead = AheadRunner(executor)
        self._rounds = RoundRunner(executor)
        self._unfinished: Unfinished | None = None
        self._partial: StepResult = {}  # the results of what there is of it
        self._report = report
        self._reference = reference
        self._warm_up = warm_up

    def step(self) -> StepResult:
        """Make one global step: every lowest problem steps once, then each problem whose turn it is, upwards.

        After an error or Ctrl-C every problem is as its last whole step left it. What is left of the global step is
        made by the next call, which returns the results of all of it.

        Returns:
            For each problem that stepped, a dict with its ``"loss"`` (0-d tensor, taken before the update) and its
            metrics, as `training_step` named them.

        Raises:
            DataError: A problem's data ran out or changed its structure beyond what can be read.
            CaptureError: A batch of a new shape or structure made a new capture necessary, and that failed.
            NonFiniteError: The guard (see `set_guard`) found a step that is not finite; or an fp16 problem overflows
                whatever its loss scale.
        """
        return self._make(1, None)[1]

    def run(self, num_steps: int, *, on_results: OnResults | None = None) -> StepResult:
        """Make several global steps; what they do is what as many calls of `step` do.

        Where nothing else is due for a while, the steps of a lowest problem run as one native loop (`explain` says
        which problems can), and where a step above is a native program, too, both run in one call. After Ctrl-C or an
        error, every problem is as its last whole step left it, and `num_steps` says how many global steps are whole;
        what is left of one is made first by the next call, as one of its steps.

        Args:
            num_steps: How many, at least 0.
            on_results: Called with results as `step` returns them, and the number of steps that they are of: 1, or more
                where steps ran as one native loop. The losses of these, and their metrics of one element, are
                tensors [steps]; metrics of more elements are left out, and constants are given once.

        Returns:
            The latest result of every problem that stepped.
        """
        latest: StepResult = {}
        while num_steps > 0:
            count, results = self._make(num_steps, on_results)
            latest.update(results)
            num_steps -= count
        return latest

    def _make(self, limit: int, on_results: OnResults | None) -> tuple[int, StepResult]:
        """Make some global steps, at most `limit`; return how many, and the latest results."""
        with self._executor.derive.uninterrupted(), shield:
            if self._unfinished is not None:
                return self._finish(on_results)
            outcome = self._rounds.run(limit) if on_results is None else None
            if outcome is not None and outcome.results:
                return self._rounds_made(outcome)
            if outcome is not None and outcome.error is not None:
                raise outcome.error
            count = self._ahead.steps_until_due(limit)
            return count, self._advance(count, on_results)

    def _rounds_made(self, outcome: RoundsOutcome) -> tuple[int, StepResult]:
        """Count rounds, and end one that is not whole in the usual way."""
        before = self.num_steps
        self.num_steps += outcome.num_steps
        results = outcome.results
        if outcome.begun:
            made = {n: outcome.count * (n in outcome.begun) for n in self._executor.calendar.lowest}
            self._interrupted(outcome.count, made, {n: results[n] for n in outcome.begun})
        shield.release()
        if outcome.error is not None:
            raise outcome.error
        if self._unfinished is not None:
            results = {**results, **self._finish(None)[1]}
        return self.num_steps - before, results

    def _advance(self, count: int, on_results: OnResults | None) -> StepResult:
        """Make global steps, of which only the last may have other than lowest problems due."""
        executor, lowest = self._executor, self._executor.calendar.lowest
        self._begin_guard()
        before = {name: executor.states[name].num_steps for name in lowest}
        ahead: StepResult = {}
        results: StepResult = {}
        try:
            for name in lowest:
                if count > 1:
                    ahead[name] = self._ahead.steps(name, count, on_results)
            for name in self.graph.problems:
                if not (count > 1 and name in lowest) and executor.calendar.is_due(name):
                    results[name] = executor.step(name)
                    shield.release()
        except BaseException:
            made = {name: executor.states[name].num_steps - before[name] for name in lowest}
            self._interrupted(count, made, {**ahead, **results})
            raise
        self.num_steps += count
        if on_results is not None and results:
            on_results(results, 1)
        return {**ahead, **results}

    def _begin_guard(self) -> None:
        guard = self._executor.check.guard
        if guard is not None:
            guard.begin(self.num_steps + 1, self.graph.problems, self._executor.snapshot)

    def _interrupted(self, count: int, made: Mapping[str, int], results: StepResult) -> None:
        """Count the global steps that are whole, and remember what is left of the one that is not.

        Args:
            count: How many were to be made.
            made: The steps of each lowest problem.
            results: What there is of them.
        """
        whole, most = min(made.values()), max(made.values())
        left = {name: most - steps for name, steps in made.items() if steps < most}
        calendar = self._executor.calendar
        is_due = whole == count and any(calendar.is_due(n) for n in self.graph.problems if n not in calendar.lowest)
        self.num_steps += whole - is_due
        if left or is_due:
            self._unfinished, self._partial = Unfinished(left, most - whole + is_due), results

    def _finish(self, on_results: OnResults | None) -> tuple[int, StepResult]:
        """End what was interrupted: what has been done of it is not done again."""
        executor, unfinished = self._executor, self._unfinished
        assert unfinished is not None
        self._begin_guard()
        for name, left in unfinished.left.items():
            before = executor.states[name].num_steps
            try:
                if left:
                    self._partial[name] = self._ahead.steps(name, left, on_results)
            finally:
                unfinished.left[name] -= executor.states[name].num_steps - before
        above: StepResult = {}
        for name in self.graph.problems:
            if name not in executor.calendar.lowest and executor.calendar.is_due(name):
                above[name] = self._partial[name] = executor.step(name)
                shield.release()
        results, self._partial, self._unfinished = self._partial, {}, None
        self.num_steps += unfinished.num_steps
        if on_results is not None and above:
            on_results(above, 1)
        return unfinished.num_steps, results

    def steps_of(self, problem: str | Problem) -> int:
        """Return how many optimizer steps a problem has made.

        Raises:
            KeyError: Unknown problem.
        """
        return self._executor.states[self._name(problem)].num_steps

    def last_batch(self, problem: str | Problem) -> Any:
        """Return the batch of a problem's last step (the last of its micro-batches), or None before the first.

        Raises:
            KeyError: Unknown problem.
        """
        samples = self._executor.states[self._name(problem)].samples
        return samples[-1].batch.spec.unflatten(samples[-1].batch.tensors) if samples else None

    def _name(self, problem: str | Problem) -> str:
        name = problem.name if isinstance(problem, Problem) else problem
        if name not in self.graph.problems:
            raise KeyError(f"unknown problem {name!r} (problems: {', '.join(self.graph.problems)})")
        return name

    @property
    def keep_gradients(self) -> bool:
        """Whether every step leaves its gradient in ``.grad``, for code that looks at it; False at first.

        A step that is one compiled graph never has the gradient as a tensor and leaves None. True makes all steps by
        ``optimizer.step()`` on a gradient in ``.grad``. So does a hook on the optimizer, by itself.
        """
        return self._executor.keep_gradients

    @keep_gradients.setter
    def keep_gradients(self, value: bool) -> None:
        self._executor.keep_gradients = value

    def warm_up(self) -> WarmUp | None:
        """Compile in the background what runs by the eager backend.

        Returns:
            Whose ``poll()`` changes over, to be called between steps, and whose ``stop()`` gives up; None if there is
            nothing to compile.
        """
        return self._warm_up(self._executor.latest_batch)

    def set_guard(self, guard: NonFiniteGuard | None) -> None:
        """Have every step looked at before it changes anything, or no longer, with None.

        Args:
            guard: Says what is done with a step that is not finite.
        """
        self._executor.check.guard = guard

    def hypergradient(self, problem: str | Problem, *, batch: Any = None) -> dict[str, torch.Tensor]:
        """Return the total gradient of a problem's loss at the present state; nothing is stepped or moved.

        ``dF/dlambda = direct - sum over lower problems of (d2g/dlambda dtheta)^T q`` with ``H q = v``, by each lower
        problem's estimator. Lower problems are differentiated at their present parameters, on the batch and with the
        random numbers of their last step (of the step they would make next, if they have made none). Calling it twice
        gives the same tensors.

        Args:
            problem: The problem or its name.
            batch: The batch for this problem's own loss; default: the one its next step will use.

        Returns:
            Parameter name (as in ``module.named_parameters()``) -> gradient of the parameter's shape and dtype;
            zeros for a parameter that no loss uses.

        Raises:
            KeyError: Unknown problem.
        """
        name = self._name(problem)
        executor = self._executor
        flattened = None if batch is None else [executor.states[name].stream.flatten(batch)]
        gradients = executor.hypergradient(name, flattened)
        parameters = self.graph.problems[name].trained_parameters()
        return {
            key: torch.zeros_like(parameter) if gradient is None else gradient.detach().clone()
            for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }

    def check(self) -> Report:
        """Measure how good the hypergradients are at the present state; nothing is stepped or moved.

        Every estimate is compared with a reference from plain autograd on the user's code and an accurate solve (the
        whole Hessian up to 1,500 parameters, else conjugate gradients to 1e-7). The report tells errors, residuals,
        the signs of the curvature, how far the lower problems are from their optimum and what that does to the
        hypergradient, and hypergradients that are zero. It costs many times a step: for a look now and then.

        Returns:
            The report; print it.
        """
        return check(self.graph, self._executor, self._reference)

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that continuing bit for bit needs.

        Of every problem: parameters and buffers, the ``state_dict`` of optimizer and scheduler, its counters, the
        micro-batches of its last step with their random numbers, and its position in the data. Of the plan: the
        solvers' warm starts, the steps that `Unroll` and roll-back keep, and the state of the global random generators
        (torch's, Python's, NumPy's).

        The position in the data is where the present pass over a loader began (the generators then, and the number of
        batches taken since) and the batches that were fetched and not yet used. It holds for what yields the same
        batches from the same generators: lists, and a `DataLoader` with any number of workers over data that is read by
        index. A loader with a ``state_dict`` of its own is asked for that. Whatever else a loader remembers between two
        passes is not in there; neither are the modules' training mode and plain attributes of the user's objects.

        Returns:
            Dicts, lists, tensors and numbers, for ``torch.save`` and ``torch.load(..., weights_only=True)``. A copy:
            later steps do not change it.

        Raises:
            DataError: A batch holds a container that cannot be made plain data.
        """
        return state_of(self._executor, self.num_steps, self._unfinished)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the plan and the user's live objects into a state that `state_dict` returned.

        The steps that follow are bit for bit those that followed ``state_dict()``, with the same data, number of
        threads and backend. The objects stay the same objects. Going to the position in the data fetches the batches
        of the present pass again.

        Args:
            state: From this plan or from one of an equal program, also of another process.

        Raises:
            StateError: The state is that of another program; names the problem and the tensor.
            DataError: The data is not that of which the position is.
        """
        self.num_steps, self._unfinished = restore(self._executor, state)
        self._partial = {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan so that `mlopt.load` runs it in another process, without capturing or compiling.

        The folder holds the program, its graphs for the next batch of every problem and for those of the last steps (in
        the modules' present training modes and with the present plain values), the compiled packages, and the state:
        parameters, buffers, optimizers, counters. Data and the code of the problems are not in it. It is written whole
        or not at all, and takes the place of a plan saved there before.

        Args:
            path: The folder.

        Raises:
            SaveError: Part of the plan is the user's code: a problem that runs by plain autograd, hooks around its
                step, learned optimizer settings; or `path` is something else.
        """
        reads = {name: self.graph.reads(name) for name in self.graph.problems}
        write_plan(path, self._executor, self.program, reads, self._report, self.state_dict())

    def export_hypergradient(self, problem: str | Problem, path: str | os.PathLike[str]) -> None:
        """Write the hypergradient of a two-level program as machine code that C++ can call without Python.

        The folder holds three AOTInductor packages, compiled for the sizes of the present batches, whose inputs and
        outputs are contiguous tensors::

            point.pt2: inputs        -> direct gradient [N_u], cotangent v [N], residuals of the products ...
            hvp.pt2:   residuals, p  -> H p [N]
            mixed.pt2: residuals, q  -> (d2g/du dtheta)^T q [N_u]

        ``dF/du = direct - mixed(q)`` with ``H q = v``; vectors hold the parameters one after the other. The settings of
        the solver are metadata of point.pt2, which solves from zero: a warm start is left to the caller. Beside them
        lie hypergradient.json, which names inputs and parameters in order, and inputs.pt, the present inputs. Each
        package is checked against the plan's graphs before the folder takes its place. ``examples/cpp`` has a program
        that evaluates one.

        Args:
            problem: The upper problem or its name.
            path: The folder.

        Raises:
            KeyError: Unknown problem.
            SaveError: The program has another form (more levels, several lower problems, an estimator other than CG and
                Neumann, tasks, micro-batches, random numbers), nothing can be compiled here, or `path` is something
                else.
        """
        name = self._name(problem)
        export_hypergradient(path, self._executor, name)

    def explain(self) -> str:
        """Describe the program: problems, edges, what a step of each problem runs, what it costs, what was compiled."""
        return explain(self.graph, self.program, self._report)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write the problem graph, with estimators and costs, as an SVG picture.

        Args:
            path: Where to write; by convention it ends in ``.svg``.
        """
        write_svg(path, self.graph, self.program, islands=set(self._report.islands))

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: a plan reads and steps live objects, of which a copy would be torn off."""
        raise TypeError(
            "a Plan cannot be pickled or copied: it steps your live objects through compiled graphs. Keep its state by "
            "plan.state_dict(), which plan.load_state_dict(state) puts back, or write all of it by plan.save(folder), "
            "for mlopt.load(folder)"
        )

    def __repr__(self) -> str:
        """Name the problems and the steps made."""
        return f"Plan({', '.join(self.graph.problems)}; {self.num_steps} steps made)"
