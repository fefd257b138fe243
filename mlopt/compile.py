"""The main path of the compiler: start reading here.

``compile`` captures every loss (`mlopt.capture`), finds the problem graph in them (`mlopt.graph`), plans what each
problem's step needs (`mlopt.planner`), differentiates just that (`mlopt.autodiff`, which also runs `mlopt.passes`),
lowers the graphs (`mlopt.backends`), checks them against eager autograd, and hands back a `Plan` (`mlopt.runtime`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from typing import Any

import torch
from tqdm import tqdm

from mlopt.autodiff import FlatLayout
from mlopt.backends import AbstractBackend, get_backend
from mlopt.capture import LossGraph, capture_loss
from mlopt.errors import (
    CaptureError,
    GraphError,
    IslandWarning,
    LossError,
    MloptError,
    ProblemError,
    StructureWarning,
    VerificationError,
    VerificationWarning,
)
from mlopt.graph import Graph
from mlopt.planner import ExecutionPlan, ProductNeeds, plan_program
from mlopt.runtime.data import Batch, BatchStream
from mlopt.runtime.derivatives import AbstractDerivatives, DerivativeGraphs, GraphDerivatives, differentiate
from mlopt.runtime.execute import Executor
from mlopt.runtime.explain import CompileReport
from mlopt.runtime.guard import ModuleGuard
from mlopt.runtime.plan import Plan
from mlopt.runtime.reference import AutogradDerivatives
from mlopt.runtime.rng import frozen_random_state, get_random_state
from mlopt.runtime.verify import find_disagreement

logger = logging.getLogger(__name__)


def compile(  # noqa: A001 - the name users know from torch.compile and re.compile
    graph: Graph, *, backend: str = "auto", verify: bool = True, strict: bool = False, progress: bool = True
) -> Plan:
    """Compile a multilevel program.

    Runs every `training_step` a fixed number of times (once to capture it; with ``verify``, up to four times more, on
    the first batch); the steps that follow run the captured graphs. The first batch of each problem's data is fetched
    and is the one its first step uses. No parameter, buffer, optimizer or random generator is changed.

    Args:
        graph: The problems.
        backend: What runs the graphs: ``"eager"`` (torch calls) or ``"auto"`` (the best one built).
        verify: Compare every derivative with plain autograd on the first batch. Where they disagree, that problem's
            derivatives are taken by plain autograd from then on, and a `VerificationWarning` says so.
        strict: Raise instead of falling back.
        progress: Show a progress bar on a terminal.

    Returns:
        The compiled program.

    Raises:
        GraphError: Declared dependencies differ from what the losses read.
        ProblemError: The parameters of one program lie on different devices.
        LossError: A `training_step` returns no differentiable scalar, or a loss without the structure that the
            curvature of its estimator needs.
        CaptureError: A `training_step` cannot be captured (with ``strict``), or fails by itself.
        DataError: A problem's data is empty.
        VerificationError: With ``strict``, a derivative disagrees with plain autograd.
    """
    compiler = Compiler(graph, get_backend(backend), verify=verify, strict=strict)
    with tqdm(total=2 * len(graph.problems), desc="compile", leave=False, disable=None if progress else True) as bar:
        for name in graph.problems:
            bar.set_postfix_str(f"capture {name}")
            compiler.capture(name)
            bar.update()
        graph.set_reads({name: loss.reads for name, loss in compiler.losses.items()})
        compiler.program = plan_program(graph)
        compiler.warn_about_unreached()
        for name in graph.problems:
            bar.set_postfix_str(f"differentiate and lower {name}")
            compiler.derive(name, compiler.streams[name].peek())
            bar.update()
    executor = Executor(compiler.program, graph.problems, compiler.layouts, compiler.derive, compiler.streams)
    return Plan(graph, compiler.program, executor, compiler.report)


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

    def __init__(self, graph: Graph, backend: AbstractBackend, *, verify: bool, strict: bool) -> None:
        self.graph = graph
        self.backend = backend
        self.verify = verify
        self.strict = strict
        self.layouts = {n: FlatLayout.of(n, p.trained_parameters()) for n, p in graph.problems.items()}
        _check_devices(self.layouts)
        self.streams = {name: BatchStream(problem) for name, problem in graph.problems.items()}
        self.losses: dict[str, LossGraph | Island] = {}  # the first capture of each problem
        self.guard = ModuleGuard(graph.problems)
        self._first_modes = self.guard.modes()
        self.program: ExecutionPlan | None = None
        self.report = CompileReport(backend.name, self.layouts)
        self._known: dict[tuple[object, ...], AbstractDerivatives] = {}

    def capture(self, name: str) -> None:
        """Capture a problem's loss on its first batch."""
        start = time.perf_counter()
        self.losses[name] = self._capture(name, self.streams[name].peek())
        self.report.seconds["capture"] += time.perf_counter() - start

    def warn_about_unreached(self) -> None:
        """Warn of a problem whose hypergradient is zero by structure: no loss depends on its parameters."""
        assert self.program is not None
        for name, loss in self.losses.items():
            trained = self.graph.problems[name].trained_parameters()
            if not (loss.used_own | self.program[name].reached).intersection(trained):
                warnings.warn(
                    f"problem {name!r}: its hypergradient is zero. Neither its own loss nor the loss of a problem "
                    f"below it depends on its parameters ({', '.join(trained)}): read them as self.{name}(...) in the "
                    "training_step that they are to shape, without detach or no_grad",
                    StructureWarning,
                    stacklevel=3,
                )

    def derive(self, name: str, batch: Batch) -> AbstractDerivatives:
        """Return derivatives of a problem's loss that are valid for this batch, compiling them if need be."""
        key = (name, self.guard.modes(), *batch.signature())
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._reuse(key, batch) or self._build(name, batch)
        return known

    def _reuse(self, key: tuple[Any, ...], batch: Batch) -> AbstractDerivatives | None:
        kind = _kind(key)
        return next((d for other, d in self._known.items() if _kind(other) == kind and d.accepts(batch)), None)

    def _build(self, name: str, batch: Batch) -> AbstractDerivatives:
        assert self.program is not None, "derivatives are built for a planned program"
        first, needs = self.losses[name], self.program.needs[name]
        loss = first
        if isinstance(first, LossGraph) and not self._is_captured(first, batch):
            loss = self._capture(name, batch)
        if loss.reads != first.reads:
            raise GraphError(
                f"problem {name!r}: on a batch of another kind, or in another training mode, its loss reads "
                f"{_names(loss)}; when the plan was made it read {_names(first)}. The problem graph must not change"
            )
        if isinstance(loss, Island):
            return self._eager(name, batch, needs)
        start = time.perf_counter()
        graphs = self._differentiate(loss, batch, needs)
        if isinstance(graphs, Island):
            return self._eager(name, batch, needs)
        derivatives: AbstractDerivatives = GraphDerivatives(graphs, self.backend)
        self.report.seconds["differentiate and lower"] += time.perf_counter() - start
        self.report.add(name, graphs)
        if self.verify:
            start = time.perf_counter()
            derivatives = self._verified(name, derivatives, batch)
            self.report.seconds["verify"] += time.perf_counter() - start
        return derivatives

    def _differentiate(self, loss: LossGraph, batch: Batch, needs: ProductNeeds) -> DerivativeGraphs | Island:
        try:
            return differentiate(loss, batch, self.layouts, needs)
        except LossError:  # a loss that the estimator cannot be used with
            raise
        except Exception:
            logger.debug("differentiating %s with free sizes failed; trying fixed ones", loss.problem, exc_info=True)
        try:  # some operations (recurrent ones on the CPU) have no derivative for symbolic sizes
            fixed = dataclasses.replace(loss, dynamic_dims=tuple(frozenset[int]() for _ in loss.inputs))
            return differentiate(fixed, batch, self.layouts, needs)
        except Exception as error:
            reason = (
                f"problem {loss.problem!r}: its loss was captured but could not be differentiated as a graph\n"
                f"  {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
            if self.strict:
                raise CaptureError(reason) from error
            return self._island(loss.problem, batch, reason, None)

    def _is_captured(self, loss: LossGraph, batch: Batch) -> bool:
        return (
            loss.batch_spec == batch.spec
            and self._first_modes == self.guard.modes()
            and loss.guard.accepts(batch.tensors)
        )

    def _capture(self, name: str, batch: Batch) -> LossGraph | Island:
        problems = self.graph.problems
        for problem in problems.values():
            problem.bind(problems)  # a problem may also be part of another graph
        try:
            loss = capture_loss(problems[name], list(problems.values()), batch.tensors, batch.spec)
        except CaptureError as error:
            if self.strict:
                raise
            return self._island(name, batch, str(error), error)
        if not self.verify:
            return loss
        missed = missing_reads(self._eager_reads(name, batch), {**loss.reads, name: tuple(loss.used_own)})
        if missed:
            reason = f"problem {name!r}: capture lost the gradient with respect to {missed}"
            if self.strict:
                raise VerificationError(f"{reason}; strict=True was given. compile(..., strict=False) uses autograd")
            return self._island(name, batch, reason, None)
        return loss

    def _island(self, name: str, batch: Batch, reason: str, error: CaptureError | None) -> Island:
        try:
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
        derivatives = AutogradDerivatives(self.graph.problems[name], self.graph.problems, self.layouts, needs)
        if needs.hvp and needs.curvature != "hessian":  # not every loss has the others: say so now
            with frozen_random_state(get_random_state(self.layouts[name].device)):
                derivatives.linearize(batch)
        return derivatives

    def _eager_reads(self, name: str, batch: Batch) -> dict[str, tuple[str, ...]]:
        problems = self.graph.problems
        eager = AutogradDerivatives(problems[name], problems, self.layouts, ProductNeeds())
        with frozen_random_state(get_random_state(self.layouts[name].device)):
            return eager.reads(batch)

    def _verified(self, name: str, derivatives: AbstractDerivatives, batch: Batch) -> AbstractDerivatives:
        assert self.program is not None
        problem, problems, needs = self.graph.problems[name], self.graph.problems, self.program.needs[name]
        difference = find_disagreement(derivatives, problem, problems, self.layouts, needs, batch)
        if difference is None:
            return derivatives
        message = f"problem {name!r}: a compiled derivative disagrees with plain autograd: {difference}"
        if self.strict:
            raise VerificationError(message + "; strict=True was given. compile(..., strict=False) uses plain autograd")
        warnings.warn(message + "; this problem runs by plain autograd", VerificationWarning, stacklevel=5)
        self.report.islands[name] = message
        return AutogradDerivatives(problem, problems, self.layouts, needs)


def _kind(key: tuple[Any, ...]) -> tuple[object, ...]:
    """Return what two uses must share for one graph to serve both: all of their key but sizes and strides."""
    name, modes, spec, *tensors = key
    return (name, modes, spec, *(dtype for _, _, dtype in tensors))


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


def _check_devices(layouts: dict[str, FlatLayout]) -> None:
    devices: dict[torch.device, str] = {}
    for name, layout in layouts.items():
        devices.setdefault(layout.device, name)
    if len(devices) > 1:
        (a, first), (b, second) = list(devices.items())[:2]
        raise ProblemError(
            f"problem {second!r} has its parameters on {b}, problem {first!r} on {a}; move all modules to one device "
            "before their optimizers are made"
        )
