"""What stands for the user's problems in a loaded plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mlopt.errors import CaptureError, DataError, SaveError
from mlopt.problem import Problem
from mlopt.runtime.plan_state import tensors_of

# Settings of a problem that are plain values, by the name of the argument.
_PLAIN = (
    *("unroll_steps", "warmup_steps", "gradient_accumulation", "roll_back", "tasks"),
    *("clip_norm", "normalize_gradient", "precision", "scheduler_metric"),
)


def describe(problem: Problem) -> dict[str, Any]:
    """Return a problem as plain data: everything but the values of its tensors.

    Raises:
        SaveError: Part of it is the user's code.
    """
    own_code = problem.step_hooks()
    if type(problem).optimizer_hyperparameters is not Problem.optimizer_hyperparameters:
        own_code.append("optimizer_hyperparameters")
    own_code += ["get_batch"] * problem.draws_batches + ["epoch_callback"] * problem.has_epoch_callback
    if own_code:
        raise SaveError(
            f"problem {problem.name!r} overrides {', '.join(own_code)}, which is code and not part of a saved plan; "
            "plans whose problems only override training_step can be saved"
        )
    held = {id(p): name for name, p in problem.module.named_parameters()}
    trained = problem.trained_parameters()
    optimizer = problem.optimizer
    return {
        "name": problem.name,
        "settings": {key: getattr(problem, key) for key in _PLAIN},
        "has_data": problem.data is not None,
        "scheduler": None if problem.scheduler is None else type(problem.scheduler).__name__,
        "tensors": [
            {
                "name": name,
                # Of one task: the problem adds the leading axis.
                "shape": list(t.shape[1:] if problem.tasks is not None and name in trained else t.shape),
                "dtype": str(t.dtype).removeprefix("torch."),
                "device": str(t.device),
                "is_parameter": isinstance(t, nn.Parameter),
                "requires_grad": t.requires_grad,
            }
            for name, t in tensors_of(problem).items()
        ],
        "optimizer": {
            "class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "is_torchs": getattr(torch.optim, type(optimizer).__name__, None) is type(optimizer),
            "groups": [[held[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        },
    }


class LoadedProblem(Problem):
    """A problem of a loaded plan. Its `training_step` is gone: what it computed is in the graphs."""

    def training_step(self, batch: Any) -> torch.Tensor | dict[str, Any]:
        """Refuse."""
        raise CaptureError(
            f"problem {self.name!r} belongs to a loaded plan, which has no training_step: only what was captured "
            "when it was saved can run"
        )


class _NoData:
    """Data that was not handed to `load`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __iter__(self) -> Iterator[Any]:
        raise DataError(
            f"problem {self._name!r}: its data is no part of a saved plan; hand it over: "
            f"mlopt.load(path, data={{{self._name!r}: loader}})"
        )


def rebuild(
    saved: Mapping[str, Any],
    *,
    hypergradient: Any,
    data: Iterable[Any] | None,
    module: nn.Module | None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None,
) -> LoadedProblem:
    """Make a problem of what `describe` returned.

    Args:
        saved: The description.
        hypergradient: Its estimator.
        data: Its data, if it is handed over.
        module: Its module; default: one that holds the tensors under their names and computes nothing.
        optimizer: Makes its optimizer from the module; default: one of torch's, with the groups it had.
        scheduler: Makes its scheduler from the optimizer.

    Raises:
        SaveError: Something that cannot be rebuilt was not handed over.
    """
    name = saved["name"]
    module = _container(saved["tensors"]) if module is None else module
    made = _optimizer(name, saved["optimizer"], module) if optimizer is None else optimizer(module)
    if saved["scheduler"] is not None and scheduler is None:
        raise SaveError(
            f"problem {name!r}: it had a scheduler ({saved['scheduler']}), whose settings are no part of a saved plan; "
            f"hand over what makes it: mlopt.load(path, schedulers={{{name!r}: lambda optimizer: ...}})"
        )
    if data is None and saved["has_data"]:
        data = _NoData(name)
    return LoadedProblem(
        name,
        module=module,
        optimizer=made,
        data=data,
        scheduler=None if scheduler is None else scheduler(made),
        hypergradient=hypergradient,
        **saved["settings"],
    )


def _container(tensors: list[dict[str, Any]]) -> nn.Module:
    root = nn.Module()
    for t in tensors:
        *path, last = t["name"].split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        value = torch.zeros(t["shape"], dtype=getattr(torch, t["dtype"]), device=t["device"])
        if t["is_parameter"]:
            module.register_parameter(last, nn.Parameter(value, requires_grad=t["requires_grad"]))
        else:
            module.register_buffer(last, value)
    return root


def _optimizer(name: str, saved: Mapping[str, Any], module: nn.Module) -> torch.optim.Optimizer:
    if not saved["is_torchs"]:
        raise SaveError(
            f"problem {name!r}: its optimizer {saved['class']} is none of torch.optim; hand over what makes it: "
            f"mlopt.load(path, optimizers={{{name!r}: lambda module: ...}})"
        )
    parameters = dict(module.named_parameters())
    groups: list[dict[str, Any]] = [{"params": [parameters[p] for p in group]} for group in saved["groups"]]
    kind = getattr(torch.optim, saved["class"].rpartition(".")[2])
    # Settings come with the state. Some optimizers insist on a learning rate all the same.
    needs_lr = "lr" in inspect.signature(kind).parameters
    made: torch.optim.Optimizer = kind(groups, **({"lr": 1e-3} if needs_lr else {}))
    return made
