"""`load`: a plan from a folder."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlopt.autodiff import FlatLayout
from mlopt.backends import AbstractBackend, get_backend
from mlopt.errors import BackendWarning, CaptureError, SaveError, StateError
from mlopt.graph import Graph
from mlopt.planner import ProductNeeds
from mlopt.problem import Problem
from mlopt.runtime.data import Batch, BatchStream
from mlopt.runtime.derivatives import AbstractDerivatives, DerivativeGraphs, GraphDerivatives
from mlopt.runtime.execute import Executor
from mlopt.runtime.explain import CompileReport
from mlopt.runtime.guard import ModuleGuard
from mlopt.runtime.plan import Plan
from mlopt.runtime.plan_state import restore
from mlopt.runtime.saving import graphs
from mlopt.runtime.saving.archive import check, is_of_this_machine
from mlopt.runtime.saving.problems import LoadedProblem, rebuild
from mlopt.runtime.saving.write import live_tensors
from mlopt.runtime.whole_step import add_updates

Captures = Mapping[str, list[tuple[DerivativeGraphs, tuple[Any, ...]]]]


def load(
    path: str | os.PathLike[str],
    *,
    data: Mapping[str, Iterable[Any]] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    optimizers: Mapping[str, Callable[[nn.Module], torch.optim.Optimizer]] | None = None,
    schedulers: Mapping[str, Callable[[torch.optim.Optimizer], Any]] | None = None,
    backend: str | None = None,
) -> Plan:
    """Make a plan of a folder that `Plan.save` wrote, without capturing or compiling anything.

    The classes of the problems are not needed. Parameters, buffers, optimizers, counters and the batches of the last
    steps are as they were saved, so `Plan.hypergradient` returns the same bits; data begins anew, and random generators
    are left alone. (To continue a run bit for bit, save `Plan.state_dict` and hand it to `Plan.load_state_dict`.)

    A saved plan holds pickles and machine code, which can do anything when they are loaded: load only what you trust.

    Args:
        path: The folder.
        data: Problem -> its data. A problem without it can be differentiated on batches that are handed to
            `Plan.hypergradient`, and cannot step.
        modules: Problem -> a module with the parameters and buffers it had, to get its values; default: a module that
            only holds them.
        optimizers: Problem -> a function of its module that makes its optimizer; needed for those not of `torch.optim`.
        schedulers: Problem -> a function of its optimizer that makes its scheduler; needed where it had one.
        backend: See `mlopt.compile`; default: that of the saved plan. Packages made for another processor are not
            used: those graphs run by torch calls, and a `BackendWarning` says so.

    Returns:
        The plan. Batches of a kind for which there was no graph are an error; so is `Plan.check`, which needs the
        code of the losses.

    Raises:
        SaveError: The folder is no saved plan, is damaged, was made by another version of torch or Python, or something
            is needed that was not handed over.
    """
    manifest = check(path)
    folder = Path(path)
    described = json.loads((folder / "problems.json").read_text())
    data, modules, optimizers, schedulers = data or {}, modules or {}, optimizers or {}, schedulers or {}
    given = {"data": data, "modules": modules, "optimizers": optimizers, "schedulers": schedulers}
    names = [d["name"] for d in described]
    for argument, mapping in given.items():
        for name in mapping:
            if name not in names:
                raise SaveError(f"load, argument `{argument}`: there is no problem {name!r} ({', '.join(names)})")
    problems = [
        rebuild(
            d,
            hypergradient=None,
            data=data.get(d["name"]),
            module=modules.get(d["name"]),
            optimizer=optimizers.get(d["name"]),
            scheduler=schedulers.get(d["name"]),
        )
        for d in described
    ]
    by_name = {p.name: p for p in problems}
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    try:
        content = graphs.loads((folder / "program.pkl").read_bytes(), live_tensors(by_name))
    except KeyError as error:
        missing = str(error.args[0]).replace("|", ": ")
        raise SaveError(f"a module that was handed over lacks the tensor {missing}") from error
    for problem in problems:
        problem.hypergradient = content["hypergradients"][problem.name]
    name = backend or content["backend"]
    lowering = get_backend(name, folder)
    lowering.seal()  # nothing is compiled
    if lowering.compiles and not is_of_this_machine(manifest):
        warnings.warn(
            f"{folder} was saved on a machine with another processor: its compiled graphs run by torch calls here, "
            "with the same results. Compile and save it on this kind of machine",
            BackendWarning,
            stacklevel=2,
        )
    graph = Graph(problems)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there was to be said was said when it was compiled
        graph.set_reads(content["reads"])
    return _plan(graph, content, lowering, state)


def _plan(graph: Graph, content: Mapping[str, Any], backend: AbstractBackend, state: Mapping[str, Any]) -> Plan:
    problems: dict[str, Problem] = graph.problems
    layouts = {name: FlatLayout.of(name, p.trained_parameters(), p.tasks) for name, p in problems.items()}
    report = CompileReport(backend.name, layouts)
    saved = _SavedDerivatives(problems)
    streams = {name: BatchStream(problem) for name, problem in problems.items()}
    executor = Executor(content["program"], problems, layouts, saved.derive, streams, seen=content["seen"])
    plan = Plan(graph, content["program"], executor, report, _no_reference, lambda latest: None)
    plan.num_steps, plan._unfinished = restore(executor, state, surroundings=False)
    start = time.perf_counter()  # from here on optimizers have their settings, which their steps are captured with
    saved.lower(content, layouts, streams, backend, report)
    report.seconds["lower"] = time.perf_counter() - start
    return plan


def _no_reference(name: str, needs: ProductNeeds) -> AbstractDerivatives:
    raise StateError(
        f"problem {name!r} belongs to a loaded plan, which has no training_step to compare with; call check() on the "
        "plan that mlopt.compile returned"
    )


class _SavedDerivatives:
    """Finds the graphs for a batch among those that were saved."""

    def __init__(self, problems: Mapping[str, Problem]) -> None:
        self._problems = problems
        self._guard = ModuleGuard(problems)
        self._known: dict[tuple[Any, ...], AbstractDerivatives] = {}
        self._captures: dict[str, list[tuple[GraphDerivatives, tuple[Any, ...]]]] = {}

    def lower(
        self,
        content: Mapping[str, Any],
        layouts: Mapping[str, FlatLayout],
        streams: Mapping[str, BatchStream],
        backend: AbstractBackend,
        report: CompileReport,
    ) -> None:
        """Lower the graphs; those of whole steps are made again, of the optimizers that there are."""
        captures: Captures = content["captures"]
        for name, found in captures.items():
            self._captures[name] = []
            for made, signature in found:
                joined: DerivativeGraphs | str = made
                if backend.compiles_on(layouts[name].device):
                    planned = content["program"][name]
                    joined = add_updates(
                        made,
                        self._problems[name],
                        layouts[name],
                        planned,
                        streams[name],
                        has_kernels=backend.has_kernels,
                    )
                if isinstance(joined, str):
                    report.eager_updates[name] = joined
                derivatives = GraphDerivatives(made if isinstance(joined, str) else joined, backend)
                report.add(name, derivatives)
                self._captures[name].append((derivatives, signature))

    def derive(self, name: str, batch: Batch, *, checked: bool = False) -> AbstractDerivatives:
        """Return derivatives that are valid for a batch; see `mlopt.compiler.Compiler.derive`.

        Raises:
            CaptureError: There are none.
        """
        if not checked:
            self._guard.modes()
        signature = batch.signature()
        key = (name, *signature)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._find(name, batch, signature)
        return known

    def _find(self, name: str, batch: Batch, signature: tuple[Any, ...]) -> AbstractDerivatives:
        spec, *tensors = signature
        for derivatives, (saved_spec, *saved) in self._captures[name]:
            same_kind = spec == saved_spec and [t[2] for t in tensors] == [t[2] for t in saved]
            if same_kind and (tensors == saved or derivatives.accepts(batch)):
                return derivatives
        raise CaptureError(
            f"problem {name!r}: a loaded plan holds graphs for the kinds of batches that it was saved with: "
            f"{'; '.join(_sizes(s) for _, s in self._captures[name])}; got {_sizes(signature)}. Save the plan after a "
            "step on such a batch, or compile the program here"
        )


def _sizes(signature: tuple[Any, ...]) -> str:
    _, *tensors = signature
    return ", ".join(f"{str(dtype).removeprefix('torch.')} {[*shape]}" for shape, _, dtype in tensors) or "no tensor"


__all__ = ["LoadedProblem", "load"]
