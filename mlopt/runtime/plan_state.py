"""The state of a plan and of all objects it moves, as plain data: what ``plan.state_dict()`` is made of.

Everything in it is a tensor, number, string, dict, list or tuple, so `torch.load` reads it with ``weights_only=True``
(as far as the user's optimizers and schedulers keep to that in their own ``state_dict``).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from mlopt.errors import StateError
from mlopt.problem import Problem
from mlopt.runtime.execute import Executor
from mlopt.runtime.rng import get_all_generators, set_all_generators
from mlopt.runtime.rollback import Snapshot, Unroll
from mlopt.runtime.state import Sample

FORMAT = 1


@dataclasses.dataclass
class Unfinished:
    """Global steps that ended in an error when part of them had been made.

    Attributes:
        left: The lowest problems that have not made all their steps, and how many are left. What is due above them
            then, the counters of their steps tell.
        num_steps: How many global steps it will have been.
    """

    left: dict[str, int]
    num_steps: int


def state_of(executor: Executor, num_steps: int, unfinished: Unfinished | None = None) -> dict[str, Any]:
    """Copy the state; see `Plan.state_dict`."""
    names = {id(t): name for name, t in _live_tensors(executor.problems).items()}
    state = {
        "format": FORMAT,
        "num_steps": num_steps,
        "unfinished": None if unfinished is None else dataclasses.asdict(unfinished),
        "problems": {name: _problem_state(executor, name) for name in executor.problems},
        "guesses": [[*key, guess] for key, guess in executor.guesses.items()],
        "histories": {name: history.state_dict(names) for name, history in executor.histories.items()},
        "unrolls": {
            name: {
                "snapshots": [s.state_dict() for s in unroll.snapshots],
                "steps": [[lower, [s.pack() for s in samples]] for lower, samples in unroll.steps],
            }
            for name, unroll in executor.unrolls.items()
        },
        "generators": get_all_generators(),
    }
    return copy.deepcopy(state)  # one copy at the end keeps what is shared, and later steps do not change it


def restore(
    executor: Executor, state: Mapping[str, Any], *, surroundings: bool = True
) -> tuple[int, Unfinished | None]:
    """Put everything into a state that `state_of` returned.

    Args:
        executor: What is put there.
        state: The state.
        surroundings: Also the position in the data and the random generators.

    Returns:
        The number of global steps made, and what there is of another one.
    """
    problems = executor.problems
    if state.get("format") != FORMAT:
        raise StateError(
            f"the state has the format {state.get('format')!r}, expected {FORMAT}: that of Plan.state_dict()"
        )
    if list(state["problems"]) != list(problems):
        raise StateError(
            f"the state is of the problems {', '.join(state['problems'])}, the plan of {', '.join(problems)}"
        )
    for name, problem in problems.items():
        saved = state["problems"][name]
        _check_tensors(problem, saved["tensors"])
        for kind, present in (("scheduler", problem.scheduler), ("loss_scale", problem.loss_scale)):
            if (present is None) != (saved[kind] is None):
                raise StateError(
                    f"problem {name!r}: it has {'no' if present is None else 'a'} {kind.replace('_', ' ')}, the state "
                    f"was saved with{'out' if saved[kind] is None else ''} one"
                )
    if set(state["histories"]) != set(executor.histories):
        raise StateError(
            f"the state has the last optimizer steps of {', '.join(state['histories']) or 'no problem'}, the plan "
            f"needs those of {', '.join(executor.histories) or 'none'}: its estimators are others"
        )
    state = copy.deepcopy(dict(state))
    for name in problems:
        _restore_problem(executor, name, state["problems"][name])
        if surroundings:
            executor.states[name].stream.load_state_dict(state["problems"][name]["data"])

    def sample(name: str, data: dict[str, Any]) -> Sample:
        return Sample.unpack(data, executor.states[name].stream, executor.layouts[name].device)

    executor.guesses = {(name, slot): guess.to(executor.layouts[name].device) for name, slot, guess in state["guesses"]}
    ids = {name: id(t) for name, t in _live_tensors(problems).items()}
    for name, history in executor.histories.items():
        history.load_state_dict(state["histories"][name], ids, lambda data, name=name: sample(name, data))  # type: ignore[misc]
    executor.unrolls = {
        name: Unroll(
            [Snapshot.of_state_dict(problems[s["problem"]], s) for s in unroll["snapshots"]],
            [(lower, tuple(sample(lower, s) for s in samples)) for lower, samples in unroll["steps"]],
        )
        for name, unroll in state["unrolls"].items()
    }
    if surroundings:
        set_all_generators(state["generators"])  # last: fetching batches has moved them
    unfinished = state.get("unfinished")
    return int(state["num_steps"]), None if unfinished is None else Unfinished(**unfinished)


def tensors_of(problem: Problem) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers of a problem's module by name, those without a place in its state_dict, too."""
    return {**dict(problem.module.named_parameters()), **dict(problem.module.named_buffers())}


