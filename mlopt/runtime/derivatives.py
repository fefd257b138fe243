"""The derivatives of one problem's loss, as the runtime asks for them, and their implementation by captured graphs.

The contract has a second implementation in `reference.py` (plain autograd on the user's code), against which this one
is verified and which takes its place where it disagrees.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mlopt.autodiff import (
    FlatLayout,
    GradientGraph,
    LinearizationGraphs,
    ReadGradientGraph,
    gradient_graph,
    linearization_graphs,
    read_gradient_graph,
)
from mlopt.autodiff.split import draws_random
from mlopt.backends import AbstractBackend
from mlopt.capture import InputRole, LossGraph
from mlopt.planner import ProductNeeds
from mlopt.runtime.data import Batch


@dataclasses.dataclass(frozen=True)
class GradientResult:
    """What one forward and backward of a loss gives.

    Attributes:
        loss: 0-d tensor.
        metrics: The user's metrics; 0-d tensors or Python values as the user returned them.
        own: One gradient per trained parameter in layout order; None where the loss does not use it.
        cotangents: Problem read -> gradient with respect to its trained parameters, [N_r].
        buffers: (live buffer, its value after this pass); a real step writes them, a hypergradient does not.
    """

    loss: torch.Tensor
    metrics: dict[str, Any]
    own: list[torch.Tensor | None]
    cotangents: dict[str, torch.Tensor]
    buffers: list[tuple[torch.Tensor, torch.Tensor]]


class AbstractLinearization(abc.ABC):
    """Second-order products of a loss g at one point."""

    @abc.abstractmethod
    def hvp(self, vector: torch.Tensor) -> torch.Tensor:
        """Return ``H v`` [N], or ``G v`` if the plan asks for Gauss-Newton products."""

    @abc.abstractmethod
    def mixed(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``(d2g/dr dtheta)^T q`` [N_r] for each planned target r."""


class AbstractDerivatives(abc.ABC):
    """Derivatives of one problem's loss on batches of one kind, at the live parameters."""

    is_random: bool

    @abc.abstractmethod
    def accepts(self, batch: Batch) -> bool:
        """Whether this object is valid for a batch of another shape (same structure, dtypes and number of tensors)."""

    @abc.abstractmethod
    def gradient(self, batch: Batch) -> GradientResult:
        """One forward and backward."""

    @abc.abstractmethod
    def linearize(self, batch: Batch) -> AbstractLinearization:
        """Forward and backward kept for second-order products."""

    @abc.abstractmethod
    def read_gradient(self, batch: Batch, own: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return dg/dr [N_r] for each planned target r, with the own parameters set to `own` [N]."""


@dataclasses.dataclass(frozen=True)
class DerivativeGraphs:
    """All graphs of one problem that the program uses, before lowering."""

    loss: LossGraph
    gradient: GradientGraph
    linearization: LinearizationGraphs | None
    read_gradient: ReadGradientGraph | None

    def modules(self) -> dict[str, torch.fx.GraphModule]:
        """Return the graphs by name, in the order they are used."""
        found = {"gradient": self.gradient.traced.module}
        if self.linearization is not None:
            found["primal"] = self.linearization.primal
            if self.linearization.hvp is not None:
                found["hvp"] = self.linearization.hvp
            if self.linearization.mixed is not None:
                found["mixed"] = self.linearization.mixed
        if self.read_gradient is not None:
            found["read gradient"] = self.read_gradient.traced.module
        return found


def differentiate(
    loss: LossGraph, batch: Batch, layouts: Mapping[str, FlatLayout], needs: ProductNeeds
) -> DerivativeGraphs:
    """Build the graphs of the derivatives that the program needs."""
    inputs = bind_inputs(loss, batch)
    linearization = read_gradient = None
    if needs.hvp or needs.mixed:
        linearization = linearization_graphs(
            loss, inputs, layouts, hvp=needs.hvp, targets=needs.mixed, curvature=needs.curvature
        )
    if needs.read_gradients:
        read_gradient = read_gradient_graph(loss, inputs, layouts, needs.read_gradients)
    gradient = gradient_graph(loss, inputs, layouts, needs.cotangents)
    return DerivativeGraphs(loss, gradient, linearization, read_gradient)


def bind_inputs(loss: LossGraph, batch: Batch) -> list[torch.Tensor]:
    """Return the tensors to call a graph of this loss with: the live ones, and the batch's."""
    from_batch = iter(batch.tensors)
    return [next(from_batch) if x.role is InputRole.BATCH else _live(x.tensor) for x in loss.inputs]


def _live(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


class GraphDerivatives(AbstractDerivatives):
    """Derivatives by captured graphs, lowered by a backend."""

    def __init__(self, graphs: DerivativeGraphs, backend: AbstractBackend) -> None:
        self.graphs = graphs
        self._loss = graphs.loss
        self._call = {name: backend.lower(module) for name, module in graphs.modules().items()}
        self.is_random = any(draws_random(n) for n in graphs.gradient.traced.module.graph.nodes)

    def accepts(self, batch: Batch) -> bool:
        """Evaluate the shape guards of every graph."""
        graphs = self.graphs
        traced = [g.traced for g in (graphs.gradient, graphs.linearization, graphs.read_gradient) if g is not None]
        return all(guard.accepts(batch.tensors) for guard in (self._loss.guard, *(t.guard for t in traced)))

    def gradient(self, batch: Batch) -> GradientResult:
        """Run the gradient graph."""
        inputs = bind_inputs(self._loss, batch)
        graph, loss = self.graphs.gradient, self._loss
        outputs = list(self._call["gradient"](*inputs))
        ends = list(itertools.accumulate([1, len(loss.metrics), len(graph.own), len(graph.cotangents)]))
        (value,), metrics, own, cotangents, buffers = (
            outputs[a:b] for a, b in itertools.pairwise([0, *ends, len(outputs)])
        )
        named = {
            m.name: v.item() if m.is_number and isinstance(v, torch.Tensor) else v
            for m, v in zip(loss.metrics, metrics, strict=True)
        }
        return GradientResult(
            loss=value,
            metrics={**loss.constant_metrics, **named},
            own=own,
            cotangents=dict(zip(graph.cotangents, cotangents, strict=True)),
            buffers=[(inputs[i], v) for i, v in zip(graph.written_buffers, buffers, strict=True)],
        )

    def linearize(self, batch: Batch) -> AbstractLinearization:
        """Run the primal graph."""
        graphs = self.graphs.linearization
        assert graphs is not None, f"the plan of {self._loss.problem} needs no linearization"
        residuals = self._call["primal"](*bind_inputs(self._loss, batch))
        return _GraphLinearization(residuals, self._call, graphs.targets)

    def read_gradient(self, batch: Batch, own: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the read-gradient graph."""
        graph = self.graphs.read_gradient
        assert graph is not None, f"the plan of {self._loss.problem} needs no read gradient"
        outputs = self._call["read gradient"](*bind_inputs(self._loss, batch), own)
        return dict(zip(graph.targets, outputs, strict=True))


class _GraphLinearization(AbstractLinearization):
    def __init__(
        self, residuals: Sequence[Any], call: Mapping[str, Callable[..., Any]], targets: tuple[str, ...]
    ) -> None:
        self._residuals = residuals
        self._call = call
        self._targets = targets

    def hvp(self, vector: torch.Tensor) -> torch.Tensor:
        (product,) = self._call["hvp"](*self._residuals, vector)
        return product

    def mixed(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._targets, self._call["mixed"](*self._residuals, vector), strict=True))
