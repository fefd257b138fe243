"""``plan.check()``: how good are the hypergradients at the present state?

Every estimate is compared with a reference that shares nothing with it but the user's code: plain autograd for the
products, and for the solve the whole Hessian (small problems) or conjugate gradients to a tight tolerance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping

import torch

from mlopt.graph import Graph
from mlopt.hypergradient import CG, AbstractEstimator, Dense
from mlopt.linalg import Outcome, Solution, extreme_eigenvalues
from mlopt.planner import MixedProduct, ProductNeeds, ReverseSteps, Solve, plan_program
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import AbstractDerivatives, AbstractLinearization, MeanLinearization
from mlopt.runtime.exchange import exchanged
from mlopt.runtime.execute import Executor
from mlopt.runtime.rng import frozen_random_state
from mlopt.runtime.step_pass import Pass

# Up to this size the reference is the whole Hessian, which also gives its exact spectrum.
DENSE_SIZE = 1500
# How far an implicit gradient may be off because of an unconverged lower problem before the report warns.
_CONVERGED = 0.1
# A hypergradient whose indirect part is smaller than this relative to the direct one is called zero.
_ZERO = 1e-10

Reference = Callable[[str, ProductNeeds], AbstractDerivatives]


@dataclasses.dataclass(frozen=True)
class EdgeCheck:
    """One lower problem that is differentiated for an upper one.

    Attributes:
        upper: The problem whose hypergradient it is.
        lower: The problem whose optimum is differentiated.
        estimator: How.
        num_steps: Iterations of the solve; for an unroll, the steps differentiated at most.
        residual: True relative residual ``||H q - v|| / ||v||`` (no damping), by an exact product.
        cosine: Between the contribution ``(d2g/dlambda dtheta)^T q`` and that of the reference.
        error: Relative error of that contribution.
        smallest: Smallest eigenvalue of H found.
        largest: Largest eigenvalue of H found.
        gradient_norm: Norm of the lower gradient, which is 0 at an optimum.
        reference: What the estimate is compared with: the exact solution for H, or, where H is too large to be
            inverted and not positive definite, that for ``H + damping I`` with the estimator's own damping. Where
            that is not positive definite either, there is none, and cosine and error are NaN.
    """

    upper: str
    lower: str
    estimator: AbstractEstimator
    num_steps: int
    residual: float
    cosine: float
    error: float
    smallest: float
    largest: float
    gradient_norm: float
    reference: str


@dataclasses.dataclass(frozen=True)
class HypergradientCheck:
    """The total gradient of one upper problem.

    Attributes:
        upper: The problem.
        norm: Norm of its hypergradient.
        indirect: Norm of the part that comes through lower problems.
        cosine: Between the hypergradient and the reference.
        error: Its relative error.
        drift: By how much, relatively, the reference hypergradient changes if the lower problems take one Newton step
            towards their optimum; NaN if a Hessian is not positive definite.
    """

    upper: str
    norm: float
    indirect: float
    cosine: float
    error: float
    drift: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What `Plan.check` found; prints as tables, followed by warnings.

    Attributes:
        hypergradients: One entry per upper problem.
        edges: One entry per solve.
        warnings: What a user should know or do, one line each.
    """

    hypergradients: tuple[HypergradientCheck, ...]
    edges: tuple[EdgeCheck, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        """Print the tables."""
        lines = ["hypergradients, against a reference by plain autograd and accurate solves"]
        lines += _table(
            ("problem", "norm", "indirect part", "cosine", "relative error", "change at the lower optimum"),
            [
                (h.upper, f"{h.norm:.3e}", f"{h.indirect:.3e}", _cosine(h.cosine), _percent(h.error), _percent(h.drift))
                for h in self.hypergradients
            ],
        )
        lines += ["", "lower problems differentiated"]
        lines += _table(
            (
                "edge",
                "estimator",
                "steps",
                "residual",
                "cosine",
                "relative error",
                "against",
                "eigenvalues of H",
                "|lower gradient|",
            ),
            [
                (
                    f"{e.lower} -> {e.upper}",
                    repr(e.estimator),
                    str(e.num_steps),
                    _scientific(e.residual),
                    _cosine(e.cosine),
                    _percent(e.error),
                    e.reference,
                    f"{e.smallest:.2g} to {e.largest:.2g}",
                    f"{e.gradient_norm:.2e}",
                )
                for e in self.edges
            ],
        )
        if self.warnings:
            lines += ["", "warnings", *(f"  {w}" for w in self.warnings)]
        return "\n".join(lines)


def check(graph: Graph, executor: Executor, reference: Reference) -> Report:
    """Check every hypergradient of a program at its present state; nothing is changed.

    Args:
        graph: The problem graph.
        executor: The running program.
        reference: Gives a problem's derivatives by plain autograd.
    """
    extremes = {name: _extremes(name, executor, reference) for name in _lowers(executor)}
    solvers = {
        name: _reference_estimator(executor.layouts[name].size, executor.plan[name].estimator, extremes.get(name))
        for name in graph.problems
    }
    program = plan_program(graph, solvers)
    known = {name: reference(name, program.needs[name]) for name in graph.problems}

    def by_name(name: str, batch: Batch, *, checked: bool = False) -> AbstractDerivatives:
        return known[name]

    exact = Executor(
        program,
        executor.problems,
        executor.layouts,
        by_name,
        {name: state.stream for name, state in executor.states.items()},
        quiet=True,
    )
    exact.states = executor.states
    hypergradients, edges, warnings = [], [], []
    for plan in executor.plan.problems:
        name = plan.name
        if not plan.lowers and not plan.reached:
            continue
        run, truth = executor.evaluate(name), exact.evaluate(name)
        edges += _check_edges(name, run, executor, exact, extremes)
        hypergradients.append(_check_total(name, run, truth, executor, exact, extremes))
    warnings += _warnings(executor, hypergradients, edges)
    return Report(tuple(hypergradients), tuple(edges), tuple(warnings))


def _lowers(executor: Executor) -> list[str]:
    """Return the problems whose optimum some hypergradient differentiates."""
    kinds = Solve | ReverseSteps
    used = {i.problem for p in executor.plan.problems for i in p.instructions if isinstance(i, kinds)}
    return [p.name for p in executor.plan.problems if p.name in used]


def _extremes(name: str, executor: Executor, reference: Reference) -> tuple[float, float]:
    """Return the smallest and the largest eigenvalue of a problem's Hessian that were found."""
    derivatives = reference(name, ProductNeeds(hvp=True))
    parts = []
    for sample in executor.lower_samples(name):
        with frozen_random_state(sample.random_state):
            parts.append(derivatives.linearize(sample.batch))
    smallest, largest = extreme_eigenvalues(executor.operator(name, MeanLinearization(parts)))
    return float(smallest), float(largest)


def _reference_estimator(
    size: int, estimator: AbstractEstimator, extremes: tuple[float, float] | None
) -> AbstractEstimator:
    if size <= DENSE_SIZE:
        return Dense(max_size=DENSE_SIZE)
    indefinite = extremes is not None and extremes[0] <= 0
    return CG(max_steps=500, rtol=1e-7, damping=getattr(estimator, "damping", 0.0) if indefinite else 0.0)


def _describe(solver: AbstractEstimator) -> str:
    damping = getattr(solver, "damping", 0.0)
    return f"H + {damping:g} I" if damping else "H"


def _check_edges(
    upper: str, run: Pass, executor: Executor, exact: Executor, extremes: Mapping[str, tuple[float, float]]
) -> list[EdgeCheck]:
    found = []
    solves = {i.out: i for i in executor.plan[upper].instructions if isinstance(i, Solve)}
    for instruction in executor.plan[upper].instructions:
        if not isinstance(instruction, MixedProduct | ReverseSteps):
            continue
        lower, targets = instruction.problem, [r for r, _ in instruction.targets]
        linearization = exact.linearize(lower)
        solver, estimator = exact.plan[lower].estimator, executor.plan[lower].estimator
        residual, num_steps = float("nan"), estimator.unrolled_steps or 0
        if isinstance(instruction, MixedProduct):
            solve = solves[instruction.vector]
            v, q = run.slots[solve.rhs], run.slots[solve.out]
            num_steps = int(run.solutions[solve.out].num_steps.max())
            with torch.no_grad():
                residual = _ratio(linearization.hvp(q) - v, v)
            got = _contribution(linearization, q, targets)
            if instruction.step is not None:  # the product itself is an estimate, too
                got = _flat({r: t for r, t in executor.mixed_products(instruction, run).items() if r in targets})
        else:
            v = run.slots[instruction.rhs]
            got = -_flat(executor.reverse_steps(instruction, run))
        with torch.no_grad():
            truth = solver.solve(exact.operator(lower, linearization), v, None)
        expected = _contribution(linearization, truth.value, targets)
        known = _is_known(truth) and not _learns_settings(executor, lower)
        smallest, largest = extremes[lower]
        gradient = exact.own_gradient(lower)
        found.append(
            EdgeCheck(
                upper=upper,
                lower=lower,
                estimator=estimator,
                num_steps=num_steps,
                residual=residual,
                cosine=_cosine_of(got, expected) if known else float("nan"),
                error=_ratio(got - expected, expected) if known else float("nan"),
                smallest=smallest,
                largest=largest,
                gradient_norm=float(gradient.norm()),
                reference=_describe(solver) if known else "none",
            )
        )
    return found


def _learns_settings(executor: Executor, name: str) -> bool:
    """Whether settings of a problem's optimizer are learned: an optimum does not depend on them."""
    return any(executor.problems[name].hyperparameters_by_group())


def _contribution(linearization: AbstractLinearization, q: torch.Tensor, targets: list[str]) -> torch.Tensor:
    products = linearization.mixed(q)
    return _flat({r: products[r] for r in targets})


def _is_known(solution: Solution) -> bool:
    """Whether a reference solution can be trusted."""
    return solution.outcome in (Outcome.CONVERGED, Outcome.MAX_STEPS) and bool(
        (solution.relative_residual < 1e-2).all()
    )


def _check_total(
    name: str,
    run: Pass,
    truth: Pass,
    executor: Executor,
    exact: Executor,
    extremes: Mapping[str, tuple[float, float]],
) -> HypergradientCheck:
    layout = executor.layouts[name]
    got = layout.flatten(executor.total_gradient(name, run))
    expected = layout.flatten(exact.total_gradient(name, truth))
    assert run.result is not None
    direct = layout.flatten(run.result.own)
    lowers = {i.problem for i in exact.plan[name].instructions if isinstance(i, Solve)}
    drift = float("nan")
    known = all(_is_known(solution) for solution in truth.solutions.values())
    known = known and not any(_learns_settings(executor, lower) for lower in lowers)
    steps = {lower: _newton_step(lower, exact) if extremes[lower][0] > 0 else None for lower in lowers}
    if steps and all(step is not None for step in steps.values()):
        with _moved(exact, {lower: step for lower, step in steps.items() if step is not None}):
            there = layout.flatten(exact.total_gradient(name, exact.evaluate(name)))
        drift = _ratio(there - expected, expected)
    return HypergradientCheck(
        upper=name,
        norm=float(got.norm()),
        indirect=float((got - direct).norm()),
        cosine=_cosine_of(got, expected) if known else float("nan"),
        error=_ratio(got - expected, expected) if known else float("nan"),
        drift=drift,
    )


def _newton_step(lower: str, exact: Executor) -> torch.Tensor | None:
    """Return ``H^-1 dg/dtheta``, or None if that cannot be found."""
    operator = exact.operator(lower, exact.linearize(lower))
    solution = exact.plan[lower].estimator.solve(operator, exact.own_gradient(lower), None)
    return solution.value if _is_known(solution) else None


def _moved(executor: Executor, steps: Mapping[str, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
    """Let the parameters of some problems be ``theta - step``."""
    values = {}
    for name, step in steps.items():
        parameters = executor.problems[name].trained_parameters().values()
        for parameter, part in zip(parameters, executor.layouts[name].split(step), strict=True):
            values[id(parameter)] = parameter.detach() - part
    return exchanged(executor.problems.values(), values)


def _warnings(executor: Executor, totals: list[HypergradientCheck], edges: list[EdgeCheck]) -> list[str]:
    found = []
    for h in totals:
        plan = executor.plan[h.upper]
        if not plan.reached:
            found.append(
                f"{h.upper}: no lower loss depends on its parameters: its hypergradient is the direct gradient only"
            )
        elif h.indirect <= _ZERO * max(h.norm, torch.finfo(torch.float64).tiny):
            found.append(
                f"{h.upper}: the part of its hypergradient that comes through lower problems is numerically zero "
                f"({h.indirect:.1e}): saturated units, or weights that do not matter at the present state?"
            )
        if h.drift > _CONVERGED:
            norms = ", ".join(f"{e.lower} {e.gradient_norm:.1e}" for e in edges if e.upper == h.upper)
            found.append(
                f"{h.upper}: the lower problem has not converged (|gradient|: {norms}): implicit gradients are off by "
                f"{_percent(h.drift)} from those one Newton step nearer to the optimum; raise unroll_steps or the "
                "lower learning rate, or use mlopt.Unroll"
            )
    for e in edges:
        label = f"{e.lower} -> {e.upper}"
        if e.smallest <= 0:
            found.append(
                f"{label}: H is not positive definite (an eigenvalue of {e.smallest:.2g}): {e.lower} is not at a "
                "strict minimum; train it further, add weight decay, or use damping"
            )
        elif e.error > 0.5:
            found.append(
                f"{label}: the estimate is off by {_percent(e.error)}, residual {_scientific(e.residual)}: more steps "
                "or terms, or less damping, would bring it nearer"
            )
    return found


def _flat(products: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.reshape(-1) for t in products.values()])


def _ratio(difference: torch.Tensor, scale: torch.Tensor) -> float:
    size = float(scale.norm())
    return float(difference.norm()) / size if size > 0 else float("nan")


def _cosine_of(a: torch.Tensor, b: torch.Tensor) -> float:
    size = float(a.norm() * b.norm())
    return float(torch.dot(a.reshape(-1), b.reshape(-1))) / size if size > 0 else float("nan")


def _percent(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.2g} %" if value < 10 else f"{value:.1e} x"


def _cosine(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _scientific(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["  none"]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [f"  {line}".rstrip() for line in lines]
