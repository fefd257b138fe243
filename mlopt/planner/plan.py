"""`ExecutionPlan`: the whole program as data, and how it prints."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from mlopt.graph import Graph
from mlopt.hypergradient import CG, AbstractEstimator
from mlopt.planner.adjoint import plan_hypergradient
from mlopt.planner.instructions import HYPERGRADIENT, Gradient, Instruction, MixedProduct, ReverseSteps, Solve, Update


@dataclasses.dataclass(frozen=True)
class ProductNeeds:
    """Which derivatives of one problem's loss the program uses; nothing else is built.

    Attributes:
        cotangents: Problems whose cotangent comes with the problem's gradient.
        hvp: Whether Hessian products are used.
        mixed: Targets of exact mixed products.
        read_gradients: Targets of mixed products by finite differences.
        curvature: What the Hessian products are products with; see `AbstractEstimator.curvature`.
        hvps_at_once: How many Hessian products are made by one call; 0 if all are made one by one.
    """

    cotangents: tuple[str, ...] = ()
    hvp: bool = False
    mixed: tuple[str, ...] = ()
    read_gradients: tuple[str, ...] = ()
    curvature: str = "hessian"
    hvps_at_once: int = 0


@dataclasses.dataclass(frozen=True)
class ProblemPlan:
    """When one problem steps and what a step is.

    Attributes:
        name: The problem.
        level: 1 for the lowest.
        size: Number of trained parameters (of one task).
        reads: Problems whose trained parameters its loss, or its optimizer's settings, depend on.
        lowers: Problems that must have made their `unroll_steps` since this problem's last step.
        instructions: One step.
        estimator: How a problem above differentiates this problem's optimum.
        rolled_back: Problems that repeat their unroll after this problem's step, lowest first.
        reached: Names of its parameters that a lower loss reads, through which the hypergradient is more than direct.
        is_whole: Whether a step is no more than the gradient of its own loss on one batch and the update, so that one
            graph can make it.
        runs_ahead: Whether steps of it may follow each other in one run until a problem above steps: it is a lowest
            one whose steps nothing logs or reads in between.
    """

    name: str
    level: int
    size: int
    reads: tuple[str, ...]
    lowers: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    estimator: AbstractEstimator
    rolled_back: tuple[str, ...]
    reached: frozenset[str]
    is_whole: bool = False
    runs_ahead: bool = False


@dataclasses.dataclass(frozen=True)
class ExecutionPlan:
    """What the runtime executes.

    Attributes:
        problems: Lowest first.
        needs: For each problem, the derivatives of its loss that are used.
    """

    problems: tuple[ProblemPlan, ...]
    needs: dict[str, ProductNeeds]

    def __getitem__(self, name: str) -> ProblemPlan:
        """Return the plan of one problem."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, ProblemPlan]:
        return {p.name: p for p in self.problems}

    def __str__(self) -> str:
        """List the steps of every problem."""
        blocks = []
        for p in self.problems:
            lines = [f"step of {p.name}"]
            lines += [f"  {i}. {instruction}" for i, instruction in enumerate(p.instructions, 1)]
            blocks.append("\n".join(lines))
        return "\n".join(blocks)


def plan_program(graph: Graph, estimators: Mapping[str, AbstractEstimator] | None = None) -> ExecutionPlan:
    """Plan every problem of a graph whose edges are known.

    Args:
        graph: The problem graph.
        estimators: The estimator of each problem; default: what the problems ask for, or `CG`.
    """
    order = list(graph.problems)
    estimators = estimators or {name: problem.hypergradient or CG() for name, problem in graph.problems.items()}
    reads = {name: list(graph.reads(name)) for name in order}
    levels = graph.levels()
    problems = []
    planned = {name: plan_hypergradient(name, order, reads, estimators) for name in order}
    # Steps that are made again need a record of each.
    recorded = {i.problem for instructions in planned.values() for i in instructions if isinstance(i, ReverseSteps)}
    recorded |= {below for name in order if graph.problems[name].roll_back for below in graph.below(name)}
    for name in order:
        instructions = planned[name]
        whole = all(isinstance(i, Update) or (isinstance(i, Gradient) and not i.cotangents) for i in instructions)
        whole = whole and graph.problems[name].gradient_accumulation == 1
        reached = {
            parameter
            for i in instructions
            if isinstance(i, MixedProduct | ReverseSteps) and (name, HYPERGRADIENT) in i.targets
            for parameter in graph.reads(i.problem)[name]
        }
        problems.append(
            ProblemPlan(
                name=name,
                level=levels[name],
                size=graph.problems[name].num_trained,
                reads=tuple(reads[name]),
                lowers=tuple(graph.lowers(name)),
                instructions=instructions,
                estimator=estimators[name],
                rolled_back=tuple(graph.below(name)) if graph.problems[name].roll_back else (),
                reached=frozenset(reached),
                is_whole=whole,
                runs_ahead=whole and not graph.lowers(name) and name not in recorded,
            )
        )
    return ExecutionPlan(tuple(problems), {name: _needs(name, problems) for name in order})


def _needs(name: str, problems: Sequence[ProblemPlan]) -> ProductNeeds:
    cotangents: list[str] = []
    mixed: list[str] = []
    read_gradients: list[str] = []
    hvp, curvature, at_once = False, "hessian", 0
    size = next(p.size for p in problems if p.name == name)
    for instruction in (i for p in problems for i in p.instructions if i.problem == name):
        if isinstance(instruction, Gradient):
            cotangents += [r for r, _ in instruction.cotangents]
        elif isinstance(instruction, Solve):
            if instruction.estimator.uses_hvp:
                hvp, curvature = True, instruction.estimator.curvature
                at_once = max(at_once, instruction.estimator.hvps_at_once(size))
        elif isinstance(instruction, ReverseSteps):
            hvp = True
            mixed += [r for r, _ in instruction.targets]
        elif isinstance(instruction, MixedProduct):
            (mixed if instruction.step is None else read_gradients).extend(r for r, _ in instruction.targets)
    return ProductNeeds(
        tuple(dict.fromkeys(cotangents)),
        hvp,
        tuple(dict.fromkeys(mixed)),
        tuple(dict.fromkeys(read_gradients)),
        curvature,
        at_once,
    )
