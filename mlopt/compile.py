"""The main path of the compiler: start reading here.

``compile`` captures every loss (`mlopt.capture`), finds the problem graph in them (`mlopt.graph`), plans what each
problem's step needs (`mlopt.planner`), differentiates just that (`mlopt.autodiff`, which also runs `mlopt.passes`),
lowers the graphs (`mlopt.backends`), checks them against eager autograd, and hands back a `Plan` (`mlopt.runtime`).
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from tqdm import tqdm

from mlopt.autodiff import FlatLayout
from mlopt.backends import AbstractBackend, get_backend
from mlopt.capture import LossGraph, capture_loss
from mlopt.errors import CaptureError, ProblemError, VerificationError, VerificationWarning
from mlopt.graph import Graph
from mlopt.planner import ExecutionPlan, plan_program
from mlopt.runtime.data import Batch, BatchStream
from mlopt.runtime.derivatives import AbstractDerivatives, GraphDerivatives, differentiate
from mlopt.runtime.execute import Executor
from mlopt.runtime.explain import CompileReport
from mlopt.runtime.plan import Plan
from mlopt.runtime.reference import AutogradDerivatives
from mlopt.runtime.verify import find_disagreement


def compile(  # noqa: A001 - the name users know from torch.compile and re.compile
    graph: Graph, *, backend: str = "auto", verify: bool = True, strict: bool = False, progress: bool = True
) -> Plan:
    """Compile a multilevel program.

    Runs every `training_step` a fixed number of times (once to capture it; with ``verify``, up to three times more, on
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
        LossError: A `training_step` returns no differentiable scalar.
        CaptureError: A `training_step` cannot be captured.
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
        for name in graph.problems:
            bar.set_postfix_str(f"differentiate and lower {name}")
            compiler.derive(name, compiler.streams[name].peek())
            bar.update()
    executor = Executor(compiler.program, graph.problems, compiler.layouts, compiler.derive, compiler.streams)
    return Plan(graph, compiler.program, executor, compiler.report)


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
        self.losses: dict[str, LossGraph] = {}  # the first capture of each problem
        self.program: ExecutionPlan | None = None
        self.report = CompileReport(backend.name, self.layouts)
        self._known: dict[tuple[object, ...], AbstractDerivatives] = {}

    def capture(self, name: str) -> None:
        """Capture a problem's loss on its first batch."""
        start = time.perf_counter()
        self.losses[name] = self._capture(name, self.streams[name].peek())
        self.report.seconds["capture"] += time.perf_counter() - start

    def derive(self, name: str, batch: Batch) -> AbstractDerivatives:
        """Return derivatives of a problem's loss that are valid for this batch, compiling them if need be."""
        key = (name, *batch.signature())
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._reuse(name, batch) or self._build(name, batch)
        return known

    def _reuse(self, name: str, batch: Batch) -> AbstractDerivatives | None:
        kind = _kind(name, batch.signature())
        return next((d for key, d in self._known.items() if _kind(key[0], key[1:]) == kind and d.accepts(batch)), None)

    def _build(self, name: str, batch: Batch) -> AbstractDerivatives:
        assert self.program is not None, "derivatives are built for a planned program"
        first = self.losses[name]
        loss = first if first.batch_spec == batch.spec and first.guard.accepts(batch.tensors) else None
        loss = loss or self._capture(name, batch)
        if loss.reads != first.reads:
            raise CaptureError(
                f"problem {name!r}: on a batch of another kind its loss reads {_names(loss)}, on the first batch it "
                f"read {_names(first)}; the problem graph must not depend on the batch"
            )
        start = time.perf_counter()
        needs = self.program.needs[name]
        derivatives: AbstractDerivatives
        graphs = differentiate(loss, batch, self.layouts, needs)
        derivatives = GraphDerivatives(graphs, self.backend)
        self.report.seconds["differentiate and lower"] += time.perf_counter() - start
        self.report.add(name, graphs)
        if self.verify:
            start = time.perf_counter()
            derivatives = self._verified(name, derivatives, batch)
            self.report.seconds["verify"] += time.perf_counter() - start
        return derivatives

    def _capture(self, name: str, batch: Batch) -> LossGraph:
        problems = list(self.graph.problems.values())
        for problem in problems:
            problem.bind(self.graph.problems)  # a problem may also be part of another graph
        return capture_loss(self.graph.problems[name], problems, batch.tensors, batch.spec)

    def _verified(self, name: str, derivatives: AbstractDerivatives, batch: Batch) -> AbstractDerivatives:
        assert self.program is not None
        problem, layout, needs = self.graph.problems[name], self.layouts[name], self.program.needs[name]
        reference = AutogradDerivatives(problem, self.graph.problems, self.layouts, needs)
        own = layout.flatten([p.detach() for p in problem.trained_parameters().values()])
        difference = find_disagreement(derivatives, reference, batch, layout, own, needs)
        if difference is None:
            return derivatives
        message = f"problem {name!r}: a compiled derivative disagrees with plain autograd: {difference}"
        if self.strict:
            raise VerificationError(message + "; strict=True was given. compile(..., strict=False) uses plain autograd")
        warnings.warn(message + "; this problem runs by plain autograd", VerificationWarning, stacklevel=5)
        self.report.fallbacks[name] = difference
        return reference


def _kind(name: object, signature: tuple[Any, ...]) -> tuple[object, ...]:
    """Return what two batches must share for one graph to serve both: all of a signature but sizes and strides."""
    spec, *tensors = signature
    return (name, spec, *(dtype for _, _, dtype in tensors))


def _names(loss: LossGraph) -> str:
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
