"""What ``plan.explain()`` prints: facts of the compiled program, in the order a reader asks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from mlopt import ops
from mlopt.autodiff import FlatLayout, LinearizationGraphs
from mlopt.graph import Graph
from mlopt.planner import (
    ExecutionPlan,
    Gradient,
    Instruction,
    Linearize,
    MixedProduct,
    ProblemPlan,
    ReverseSteps,
    Solve,
    Update,
)
from mlopt.runtime.derivatives import GraphDerivatives


@dataclasses.dataclass
class CompileReport:
    """What compilation did.

    Attributes:
        backend: Name of the backend.
        layouts: Flat layouts of all problems.
        seconds: Wall time per stage.
        graphs: Problem -> its compiled derivatives, one entry per capture.
        residuals: Problem -> what the primal half hands to the tangent halves, in words.
        islands: Problem -> why it runs by plain autograd.
        unverified: Problem -> why its derivatives were not compared with plain autograd.
        eager_updates: Problem -> why its optimizer steps by itself, where one graph could have made the whole step.
    """

    backend: str
    layouts: Mapping[str, FlatLayout]
    seconds: dict[str, float] = dataclasses.field(
        default_factory=lambda: {"capture": 0.0, "differentiate": 0.0, "lower": 0.0, "verify": 0.0}
    )
    graphs: dict[str, list[GraphDerivatives]] = dataclasses.field(default_factory=dict)
    residuals: dict[str, str] = dataclasses.field(default_factory=dict)
    islands: dict[str, str] = dataclasses.field(default_factory=dict)
    unverified: dict[str, str] = dataclasses.field(default_factory=dict)
    eager_updates: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, name: str, derivatives: GraphDerivatives) -> None:
        """Record the graphs of one capture of a problem."""
        self.graphs.setdefault(name, []).append(derivatives)
        if derivatives.graphs.linearization is not None:
            self.residuals[name] = _residuals(derivatives.graphs.linearization)

    def replace(self, name: str, old: GraphDerivatives, new: GraphDerivatives) -> None:
        """Record that other derivatives took the place of those of one capture."""
        self.graphs[name] = [new if d is old else d for d in self.graphs[name]]


def explain(graph: Graph, program: ExecutionPlan, report: CompileReport) -> str:
    """Describe a compiled program as text."""
    native = "native" if ops.available() else "reference (extension not built)"
    num_edges = graph.nx.number_of_edges()
    lines = [
        f"mlopt plan: {_count(len(program.problems), 'problem')}, {_count(num_edges, 'edge')}; "
        f"graphs run by the {report.backend} backend, solver vectors by the {native} ops",
        "",
        "problems",
        *_table(_problem_rows(graph, program, report)),
        "",
        "edges (a loss reads another problem's parameters)",
        *(_table(_edge_rows(graph)) or ["  none"]),
        "",
    ]
    for p in program.problems:
        lines.append(f"one step of {p.name}")
        for i, instruction in enumerate(p.instructions, 1):
            cost = _cost(instruction, program)
            lines.append(f"  {i}. {instruction}{f'   [{cost}]' if cost else ''}")
        lines += _step_lines(p, graph, report)
        lines.append("")
    lines.append("captured graphs (number of calls)")
    rows = []
    for name, captures in report.graphs.items():
        for i, derivatives in enumerate(captures):
            label = name if i == 0 else f"{name} (capture {i + 1})"
            modules = derivatives.graphs.modules().items()
            calls = ", ".join(f"{key} {_num_calls(module)}" for key, module in modules)
            rows.append((label, calls, report.residuals.get(name, "")))
    lines += _table(rows)
    lines += _lowering_lines(report)
    if report.islands:
        lines += ["", "eager islands (plain autograd on the user's code, same results)"]
        lines += [f"  {name}: {reason}".replace("\n", "\n    ") for name, reason in report.islands.items()]
        lines.append("")
    lines += [f"not verified: {name}: {reason}" for name, reason in report.unverified.items()]
    lines.append("compile time: " + ", ".join(f"{stage} {s:.1f} s" for stage, s in report.seconds.items()))
    return "\n".join(lines)


def _step_lines(p: ProblemPlan, graph: Graph, report: CompileReport) -> list[str]:
    """Say whether a step is one compiled graph, and whether several run in one native loop."""
    steps = [d.step for d in report.graphs.get(p.name, []) if d.step is not None and d.step.is_used()]
    optimizer = type(graph.problems[p.name].optimizer).__name__
    if not steps:
        updates = [u for d in report.graphs.get(p.name, []) if (u := d.step or d.update) is not None]
        if any(u.is_used() for u in updates):
            return [f"  one graph makes this update: sum of direct and indirect gradient, and the step of {optimizer}"]
        given_up = [u.given_up for u in updates if u.given_up]
        reason = report.eager_updates.get(p.name, "".join(given_up[:1]))
        return [f"  the optimizer steps by itself: {reason}"] if reason else []
    lines = [f"  one graph makes this step: loss, backward and the update of {optimizer}"]
    if p.runs_ahead and all(step.can_repeat for step in steps):
        uppers = [q for q in graph.problems if p.name in graph.lowers(q)]
        most = f"up to {graph.problems[p.name].unroll_steps} of them, " if uppers else "many of them, "
        lines.append(f"  {most}with nothing due in between, run as one native loop (Plan.run, Engine)")
    return lines


def _lowering_lines(report: CompileReport) -> list[str]:
    """Say for each graph what runs it, where that is not simply the eager backend."""
    rows = [
        (name if i == 0 else f"{name} (capture {i + 1})", key, lowering.backend, lowering.note)
        for name, captures in report.graphs.items()
        for i, derivatives in enumerate(captures)
        for key, lowering in derivatives.lowerings().items()
        if (lowering.backend, lowering.note) != ("eager", "")
    ]
    return ["", "what runs each graph", *_table(rows), ""] if rows else []


def _problem_rows(graph: Graph, program: ExecutionPlan, report: CompileReport) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for p in reversed(program.problems):
        problem = graph.problems[p.name]
        rows.append(
            (
                f"level {p.level}",
                p.name,
                (f"{problem.tasks} x " if problem.tasks else "") + f"{p.size:,} parameters",
                type(problem.optimizer).__name__,
                schedule_text(graph, program, p.name),
            )
        )
    return rows


def schedule_text(graph: Graph, program: ExecutionPlan, name: str) -> str:
    """Say in words when a problem steps."""
    lowers = program[name].lowers
    if not lowers:
        return "steps every time"
    parts = [f"{graph.problems[lower].unroll_steps} of {lower}" for lower in lowers]
    warmups = [
        f"{graph.problems[lower].warmup_steps} of {lower}" for lower in lowers if graph.problems[lower].warmup_steps
    ]
    waiting = f", the first time after a warm-up of {', '.join(warmups)}" if warmups else ""
    return f"steps after {', '.join(parts)}{waiting}"


def _edge_rows(graph: Graph) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for source, reader, data in graph.nx.edges(data=True):
        count = _count(len(data["parameters"]), "tensor")
        rows.append((f"{source} -> {reader}", data["kind"], f"the loss of {reader} reads {count} of {source}"))
    return rows


def _cost(instruction: Instruction, program: ExecutionPlan) -> str:
    if isinstance(instruction, Gradient):
        return "1 forward, 1 backward"
    if isinstance(instruction, Linearize):
        return "1 forward, 1 backward"
    if isinstance(instruction, Solve):
        most = instruction.estimator.max_hvps(program[instruction.problem].size)
        noun = "Gauss-Newton product" if instruction.estimator.curvature == "ggn" else "Hessian product"
        products = f"at most {_count(most, noun)}" if most else f"no {noun}"
        return "1 forward, 1 backward" if instruction.estimator.uses_update else products
    if isinstance(instruction, ReverseSteps):
        n = instruction.steps
        return (
            f"at most {2 * n} forward, {2 * n} backward, {_count(n, 'Hessian product')}, {_count(n, 'mixed product')}"
        )
    if isinstance(instruction, MixedProduct):
        return "1 tangent pass" if instruction.step is None else "2 forward, 2 backward"
    assert isinstance(instruction, Update)
    return ""


def _residuals(graphs: LinearizationGraphs) -> str:
    size = graphs.residual_bytes
    unit = next((u for u, scale in _UNITS.items() if size >= scale), "bytes")
    kept = f"{size / _UNITS[unit]:.3g} {unit}" if unit in _UNITS else f"{size} {unit}"
    again = f", {_count(graphs.num_recomputed, 'operation')} made again" if graphs.num_recomputed else ""
    return f"{_count(graphs.num_residuals, 'residual')} ({kept}) kept between primal and tangent{again}"


_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def _num_calls(module: fx.GraphModule) -> int:
    return sum(n.op == "call_function" for n in module.graph.nodes)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    rows = list(rows)
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
