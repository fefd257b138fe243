"""`Compiler`: from captured losses to verified derivatives, one problem and one kind of batch at a time.

`mlopt.compile` drives it once; a running plan comes back to it when a batch of a new kind has to be captured.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from mlopt.autodiff import FlatLayout, Recompute, SplitPolicy, TaskAxis
from mlopt.backends import AbstractBackend, EagerBackend, Lowering, background_backend
from mlopt.capture import LossGraph, ReadAttribute, capture_loss
from mlopt.capture.tasks import showing_task
from mlopt.capture.unchanged import unchanged_parameters
from mlopt.checks import all_reads, check_devices, check_estimators, check_optimizers, warn_about_structure
from mlopt.errors import (
    BackendWarning,
    CaptureError,
    DataError,
    GraphError,
    IslandWarning,
    LossError,
    MloptError,
    VerificationError,
    VerificationWarning,
)
from mlopt.graph import Graph
from mlopt.planner import ExecutionPlan, ProductNeeds, plan_program
from mlopt.runtime.data import Batch, BatchStream
from mlopt.runtime.derivatives import AbstractDerivatives, DerivativeGraphs, GraphDerivatives, differentiate
from mlopt.runtime.explain import CompileReport
from mlopt.runtime.guard import ModuleGuard
from mlopt.runtime.reference import AutogradDerivatives
from mlopt.runtime.reference_tasks import TaskAutogradDerivatives
from mlopt.runtime.rng import frozen_random_state, get_random_state
from mlopt.runtime.verify import find_disagreement
from mlopt.runtime.verify_step import find_step_disagreement, find_update_disagreement
from mlopt.runtime.warm_up import WarmUp
from mlopt.runtime.whole_step import add_updates

logger = logging.getLogger(__name__)

# Every capture takes a second or more, and its graphs run by torch calls: more of them than this are slower than plain
# autograd, which reads the present value every time.
_MAX_CHANGES = 8


@dataclasses.dataclass(frozen=True)
class Island:
    """A problem that runs by plain autograd, and what its loss reads and uses (as in `LossGraph`)."""

    problem: str
    reads: dict[str, tuple[str, ...]]
    used_own: frozenset[str]


class Compiler:
    """Holds what is compiled so far, and compiles more when a batch of a new kind comes.

    Graphs are kept per problem. A batch whose structure, sizes, strides and dtypes were seen before costs one look-up;
    one with new sizes reuses a graph whose shape guards accept it; only then is the loss captured again.
    """

    def __init__(
        self,
        graph: Graph,
        backend: AbstractBackend,
        *,
        verify: bool,
        strict: bool,
        residual_budget: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self._cache_dir = cache_dir
        self.graph = graph
        self.backend = backend
        self.verify = verify
        self.strict = strict
        self.layouts = {n: FlatLayout.of(n, p.trained_parameters(), p.tasks) for n, p in graph.problems.items()}
        check_devices(self.layouts)
        # Where every operation is a call of its own, nothing is computed again for free.
        compiles = all(backend.compiles_on(layout.device) for layout in self.layouts.values())
        self.split = SplitPolicy(Recompute.POINTWISE if compiles else Recompute.NOTHING, residual_budget)
        self.streams = {name: BatchStream(problem) for name, problem in graph.problems.items()}
        self.losses: dict[str, LossGraph | Island] = {}  # the first capture of each problem
        self.axes: dict[str, TaskAxis | None] = {}  # of the problems whose loss is evaluated for several tasks
        self.guard = ModuleGuard(graph.problems)
        self._first_modes = self.guard.modes()
        self.program: ExecutionPlan | None = None
        self.report = CompileReport(backend.name, self.layouts)
        self._known: dict[tuple[object, ...], AbstractDerivatives] = {}
        # The last batch of each problem, what was seen then, and what it led to: a key takes longer to hash.
        self._last: dict[str, tuple[Batch, tuple[bool, ...], tuple[object, ...], AbstractDerivatives]] = {}
        self._attributes: dict[str, tuple[ReadAttribute, ...]] = {}  # plain values that are constants of the graphs
        self._num_changes: collections.Counter[str] = collections.Counter()  # captures because such a value changed
        self._only_batches: dict[str, tuple[Any, ...]] = {}  # signatures, of problems whose batches are of one size
        self._ready: dict[str, DerivativeGraphs | Island] = {}  # differentiated on the first batch, not yet lowered

    def capture(self, name: str) -> None:
        """Capture a problem's loss on its first batch."""
        start = time.perf_counter()
        batch = self.streams[name].peek()
        self.axes[name] = self._find_axis(name, batch)
        self.losses[name] = self._capture(name, batch)
        self.report.seconds["capture"] += time.perf_counter() - start

    def plan(self) -> ExecutionPlan:
        """Find the problem graph in the captured losses, and plan and check the program."""
        problems = self.graph.problems
        self.graph.set_reads({n: all_reads(p, problems, self.losses[n].reads) for n, p in problems.items()})
        self.program = plan_program(self.graph)
        check_estimators(self.program, problems, self.layouts)
        check_optimizers(problems)
        warn_about_structure(self.program, self.graph, {n: loss.used_own for n, loss in self.losses.items()})
        return self.program

    def seen(self, name: str) -> list[str]:
        """Return the other problems whose tensors a problem's step may depend on, in order."""
        loss = self.losses[name]
        assert self.program is not None
        found = loss.seen_problems() | {*self.program[name].reads} if isinstance(loss, LossGraph) else None
        return [other for other in self.graph.problems if other != name and (found is None or other in found)]

    def differentiate(self, name: str) -> None:
        """Build the graphs of a problem for its first batch."""
        self._ready[name] = self._graphs(name, self.streams[name].peek())

    def lower(self, progress: Callable[[int, int], None]) -> None:
        """Do the slow part of lowering all graphs built so far at once."""
        start = time.perf_counter()
        graphs = [g for g in self._ready.values() if isinstance(g, DerivativeGraphs)]
        self.backend.prepare([module for g in graphs for module in g.modules().values()], progress)
        self.report.seconds["lower"] += time.perf_counter() - start

    def derive(self, name: str, batch: Batch, *, checked: bool = False) -> AbstractDerivatives:
        """Return derivatives of a problem's loss that are valid for this batch, compiling them if need be.

        Args:
            name: The problem.
            batch: The batch.
            checked: No code of the user's has run since the last call, so modules need not be looked at again.
        """
        modes, values = self._seen(name, checked=checked)
        last = self._last.get(name)
        if last is not None and last[0] is batch and last[1] == modes and last[2] == values:
            return last[3]
        key = (name, modes, values, *batch.signature())
        known = self._known.get(key)
        if known is None:
            known = self._reuse(key, batch) or self._build(name, batch)
            self._known[self._key(name, batch)] = known  # a capture may have found other values to look at
        else:
            self._last[name] = (batch, modes, values, known)
        return known

    def warm_up(self, latest: Callable[[str], Batch]) -> WarmUp | None:
        """Compile what runs by the eager backend in the background; None if nothing does.

        Args:
            latest: Gives a batch of a problem to compare on, without fetching one.
        """
        used = {id(d) for d in self._known.values()}
        eager = [
            (name, d)
            for name, captures in self.report.graphs.items()
            for d in captures
            if id(d) in used and all(x == Lowering("eager") for x in d.lowerings().values())
        ]
        if not eager:
            return None
        cancelled = threading.Event()
        backend = background_backend(self._cache_dir, cancelled)
        if isinstance(backend, str):
            warnings.warn(
                f"warm_up: nothing can be compiled: {backend}. Graphs run by the eager backend, with the same results",
                BackendWarning,
                stacklevel=4,
            )
            return None

        def accept(name: str, live: GraphDerivatives, compiled: GraphDerivatives) -> bool | None:
            batch = latest(name)
            if self._known.get(self._key(name, batch)) is not live:
                return None  # made for other batches than the present one
            if self.verify and not self._agrees(name, live, compiled, batch):
                return False
            self._verify_step(name, compiled, batch)
            return True

        def done(backend: AbstractBackend) -> None:
            backend.seal()
            self.backend = backend
            self.report.backend = backend.name

        joined = [(n, d, self._with_step(n, d.graphs, has_kernels=backend.has_kernels)) for n, d in eager]
        return WarmUp(joined, backend, cancelled, accept, done)

    def _with_step(self, name: str, graphs: DerivativeGraphs, *, has_kernels: bool) -> DerivativeGraphs:
        """Join the optimizer's update to the gradients, as far as that can be."""
        assert self.program is not None
        joined = add_updates(
            graphs,
            self.graph.problems[name],
            self.layouts[name],
            self.program[name],
            self.streams[name],
            has_kernels=has_kernels,
        )
        if isinstance(joined, str):
            self.report.eager_updates[name] = joined
            return graphs
        return joined

    def _agrees(self, name: str, live: GraphDerivatives, compiled: GraphDerivatives, batch: Batch) -> bool:
        assert self.program is not None
        problems = self.graph.problems
        difference = find_disagreement(
            compiled, live, problems[name], problems, self.layouts[name], self.program.needs[name], batch
        )
        if difference is None:
            return True
        message = f"problem {name!r}: what was compiled in the background disagrees with its eager graphs: {difference}"
        if self.strict:
            raise VerificationError(f"{message}; strict=True was given. compile(..., strict=False) keeps them")
        warnings.warn(f"{message}; they go on running eagerly", VerificationWarning, stacklevel=5)
        return False

    def _seen(self, name: str, *, checked: bool) -> tuple[tuple[bool, ...], tuple[object, ...]]:
        """Return the training modes, and the plain values that the loss has read, as they are now."""
        values = tuple([a.current() for a in self._attributes.get(name, ())])
        return self.guard.last if checked else self.guard.modes(), values

    def _key(self, name: str, batch: Batch) -> tuple[object, ...]:
        return (name, *self._seen(name, checked=False), *batch.signature())

    def _reuse(self, key: tuple[Any, ...], batch: Batch) -> AbstractDerivatives | None:
        kind = _kind(key)
        return next((d for other, d in self._known.items() if _kind(other) == kind and d.accepts(batch)), None)

    def _build(self, name: str, batch: Batch) -> AbstractDerivatives:
        assert self.program is not None, "derivatives are built for a planned program"
        graphs = self._ready.pop(name, None) or self._graphs(name, batch)
        if isinstance(graphs, Island):
            return self._eager(name, batch, self.program.needs[name])
        start = time.perf_counter()
        derivatives = GraphDerivatives(graphs, self.backend)
        self.report.seconds["lower"] += time.perf_counter() - start
        self.report.add(name, derivatives)
        if not self.verify:
            return derivatives
        start = time.perf_counter()
        verified = self._verified(name, derivatives, batch)
        self.report.seconds["verify"] += time.perf_counter() - start
        return verified

    def _graphs(self, name: str, batch: Batch) -> DerivativeGraphs | Island:
        assert self.program is not None
        first, needs = self.losses[name], self.program.needs[name]
        loss = first
        if isinstance(first, LossGraph) and not self._is_captured(first, batch):
            changed = [a for a in first.attributes if a.value != a.current()]
            loss = self._capture_again(name, batch, changed[0]) if changed else self._capture(name, batch)
        if loss.reads != first.reads:
            raise GraphError(
                f"problem {name!r}: on a batch of another kind, or in another training mode, its loss reads "
                f"{_names(loss)}; when the plan was made it read {_names(first)}. The problem graph must not change"
            )
        if isinstance(loss, Island):
            return loss
        start = time.perf_counter()
        graphs = self._differentiate(loss, batch, needs)
        if isinstance(graphs, DerivativeGraphs) and self.backend.compiles_on(self.layouts[name].device):
            graphs = self._with_step(name, graphs, has_kernels=self.backend.has_kernels)
        self.report.seconds["differentiate"] += time.perf_counter() - start
        return graphs

    def _differentiate(self, loss: LossGraph, batch: Batch, needs: ProductNeeds) -> DerivativeGraphs | Island:
        axis = self.axes[loss.problem]
        try:
            return differentiate(loss, batch, self.layouts, needs, axis, self.split)
        except LossError:  # a loss that the estimator cannot be used with
            raise
        except Exception:
            logger.debug("differentiating %s with free sizes failed; trying fixed ones", loss.problem, exc_info=True)
        try:  # some operations (recurrent ones on the CPU) have no derivative for symbolic sizes
            fixed = dataclasses.replace(loss, dynamic_dims=tuple(frozenset[int]() for _ in loss.inputs))
            return differentiate(fixed, batch, self.layouts, needs, axis, self.split)
        except Exception as error:
            reason = (
                f"problem {loss.problem!r}: its loss was captured but could not be differentiated as a graph\n"
                f"  {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
            if self.strict:
                raise CaptureError(reason) from error
            return self._island(loss.problem, batch, reason, None)

    def _is_captured(self, loss: LossGraph, batch: Batch) -> bool:
        if self.axes[loss.problem] is not None:
            batch = batch.of_task(0)
        return (
            loss.batch_spec == batch.spec
            and self._first_modes == self.guard.modes()
            and all(a.value == a.current() for a in loss.attributes)
            and loss.guard.accepts(batch.tensors)
        )

    def _capture(self, name: str, batch: Batch) -> LossGraph | Island:
        problems = self.graph.problems
        for problem in problems.values():
            problem.bind(problems)  # a problem may also be part of another graph
        one = batch if self.axes[name] is None else batch.of_task(0)
        # Where all batches are of one size, it is known; should another one come all the same, it is captured for any
        # number of samples.
        fixed = self.streams[name].has_one_size and batch.signature() == self._only_batches.setdefault(
            name, batch.signature()
        )
        try:
            with showing_task(problems.values(), 0), unchanged_parameters(name, problems, values=False):
                loss = capture_loss(
                    problems[name], list(problems.values()), one.tensors, one.spec, free_sizes=not fixed
                )
        except CaptureError as error:
            if self.strict:
                raise
            return self._island(name, batch, str(error), error)
        known = self._attributes.get(name, ())
        seen = {(id(a.owner), a.name) for a in known}
        self._attributes[name] = known + tuple(a for a in loss.attributes if (id(a.owner), a.name) not in seen)
        if not self.verify:
            return loss
        missed = missing_reads(self._eager_reads(name, batch), {**loss.reads, name: tuple(loss.used_own)})
        if missed:
            reason = f"problem {name!r}: capture lost the gradient with respect to {missed}"
            if self.strict:
                raise VerificationError(f"{reason}; strict=True was given. compile(..., strict=False) uses autograd")
            return self._island(name, batch, reason, None)
        return loss

    def _capture_again(self, name: str, batch: Batch, changed: ReadAttribute) -> LossGraph | Island:
        """Capture a loss with another value of an attribute, unless it changes so often that this would never end."""
        self._num_changes[name] += 1
        if self._num_changes[name] <= _MAX_CHANGES:
            return self._capture(name, batch)
        reason = (
            f"problem {name!r}: its training_step was captured {_MAX_CHANGES + 1} times, because it reads "
            f"{changed.describe([*self.graph.problems.values()])}, which keeps changing; hold it in a buffer of the "
            "module (register_buffer) and write that in place to have it compiled once"
        )
        if self.strict:
            raise CaptureError(reason)
        self.losses[name] = island = self._island(name, batch, reason, None)
        self._attributes[name] = ()
        self._known = {key: known for key, known in self._known.items() if key[0] != name}
        self._last.pop(name, None)
        return island

    def _island(self, name: str, batch: Batch, reason: str, error: CaptureError | None) -> Island:
        try:
            with unchanged_parameters(name, self.graph.problems):
                reads = self._eager_reads(name, batch)
        except MloptError:
            raise
        except Exception as failure:  # the code itself fails; capture was not at fault
            raise (error or CaptureError(reason)) from failure
        warnings.warn(
            f"{reason}\n  This problem runs by plain autograd on its training_step (an eager island), with the same "
            "results; everything else is compiled. strict=True makes this an error.",
            IslandWarning,
            stacklevel=5,
        )
        self.report.islands[name] = reason
        own = reads.pop(name, ())
        return Island(name, reads, frozenset(own))

    def _eager(self, name: str, batch: Batch, needs: ProductNeeds) -> AbstractDerivatives:
        derivatives = self.autograd(name, needs)
        if needs.hvp and needs.curvature != "hessian":  # not every loss has the others: say so now
            with frozen_random_state(get_random_state(self.layouts[name].device)):
                derivatives.linearize(batch)
        return derivatives

    def _find_axis(self, name: str, batch: Batch) -> TaskAxis | None:
        """Find out whether a problem's loss is evaluated for several tasks: its own, or those of a problem it reads."""
        problems = self.graph.problems
        with_tasks = frozenset(n for n, p in problems.items() if p.tasks)
        if not with_tasks:
            return None
        num_tasks = next(p.tasks for p in problems.values() if p.tasks)
        axis = TaskAxis(num_tasks, name, with_tasks)
        wrong = [tuple(t.shape) for t in batch.tensors if t.ndim == 0 or t.shape[0] != num_tasks]
        if problems[name].tasks:
            if wrong:
                raise DataError(
                    f"problem {name!r}: with tasks={num_tasks} every tensor of its batch must have a leading axis of "
                    f"{num_tasks}, got the shape {wrong[0]}"
                )
            return axis
        if wrong:
            return None
        try:  # whose parameters the loss reads shows only when it runs
            reads = TaskAutogradDerivatives(problems[name], problems, self.layouts, ProductNeeds(), axis).reads(batch)
        except Exception:
            logger.debug("problem %s: its loss does not run on one task", name, exc_info=True)
            return None
        return axis if with_tasks.intersection(reads) else None

    def autograd(self, name: str, needs: ProductNeeds) -> AutogradDerivatives | TaskAutogradDerivatives:
        """Return a problem's derivatives by plain autograd."""
        problem, problems, axis = self.graph.problems[name], self.graph.problems, self.axes[name]
        if axis is not None:
            return TaskAutogradDerivatives(problem, problems, self.layouts, needs, axis)
        return AutogradDerivatives(problem, problems, self.layouts, needs)

    def _eager_reads(self, name: str, batch: Batch) -> dict[str, tuple[str, ...]]:
        with frozen_random_state(get_random_state(self.layouts[name].device)):
            return self.autograd(name, ProductNeeds()).reads(batch)

    def _verified(self, name: str, derivatives: GraphDerivatives, batch: Batch) -> AbstractDerivatives:
        assert self.program is not None
        problem, problems, needs = self.graph.problems[name], self.graph.problems, self.program.needs[name]
        reference: AbstractDerivatives = self.autograd(name, needs)
        if self.axes[name] is not None and derivatives.is_random:
            # What can be checked is that the backend does what the graphs say.
            self.report.unverified[name] = "its tasks draw their random numbers in another order than a loop over them"
            reference = GraphDerivatives(derivatives.graphs.without_updates(), EagerBackend())
        difference = find_disagreement(derivatives, reference, problem, problems, self.layouts[name], needs, batch)
        if difference is None:
            self._verify_step(name, derivatives, batch)
            return derivatives
        message = f"problem {name!r}: a compiled derivative disagrees with plain autograd: {difference}"
        if self.strict:
            raise VerificationError(message + "; strict=True was given. compile(..., strict=False) uses plain autograd")
        if any(lowering.backend != "eager" for lowering in derivatives.lowerings().values()):
            # Is the graph wrong, or what the backend made of it? Torch calls on a right graph beat plain autograd.
            eager = GraphDerivatives(derivatives.graphs.without_updates(), EagerBackend())
            layout = self.layouts[name]
            if find_disagreement(eager, reference, problem, problems, layout, needs, batch) is None:
                message += f". The graphs are right and the {self.backend.name} backend is not: they run eagerly"
                warnings.warn(message, VerificationWarning, stacklevel=5)
                self.report.replace(name, derivatives, eager)
                return eager
        warnings.warn(message + "; this problem runs by plain autograd", VerificationWarning, stacklevel=5)
        self.report.islands[name] = message
        return reference

    def _verify_step(self, name: str, derivatives: GraphDerivatives, batch: Batch) -> None:
        """Compare what was compiled of the optimizer with it, on copies; it is not used if they disagree."""
        compiled = derivatives.step or derivatives.update
        if compiled is None:
            return
        find = find_step_disagreement if derivatives.step is not None else find_update_disagreement
        difference = find(derivatives, self.graph.problems[name], self.layouts[name], batch)
        if difference is None:
            return
        message = f"problem {name!r}: its compiled step disagrees with its optimizer's own: {difference}"
        if self.strict:
            raise VerificationError(message + "; strict=True was given. compile(..., strict=False) steps the optimizer")
        warnings.warn(message + "; the optimizer is stepped by itself", VerificationWarning, stacklevel=6)
        compiled.give_up(message)
        self.report.eager_updates[name] = message


def _kind(key: tuple[Any, ...]) -> tuple[object, ...]:
    """Return what two uses must share for one graph to serve both: all of their key but sizes and strides."""
    name, modes, values, spec, *tensors = key
    return (name, modes, values, spec, *(dtype for _, _, dtype in tensors))


def missing_reads(found: dict[str, tuple[str, ...]], captured: dict[str, tuple[str, ...]]) -> str:
    """Return, as text, what plain autograd has a gradient for and the captured loss does not depend on."""
    return ", ".join(
        f"{problem}.{name}"
        for problem, names in found.items()
        for name in names
        if name not in captured.get(problem, ())
    )


def _names(loss: LossGraph | Island) -> str:
    return ", ".join(f"{p}.{n}" for p, names in loss.reads.items() for n in names) or "no other problem"
