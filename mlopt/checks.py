"""Checks of a whole program that need more than one problem's statement: called by the compiler, in this order."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping

import torch
from torch.optim.lr_scheduler import LRScheduler

from mlopt.autodiff import FlatLayout
from mlopt.autodiff.update import OptimizerState, apply_update, update_factor
from mlopt.errors import ProblemError, StructureWarning, UpdateError
from mlopt.graph import Graph
from mlopt.planner import ExecutionPlan, ReverseSteps, Solve
from mlopt.problem import Problem


def check_devices(layouts: Mapping[str, FlatLayout]) -> None:
    """Refuse a program whose problems live on different devices.

    Raises:
        ProblemError: They do.
    """
    devices: dict[torch.device, str] = {}
    for name, layout in layouts.items():
        devices.setdefault(layout.device, name)
    if len(devices) > 1:
        (a, first), (b, second) = list(devices.items())[:2]
        raise ProblemError(
            f"problem {second!r} has its parameters on {b}, problem {first!r} on {a}; move all modules to one device "
            "before their optimizers are made"
        )


def all_reads(
    problem: Problem, problems: Mapping[str, Problem], loss_reads: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Return what a problem's loss reads, and what the learned settings of its optimizer are made of.

    Raises:
        ProblemError: Settings are learned that the problem's estimator cannot differentiate.
    """
    name = problem.name
    found = {read: list(names) for read, names in loss_reads.items()}
    with torch.enable_grad():
        learned = [h for group in problem.hyperparameters_by_group() for h in group.values() if h.requires_grad]
    if learned and (problem.hypergradient is None or problem.hypergradient.unrolled_steps is None):
        raise ProblemError(
            f"problem {name!r}: its optimizer_hyperparameters are learned, but {problem.hypergradient!r} is the "
            "derivative of an optimum, on which they have no influence; use hypergradient=mlopt.Unroll(steps)"
        )
    for other, peer in problems.items():
        trained = peer.trained_parameters()
        if learned and other != name:
            gradients = torch.autograd.grad(
                [sum(learned[1:], learned[0])], list(trained.values()), allow_unused=True, retain_graph=True
            )
            names = [key for key, g in zip(trained, gradients, strict=True) if g is not None]
            if names:
                found[other] = list(dict.fromkeys([*found.get(other, []), *names]))
    return {read: tuple(names) for read, names in found.items()}


def check_estimators(
    program: ExecutionPlan, problems: Mapping[str, Problem], layouts: Mapping[str, FlatLayout]
) -> None:
    """Let every estimator that is used look at the size and the optimizer of its problem.

    Raises:
        ProblemError: An estimator refuses, or differentiates a step that the problem's hooks change.
        UpdateError: An optimizer's step cannot be differentiated.
    """
    used = {i.problem for p in program.problems for i in p.instructions if isinstance(i, Solve | ReverseSteps)}
    for name in used:
        estimator = program[name].estimator
        try:
            estimator.check(name, layouts[name].size)
        except ValueError as error:
            raise ProblemError(str(error)) from None
        if estimator.uses_update or estimator.unrolled_steps is not None:
            hooks = [hook for hook in problems[name].step_hooks() if hook != "on_inner_loop_start"]
            if hooks:
                raise ProblemError(
                    f"problem {name!r}: {estimator!r} differentiates the optimizer's step, but the problem changes it "
                    f"by {', '.join(hooks)}, whose derivative is not known; use an estimator of the derivative of an "
                    "optimum (mlopt.CG, mlopt.Neumann, mlopt.FiniteDifference)"
                )
            _check_update(problems[name], needs_factor=estimator.uses_update)


def _check_update(problem: Problem, *, needs_factor: bool) -> None:
    """Differentiate one step of the optimizer on an arbitrary gradient."""
    name = problem.name
    parameters = list(problem.trained_parameters().values())
    generator = torch.Generator().manual_seed(0)
    gradients = [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype).to(p.device) for p in parameters
    ]
    state = OptimizerState.of(problem.optimizer, parameters)
    if needs_factor:
        update_factor(problem.optimizer, parameters, gradients, state, problem=name)
        return
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    with torch.enable_grad():
        updated, _ = apply_update(problem.optimizer, leaves, gradients, state, problem=name)
    if not all(u.requires_grad for u in updated):
        raise UpdateError(f"problem {name!r}: the step of {type(problem.optimizer).__name__} has no derivative")


def check_optimizers(problems: Mapping[str, Problem]) -> None:
    """Refuse what could not step, and a scheduler that would have no influence on the steps.

    A problem that overrides `optimizer_step` may do with both what it likes.

    Raises:
        ProblemError: An optimizer's ``step`` cannot be called without arguments, or a scheduler is another optimizer's.
    """
    for name, problem in problems.items():
        if "optimizer_step" in problem.step_hooks():
            continue
        optimizer, scheduler = problem.optimizer, problem.scheduler
        missing = _missing_arguments(optimizer)
        if missing:
            raise ProblemError(
                f"problem {name!r}, argument `optimizer`: the step of {type(optimizer).__name__} cannot be called "
                f"without {', '.join(map(repr, missing))}: a step is made from one gradient, in .grad, and evaluates "
                "no loss. Take another (torch.optim.SGD, torch.optim.Adam, ...), or override optimizer_step(self)"
            )
        if isinstance(scheduler, LRScheduler) and not _writes_to(scheduler, optimizer):
            raise ProblemError(
                f"problem {name!r}, argument `scheduler`: expected a scheduler of the problem's own optimizer, got "
                f"{type(scheduler).__name__} of another {type(scheduler.optimizer).__name__}, which makes no steps "
                "here; make it from the optimizer that the problem has"
            )


