"""Checks of a whole program that need more than one problem's statement: called by the compiler, in this order."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch.optim.lr_scheduler import LRScheduler

from mlopt.autodiff import FlatLayout
from mlopt.autodiff.update import OptimizerState, apply_update, update_factor
from mlopt.errors import ProblemError, StructureWarning, UpdateError
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


def warn_about_unreached(
    program: ExecutionPlan, problems: Mapping[str, Problem], used_own: Mapping[str, frozenset[str]]
) -> None:
    """Warn of a problem whose hypergradient is zero by structure: no loss depends on its parameters."""
    for name, used in used_own.items():
        trained = problems[name].trained_parameters()
        if not (used | program[name].reached).intersection(trained):
            warnings.warn(
                f"problem {name!r}: its hypergradient is zero. Neither its own loss nor the loss of a problem "
                f"below it depends on its parameters ({', '.join(trained)}): read them as self.{name}(...) in the "
                "training_step that they are to shape, without detach or no_grad",
                StructureWarning,
                stacklevel=4,
            )


@contextlib.contextmanager
def unchanged_parameters(name: str, problems: Mapping[str, Problem], *, values: bool = True) -> Iterator[None]:
    """Put parameters back as they were if a loss that is evaluated inside of the context has changed them.

    Args:
        name: Whose loss.
        problems: Whose parameters.
        values: Not only ``requires_grad``. A write through ``.data`` moves no version counter, so they are copied and
            compared.

    Raises:
        ProblemError: It has.
    """
    before = [
        (f"{problem}.{key}", p, p.detach().clone() if values else None, p.requires_grad)
        for problem, each in problems.items()
        for key, p in each.module.named_parameters()
    ]
    changed, what = [], ""
    try:
        yield
    finally:
        with torch.no_grad():
            for key, p, value, trained in before:
                if value is not None and not torch.equal(p.nan_to_num(), value.nan_to_num()):
                    changed.append(key)
                    what = "writes to the parameter"
                    p.copy_(value)
                if p.requires_grad != trained:
                    changed.append(key)
                    what = "leaves another `requires_grad` at the parameter"
                    p.requires_grad_(trained)
    if changed:
        raise ProblemError(
            f"problem {name!r}: its training_step {what} {changed[0]!r}; it is evaluated more often than there are "
            "steps, so it may change nothing. Parameters may be written in param_callback; x.detach() stops a gradient"
        )