def _live_tensors(problems: Mapping[str, Problem]) -> dict[str, torch.Tensor]:
    return {f"{name}|{key}": t for name, problem in problems.items() for key, t in tensors_of(problem).items()}


def _problem_state(executor: Executor, name: str) -> dict[str, Any]:
    problem, state = executor.problems[name], executor.states[name]
    return {
        "tensors": {key: t.detach() for key, t in tensors_of(problem).items()},
        "optimizer": problem.optimizer.state_dict(),
        "scheduler": None if problem.scheduler is None else problem.scheduler.state_dict(),
        "loss_scale": None if problem.loss_scale is None else problem.loss_scale.state_dict(),
        "num_steps": state.num_steps,
        "steps_seen": state.steps_seen,
        "samples": [s.pack() for s in state.samples],
        "data": state.stream.state_dict(),
        "extra": problem.get_extra_state(),
    }


def _restore_problem(executor: Executor, name: str, saved: dict[str, Any]) -> None:
    problem, state = executor.problems[name], executor.states[name]
    with torch.no_grad():
        for key, tensor in tensors_of(problem).items():
            tensor.copy_(saved["tensors"][key])
    load_optimizer(problem.optimizer, saved["optimizer"])
    if problem.scheduler is not None:
        problem.scheduler.load_state_dict(saved["scheduler"])
    if problem.loss_scale is not None:
        problem.loss_scale.load_state_dict(saved["loss_scale"])
    if saved.get("extra") is not None:
        problem.set_extra_state(saved["extra"])
    state.num_steps, state.steps_seen = saved["num_steps"], saved["steps_seen"]
    device = executor.layouts[name].device
    state.samples = tuple(Sample.unpack(s, state.stream, device) for s in saved["samples"])


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's ``state_dict`` without the change of dtype that torch makes.

    ``Optimizer.load_state_dict`` casts state to the parameter's dtype; NAdam's float32 product of a float64 parameter,
    say, would go on in float64 and round otherwise.
    """
    optimizer.load_state_dict(dict(state))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state["state"].items():
        loaded = optimizer.state[parameters[index]] if isinstance(index, int) else {}
        for key, value in entries.items():
            now = loaded.get(key)
            if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor) and now.dtype != value.dtype:
                loaded[key] = value.to(now.device)


def _check_tensors(problem: Problem, saved: Mapping[str, torch.Tensor]) -> None:
    live = tensors_of(problem)
    for key in dict.fromkeys([*saved, *live]):
        if key not in live or key not in saved:
            raise StateError(
                f"problem {problem.name!r}: {key!r} is a tensor of the {'saved state' if key in saved else 'module'} "
                "and not of the other; give the module that the state was saved with"
            )
        if live[key].shape != saved[key].shape or live[key].dtype != saved[key].dtype:
            raise StateError(
                f"problem {problem.name!r}, tensor {key!r}: expected {live[key].dtype} of shape "
                f"{tuple(live[key].shape)}, got {saved[key].dtype} of shape {tuple(saved[key].shape)}"
            )
