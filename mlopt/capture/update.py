"""`UpdateGraph`: one ``step()`` of a live optimizer as a functional graph.

`capture_update` runs the optimizer's own ``step`` once, on stand-ins for its parameters, state and
hyperparameters, and records it. Nothing is known there of any optimizer in particular: a user-written one is captured
like those of PyTorch. The user's optimizer, its state and its parameters are read and never written.

What steers the optimizer's Python code becomes the validity of the graph, in two parts. Its *signature* holds what must
be equal: the class, which parameter is in which group, flags such as ``nesterov``, and which state tensors exist (a
first step, which makes them, is another graph than later ones). Its *guard* is a small graph of the questions that the
code asked of numbers (``weight_decay != 0``, ``rho_t > 5``), to be answered again for other hyperparameters and steps.

The graph serves the compiled step and is not differentiated: the derivatives of a step (`mlopt.Unroll`, `mlopt.SAMA`)
are taken of the optimizer's own code, by `mlopt.autodiff.update`, which needs no capture per state and follows every
branch. What the graph is for is machine code, where it must be one functional graph with numbers as inputs.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mlopt.capture.optimizer_watch import OptimizerWatch, hooks_of, watch
from mlopt.errors import UpdateError

# They choose between implementations of one formula. The capture always takes the plain one.
IMPLEMENTATION_FLAGS = ("foreach", "fused", "capturable", "differentiable")


class UpdateRole(enum.Enum):
    """What an input or an output of an update graph is to the optimizer."""

    PARAMETER = "parameter"
    GRADIENT = "gradient"
    STATE = "state"  # an entry of optimizer.state[parameter]
    HYPERPARAMETER = "hyperparameter"  # a number of a param group


@dataclasses.dataclass(frozen=True)
class UpdateValue:
    """One input or output of an update graph.

    Attributes:
        role: See `UpdateRole`.
        parameter: Name of the parameter that it belongs to ("" for hyperparameters).
        key: Its key in the state of the parameter or in the param group ("" for parameters and gradients).
        index: Position in a tuple of hyperparameters (``betas``), or None.
        group: Number of the param group.
        number: int or float for what the optimizer keeps as a Python number; the graph has a 0-d float64 tensor.
    """

    role: UpdateRole
    parameter: str
    key: str = ""
    index: int | None = None
    group: int = 0
    number: type | None = None

    def __str__(self) -> str:
        """Say what it is, for messages and listings."""
        if self.role is UpdateRole.HYPERPARAMETER:
            where = "" if self.index is None else f"[{self.index}]"
            return f"group {self.group}: {self.key}{where}"
        return f"{self.role.value} {self.parameter}" + (f".{self.key}" if self.key else "")


@dataclasses.dataclass(frozen=True, eq=False)
class UpdateGraph:
    """One step of an optimizer, ``f(*inputs) -> outputs``, functional.

    Attributes:
        problem: Name of the problem.
        optimizer: The live optimizer. Kept by reference: the user's objects stay theirs.
        parameters: The live parameters that receive a gradient, by name, in the order of the inputs.
        module: The graph. Its outputs never share memory with its inputs.
        inputs: What each placeholder is: parameters, gradients, state, hyperparameters, in this order.
        outputs: What each output is: the new parameters, the new state, and numbers of the param groups that the
            step itself changes.
        made: State entries that are no tensors and no numbers (None, flags) and that the step makes or changes.
        guard: ``f(*inputs) -> bools``, what the optimizer's code asked about numbers; depends on hyperparameters and
            0-d state only.
        answers: The answers that the graph was made for.
        signature: What must be equal for the graph to hold.
    """

    problem: str
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, torch.Tensor]
    module: fx.GraphModule
    inputs: tuple[UpdateValue, ...]
    outputs: tuple[UpdateValue, ...]
    made: Mapping[tuple[str, str], object]
    guard: fx.GraphModule
    answers: tuple[bool, ...]
    signature: tuple[object, ...]

    def positions(self, role: UpdateRole) -> list[int]:
        """Return the input positions of one role."""
        return [i for i, x in enumerate(self.inputs) if x.role is role]

    def output_positions(self, role: UpdateRole) -> list[int]:
        """Return the output positions of one role."""
        return [i for i, x in enumerate(self.outputs) if x.role is role]

    def of(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> UpdateGraph:
        """Return the same graph for another optimizer of the same kind, and its parameters of the same names."""
        return dataclasses.replace(self, optimizer=optimizer, parameters=dict(parameters))

    def bind(self, gradients: Mapping[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Return the live tensors in the order of `inputs`, numbers as new 0-d float64 tensors.

        Args:
            gradients: The gradients by parameter name; default: ``parameter.grad``.

        Raises:
            UpdateError: A gradient is missing or sparse, or a state entry is gone.
        """
        return [self.live(x, gradients) for x in self.inputs]

    def accepts(self, tensors: Sequence[torch.Tensor] | None = None) -> bool:
        """Whether the graph is the step that the live optimizer would make now.

        Args:
            tensors: What `bind` returned, if it is at hand.
        """
        if signature_of(self.optimizer, self.parameters) != self.signature:
            return False
        if not self.answers:
            return True
        if tensors is None:
            # The guard reads numbers and counters; gradients are there for the order of the arguments only.
            tensors = self.bind(dict(self.parameters))
        return tuple(bool(x) for x in self.guard(*tensors)) == self.answers

    def apply(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Make one functional step: the new values in the order of `outputs`.

        To go on from the results, match `outputs` with the `inputs` of the next step's graph; equal `UpdateValue`s are
        the same tensor.
        """
        with torch.no_grad():
            return list(self.module(*tensors))

    def targets(self) -> list[torch.Tensor | None]:
        """Return the live tensor that each output is written into; None for what is no tensor, or not there yet."""
        return [self._target(x) for x in self.outputs]

    def commit(
        self,
        results: Sequence[torch.Tensor],
        also: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),
        targets: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        """Write the results of a step into the live parameters, state and param groups, as ``step()`` would.

        Live tensors are written in one call into torch, which no signal interrupts.

        Args:
            results: New values in the order of `outputs`.
            also: (live tensor, new value) pairs to write together with them.
            targets: What `targets` returns, where it is known.
        """
        written, values = [live for live, _ in also], [value for _, value in also]
        others: list[tuple[UpdateValue, torch.Tensor]] = []
        for x, live, value in zip(self.outputs, targets or self.targets(), results, strict=True):
            if live is None:
                others.append((x, value))
            else:
                written.append(live)
                values.append(value if value.shape == live.shape else value.reshape(live.shape))
        with torch.no_grad():
            if written:
                torch._foreach_copy_(written, values)
            for x, value in others:
                self._store(x, value.detach())
        self.store_constants()

    def store_constants(self) -> None:
        """Write what every step leaves in the optimizer's state and is no result of the graph."""
        for (name, key), constant in self.made.items():
            self.optimizer.state[self.parameters[name]][key] = constant

    def is_free(self) -> bool:
        """Whether the live optimizer's ``step()`` is its class's, with no hooks that a graph would not call."""
        own = vars(self.optimizer).get("step")
        replaced = own is not None and inspect.unwrap(own) is not inspect.unwrap(type(self.optimizer).step)
        return not replaced and not any(hooks_of(self.optimizer))

    def watch(self) -> OptimizerWatch | None:
        """Return what tells that `accepts` and `is_free` still answer as they do now; None if nothing can.

        Then a branch depends on a counter, or a number is a tensor.
        """
        return None if self.guard_reads(UpdateRole.STATE) else watch(self.optimizer, self.parameters, self._steering)

    def guard_reads(self, role: UpdateRole) -> bool:
        """Whether what the optimizer's code branches on depends on an input of this role."""
        return any(x.role is role for x in self._guarding)

    def number(self, x: UpdateValue) -> float:
        """Return the present value of a hyperparameter."""
        value = self.optimizer.param_groups[x.group][x.key]
        return float(value if x.index is None else value[x.index])

    @functools.cached_property
    def _guarding(self) -> list[UpdateValue]:
        nodes = [n for n in self.guard.graph.nodes if n.op == "placeholder"]
        return [x for x, n in zip(self.inputs, nodes, strict=True) if n.users]

    @functools.cached_property
    def _steering(self) -> set[tuple[int, str]]:
        return {(x.group, x.key) for x in self._guarding if x.role is UpdateRole.HYPERPARAMETER}

    def _target(self, x: UpdateValue) -> torch.Tensor | None:
        """Return the live tensor that an output is written into, if there is one."""
        if x.role is UpdateRole.PARAMETER:
            return self.parameters[x.parameter]
        if x.role is UpdateRole.STATE and x.number is None:
            value = self.optimizer.state[self.parameters[x.parameter]].get(x.key)
            return value if isinstance(value, torch.Tensor) else None
        return None

    def live(self, x: UpdateValue, gradients: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return the present value of one input; see `bind`."""
        if x.role is UpdateRole.HYPERPARAMETER:
            value = self.optimizer.param_groups[x.group][x.key]
            return _number(value if x.index is None else value[x.index])
        parameter = self.parameters[x.parameter]
        if x.role is UpdateRole.PARAMETER:
            return parameter
        if x.role is UpdateRole.STATE:
            state = self.optimizer.state.get(parameter, {})
            if x.key not in state:
                raise UpdateError(
                    f"problem {self.problem!r}: the optimizer's state of {x.parameter!r} has no {x.key!r} any more; "
                    "capture its update again"
                )
            return _number(state[x.key]) if x.number else state[x.key]
        gradient = parameter.grad if gradients is None else gradients.get(x.parameter)
        if gradient is None or gradient.layout is not torch.strided:
            found = "none" if gradient is None else f"one of layout {gradient.layout}"
            raise UpdateError(
                f"problem {self.problem!r}: expected a dense gradient for the parameter {x.parameter!r}, got {found}"
            )
        return gradient

    def _store(self, x: UpdateValue, value: torch.Tensor) -> None:
        entries: dict[str, Any]
        if x.role is UpdateRole.HYPERPARAMETER:
            entries = self.optimizer.param_groups[x.group]
        else:
            entries = self.optimizer.state[self.parameters[x.parameter]]
        old: Any = entries.get(x.key)
        if x.number is not None:
            new = x.number(value.item())
            if x.index is None:
                entries[x.key] = new
            else:
                leaves = [new if i == x.index else y for i, y in enumerate(old)]
                entries[x.key] = leaves if isinstance(old, list) else tuple(leaves)
        elif isinstance(old, torch.Tensor):
            old.copy_(value.reshape(old.shape))
        else:
            entries[x.key] = value.clone()  # `results` stay the caller's


def signature_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> tuple[object, ...]:
    """Return what must be equal for one graph to serve two states of an optimizer."""
    names = {id(p): name for name, p in parameters.items()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        held = tuple(names[id(p)] for p in group["params"] if id(p) in names)
        groups.append((held, tuple(hyperparameters(number, group)), tuple(_constants(group))))
    tensors = tuple(
        (kind_of(p), tuple((key, kind_of(value)) for key, value in optimizer.state.get(p, {}).items()))
        for p in parameters.values()
    )
    return (type(optimizer), tuple(groups), tensors)


def hyperparameters(number: int, group: Mapping[str, Any]) -> Iterator[UpdateValue]:
    """Yield the numbers of one param group, those in tuples (``betas``) one by one."""
    for key, value in group.items():
        if key == "params" or key in IMPLEMENTATION_FLAGS:
            continue
        several = isinstance(value, tuple | list)
        leaves = list(value) if several else [value]
        if leaves and all(is_number(x) or (isinstance(x, torch.Tensor) and x.numel() == 1) for x in leaves):
            for i, leaf in enumerate(leaves):
                kind = type(leaf) if is_number(leaf) else None
                yield UpdateValue(
                    UpdateRole.HYPERPARAMETER, "", key, index=i if several else None, group=number, number=kind
                )


def is_number(value: object) -> bool:
    """Whether a value is a Python number (a flag is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _constants(group: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    numbers = {x.key for x in hyperparameters(0, group)}
    for key, value in group.items():
        if key != "params" and key not in IMPLEMENTATION_FLAGS and key not in numbers:
            yield key, tuple(value) if isinstance(value, list) else value


def kind_of(value: object) -> object:
    """Return what must be equal of two entries for one graph to serve both."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.device, tuple(value.shape))
    return type(value) if is_number(value) else value


def _number(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().reshape(()).double()
    return torch.tensor(float(value), dtype=torch.float64)
