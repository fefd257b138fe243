"""`LossGraph`: what capture hands to the rest of the compiler."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mlopt.capture.attributes import ReadAttribute
from mlopt.capture.batch import BatchSpec
from mlopt.capture.guard import ShapeGuard


class InputRole(enum.Enum):
    """What a graph input is to the problem whose loss the graph computes."""

    OWN = "own"  # a parameter this problem's optimizer trains
    READ = "read"  # a parameter another problem's optimizer trains
    CONSTANT = "constant"  # a parameter nobody trains, or a tensor met in training_step
    BUFFER = "buffer"  # a module buffer, possibly written by the graph
    BATCH = "batch"  # a tensor of the batch


@dataclasses.dataclass(frozen=True)
class GraphInput:
    """One placeholder of a captured graph.

    Attributes:
        role: See `InputRole`.
        problem: The problem the tensor belongs to ("" for constants met in `training_step`).
        name: The tensor's name inside that problem's module, or the batch position.
        tensor: The live tensor, or None for batch inputs. Kept by reference: the user's tensors stay theirs.
    """

    role: InputRole
    problem: str
    name: str
    tensor: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric of a loss: its key, and whether the user returned a Python number (then it is given back as one)."""

    name: str
    is_number: bool


@dataclasses.dataclass(frozen=True)
class LossGraph:
    """One problem's loss as an FX graph.

    Attributes:
        problem: Name of the problem.
        module: ``f(*inputs) -> (loss, *metric tensors)``; inputs in the order of `inputs`. Buffers and batch tensors
            may be written in place, so callers hand in clones. ``loss`` is a 0-d floating tensor.
        inputs: What each placeholder is.
        metrics: The metrics that are tensors in the graph, in output order.
        constant_metrics: Metrics that the capture found to be plain Python values.
        reads: For each other problem, the names of its trained parameters that the *loss* depends on.
        used_own: Names of the own trained parameters that the loss depends on.
        batch_spec: Structure of the batches that this graph accepts.
        dynamic_dims: For each input, the dimensions whose size is free.
        guard: For which batch shapes the capture is valid.
        attributes: The plain Python values that `training_step` read, which are constants of the graph.
        precision: That of the problem: the module is to be evaluated under `mlopt.precision.autocast`.
        scale: Position of the input that is the loss scale; the module does not use it, what differentiates it does.
    """

    problem: str
    module: fx.GraphModule
    inputs: tuple[GraphInput, ...]
    metrics: tuple[Metric, ...]
    constant_metrics: dict[str, object]
    reads: dict[str, tuple[str, ...]]
    used_own: frozenset[str]
    batch_spec: BatchSpec
    dynamic_dims: tuple[frozenset[int], ...]
    guard: ShapeGuard
    attributes: tuple[ReadAttribute, ...] = ()
    precision: str | None = None
    scale: int | None = None

    def seen_problems(self) -> set[str]:
        """Return the other problems whose tensors the graph uses at all, also where no derivative passes."""
        placeholders = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        used = {x.problem for x, node in zip(self.inputs, placeholders, strict=True) if node.users}
        return used - {self.problem, ""}

    def positions(self, role: InputRole, problem: str | None = None) -> list[int]:
        """Return the input positions of one role, optionally of one problem."""
        return [i for i, x in enumerate(self.inputs) if x.role is role and (problem is None or x.problem == problem)]

    def live(self, position: int) -> torch.Tensor:
        """Return the live tensor of an input that is not the batch's."""
        tensor = self.inputs[position].tensor
        assert tensor is not None
        return tensor

    def bind(
        self, batch: Sequence[torch.Tensor], values: Mapping[int, torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Return the tensors to call a graph of this loss with.

        Args:
            batch: The tensors of the batch.
            values: ``id`` of a live tensor -> what to take in its place.
        """
        live, places = self._places
        bound = [values.get(id(t), t) for t in live] if values else list(live)
        from_batch = iter(batch)
        for position in places:
            bound[position] = next(from_batch)
        return bound

    @functools.cached_property
    def _places(self) -> tuple[list[Any], list[int]]:
        """The live tensors of the inputs, None where they are the batch's; and where those are."""
        return [x.tensor for x in self.inputs], self.positions(InputRole.BATCH)

    def named_metrics(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return all metrics as `training_step` returned them, given those that are outputs of the graph."""
        named = {
            m.name: v.item() if m.is_number and isinstance(v, torch.Tensor) else v
            for m, v in zip(self.metrics, values, strict=True)
        }
        return {**self.constant_metrics, **named}

    def metrics_of_steps(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return the metrics of several steps by name, given those that are outputs of the graph; without None."""
        named = {m.name: v for m, v in zip(self.metrics, values, strict=True) if v is not None}
        return {**self.constant_metrics, **named}
