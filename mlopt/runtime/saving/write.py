"""`save`: a plan as a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlopt.errors import SaveError
from mlopt.planner import ExecutionPlan
from mlopt.problem import Problem
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import GraphDerivatives
from mlopt.runtime.execute import Executor
from mlopt.runtime.explain import CompileReport
from mlopt.runtime.plan_state import tensors_of
from mlopt.runtime.saving import graphs
from mlopt.runtime.saving.archive import writing
from mlopt.runtime.saving.problems import describe


def save(
    path: str | os.PathLike[str],
    executor: Executor,
    program: ExecutionPlan,
    reads: Mapping[str, Mapping[str, tuple[str, ...]]],
    report: CompileReport,
    state: Mapping[str, Any],
) -> None:
    """Write a plan; see `Plan.save`."""
    problems = executor.problems
    described = [describe(problem) for problem in problems.values()]
    captures = {name: _captures(executor, name, report) for name in problems}
    used = {id(d.backend): d.backend for found in captures.values() for d, _ in found}
    content = {
        "program": program,
        "reads": {name: dict(edges) for name, edges in reads.items()},
        "seen": {name: executor.seen[name] for name in problems},
        "hypergradients": {name: problem.hypergradient for name, problem in problems.items()},
        "backend": report.backend,
        "captures": {
            name: [(graphs.without_code(d.graphs), batch.signature()) for d, batch in found]
            for name, found in captures.items()
        },
    }
    with writing(path) as folder:
        (folder / "problems.json").write_text(json.dumps(described, indent=1))
        (folder / "program.pkl").write_bytes(graphs.dumps(content, live_names(problems)))
        torch.save(state, folder / "state.pt")
        for backend in used.values():
            backend.copy_cache(Path(folder))


def live_tensors(problems: Mapping[str, Problem]) -> dict[str, torch.Tensor]:
    """Return the tensors that graphs refer to instead of holding them, by name."""
    found = {f"{name}|{key}": t for name, p in problems.items() for key, t in tensors_of(p).items()}
    return found | {f"{name}|": p.loss_scale.value for name, p in problems.items() if p.loss_scale is not None}


def live_names(problems: Mapping[str, Problem]) -> dict[int, str]:
    """Return the name of each of `live_tensors` by its ``id``."""
    return {id(t): name for name, t in live_tensors(problems).items()}


def _captures(executor: Executor, name: str, report: CompileReport) -> list[tuple[GraphDerivatives, Batch]]:
    """Return the graphs that hold for the next batch of a problem, and for those of its last step.

    Raises:
        SaveError: It runs by plain autograd.
    """
    state = executor.states[name]
    found: dict[int, tuple[GraphDerivatives, Batch]] = {}
    for batch in (state.stream.peek(), *(sample.batch for sample in state.samples)):
        derivatives: Any = executor.derivatives(name, batch)
        if not isinstance(derivatives, GraphDerivatives):
            reason = report.islands.get(name, "it has no graphs")
            raise SaveError(
                f"problem {name!r} runs by plain autograd on its training_step, which is code and not part of a saved "
                f"plan: {reason}"
            )
        found.setdefault(id(derivatives), (derivatives, batch))
    return list(found.values())