def _missing_arguments(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the arguments without which the optimizer's ``step`` cannot be called."""
    own = vars(optimizer).get("step")
    # A scheduler wraps the step of its optimizer, and lets every argument through.
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        return []
    try:
        _, *parameters = inspect.signature(type(optimizer).step).parameters.values()
    except (TypeError, ValueError):  # a step that does not say what it takes
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _writes_to(scheduler: LRScheduler, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scheduler writes to groups that the optimizer reads: its own, or those of an optimizer it wraps."""
    other = getattr(scheduler, "optimizer", optimizer)  # one of the user's own may have none
    groups = {id(group) for group in optimizer.param_groups}
    return (
        other is optimizer
        or any(value is other for value in vars(optimizer).values())
        or any(id(group) in groups for group in other.param_groups)
    )


def warn_about_structure(program: ExecutionPlan, graph: Graph, used_own: Mapping[str, frozenset[str]]) -> None:
    """Warn of a problem that nothing moves, of an order that is the reason, and of settings without effect.

    Args:
        program: The planned program.
        graph: Its problems and what their losses read.
        used_own: For each problem, the names of its own parameters that its loss depends on.
    """
    messages = []
    reordered = False
    trained_by = {name: graph.problems[name].trained_parameters() for name in used_own}
    used_own = {name: used.intersection(trained_by[name]) for name, used in used_own.items()}
    for name, trained in trained_by.items():
        if used_own[name] or program[name].reached.intersection(trained):
            continue
        order = _better_order(name, graph, used_own)
        reordered |= order is not None
        messages.append(
            f"problem {name!r}: its hypergradient is zero. Neither its own loss nor the loss of a problem "
            f"below it depends on its parameters ({', '.join(trained)}): read them as self.{name}(...) in the "
            "training_step that they are to shape, without detach or no_grad"
            if order is None
            else f"problem {name!r}: its hypergradient is zero. {_what_comes_later(name, graph)} and so counts as the "
            f"upper of the two; {graph.advice_on_order(order)}"
        )
    if not reordered:  # then they are given to the right problems
        messages += _settings_without_effect(graph)
    for message in messages:
        warnings.warn(message, StructureWarning, stacklevel=4)


def _better_order(name: str, graph: Graph, used_own: Mapping[str, frozenset[str]]) -> list[str] | None:
    """Return an order of the problems in which each of them is reached; None if that is not what is wrong.

    Tried are `name` behind all that it belongs together with, and the whole list from behind: where both would do, the
    one of more levels.
    """
    order = list(graph.problems)
    related = [n for n in order if n in graph.reads(name) or name in graph.reads(n)]
    moved = [n for n in order if n != name]
    if related:
        moved.insert(moved.index(related[-1]) + 1, name)

    def lowers(n: str, order: list[str]) -> set[str]:
        return {other for other in graph.reads(n) if order.index(other) < order.index(n)}

    def is_reached(n: str, order: list[str]) -> bool:
        below, stack = set[str](), [n]
        while stack:
            found = lowers(stack.pop(), order) - below
            below |= found
            stack += found
        return any(n in graph.reads(other) for other in below)

    def num_levels(order: list[str]) -> int:
        levels: dict[str, int] = {}
        for n in order:
            levels[n] = 1 + max((levels[lower] for lower in lowers(n, order)), default=0)
        return max(levels.values())

    complete = [o for o in (moved, order[::-1]) if len(o) == len(order)]
    return max((o for o in complete if all(used_own[n] or is_reached(n, o) for n in o)), key=num_levels, default=None)


def _what_comes_later(name: str, graph: Graph) -> str:
    """Say which problem of those that `name` belongs together with comes after it."""
    later = [n for n in graph.problems if graph.is_below(name, n)]
    for other in later:
        if name in graph.reads(other):
            return f"Problem {other!r} reads it, but comes later"
    read = " and ".join(repr(n) for n in later if n in graph.reads(name))
    return f"It reads {read}, which comes later"


def _settings_without_effect(graph: Graph) -> list[str]:
    """Say which settings have none. Those that another problem has, too, are taken to be given to all alike."""
    given = {name: problem.settings_for_problems_above() for name, problem in graph.problems.items()}
    messages = []
    for name, settings in given.items():
        if len(given) == 1 or any(name in graph.lowers(other) for other in given):
            continue
        own = [
            f"{key}={value!r}"
            for key, value in settings.items()
            if not any(key in others and others[key] == value for other, others in given.items() if other != name)
        ]
        if not own:
            continue
        below, them = ", ".join(map(repr, graph.lowers(name))), "them" if len(own) > 1 else "it"
        messages.append(
            f"problem {name!r}: no problem is above it, so {' and '.join(own)}"
            + (" have no effect: they matter" if len(own) > 1 else " has no effect: it matters")
            + f" only to a problem that is optimized on top of this one. Leave {them} out"
            + (f", or give {them} to a problem below ({below}; the lowest comes first in the list)" if below else "")
        )
    return messages
