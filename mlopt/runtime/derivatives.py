"""The derivatives of one problem's loss, as the runtime asks for them, and their implementation by captured graphs.

The contract has a second implementation in `reference.py` (plain autograd on the user's code), against which this one
is verified and which takes its place where it disagrees.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from mlopt.autodiff import (
    DescentGraph,
    FlatLayout,
    GradientGraph,
    LinearizationGraphs,
    ReadGradientGraph,
    RepeatedSteps,
    SplitPolicy,
    StepGraph,
    TaskAxis,
    TotalUpdateGraph,
    fits,
    gradient_and_linearization_graphs,
    gradient_graph,
    gradient_over_tasks,
    is_random,
    linearization_graphs,
    linearization_over_tasks,
    read_gradient_graph,
    read_gradient_over_tasks,
    replace_layers,
    shares_gradient,
)
from mlopt.backends import AbstractBackend, Compiled, Lowering
from mlopt.capture import LossGraph
from mlopt.hypergradient import AbstractEstimator
from mlopt.planner import ProductNeeds
from mlopt.runtime.data import Batch
from mlopt.runtime.lowered_update import CompiledUpdate
from mlopt.runtime.steps import CompiledStep


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

    def hvps(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``H v`` for each row of [K, N]."""
        return torch.stack([self.hvp(row) for row in rows])

    @abc.abstractmethod
    def mixed(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``(d2g/dr dtheta)^T q`` [N_r] for each planned target r."""

    def native_hvp(self) -> Any:
        """Return ``v -> H v`` [N], or [T, N] with tasks, as a native operator (see `mlopt.linalg.native`), or None."""
        return None


class MeanLinearization(AbstractLinearization):
    """Products of the mean of several losses: those of the micro-batches of one step."""

    def __init__(self, parts: Sequence[AbstractLinearization]) -> None:
        self._parts = parts

    def hvp(self, vector: torch.Tensor) -> torch.Tensor:
        """Average over the parts."""
        return mean([part.hvp(vector) for part in self._parts])

    def hvps(self, rows: torch.Tensor) -> torch.Tensor:
        """Average over the parts."""
        return mean([part.hvps(rows) for part in self._parts])

    def mixed(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Average over the parts."""
        return mean_of_each([part.mixed(vector) for part in self._parts])


def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Average tensors of one shape; one tensor is returned as it is."""
    if len(tensors) == 1:
        return tensors[0]
    total = tensors[0] + tensors[1]
    for tensor in tensors[2:]:
        total = total + tensor
    return total / len(tensors)


def mean_result(results: Sequence[GradientResult], buffers: list[tuple[torch.Tensor, torch.Tensor]]) -> GradientResult:
    """Average what the micro-batches of one step gave.

    Args:
        results: One per micro-batch.
        buffers: The buffers after the last one.

    Returns:
        The mean of losses, gradients and metrics. A metric that is no number is that of the last micro-batch.
    """
    if len(results) == 1:
        return results[0]
    own = []
    for parts in zip(*(r.own for r in results), strict=True):
        found = [p for p in parts if p is not None]
        own.append(mean(found) * (len(found) / len(parts)) if found else None)
    metrics: dict[str, Any] = {}
    for name, last in results[-1].metrics.items():
        values = [r.metrics[name] for r in results if name in r.metrics]
        averaged = all(isinstance(v, float | torch.Tensor) for v in values)
        metrics[name] = sum(values[1:], values[0]) / len(values) if averaged else last
    return GradientResult(
        loss=mean([r.loss for r in results]),
        metrics=metrics,
        own=own,
        cotangents=mean_of_each([r.cotangents for r in results]),
        buffers=buffers,
    )


def mean_of_each(products: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Average the entries of several dicts with the same keys."""
    return {name: mean([p[name] for p in products]) for name in products[0]}


class AbstractDerivatives(abc.ABC):
    """Derivatives of one problem's loss on batches of one kind, at the live parameters."""

    is_random: bool
    runs_user_code: bool = True
    backend: AbstractBackend | None = None  # what the graphs run by, where there are any
    step: CompiledStep | None = None  # the whole optimizer step, where there is a graph of it
    update: CompiledUpdate | None = None  # what follows the gradients, for a problem above others

    @abc.abstractmethod
    def at(self, values: Mapping[int, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """Evaluate at another point: parameters and buffers have these values inside of the context.

        Args:
            values: ``id`` of a live tensor -> the value to use in its place. Linearizations made inside of the
                context must be used inside of it.
        """

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
    has_tasks: bool = False
    step: StepGraph | None = None
    repeated: RepeatedSteps | None = None  # of `step`
    descent: DescentGraph | None = None  # of `step`, in place of `repeated`
    update: TotalUpdateGraph | None = None

    def without_updates(self) -> DerivativeGraphs:
        """Return the graphs that know nothing of the optimizer."""
        return dataclasses.replace(self, step=None, repeated=None, descent=None, update=None)

    def modules(self) -> dict[str, torch.fx.GraphModule]:
        """Return the graphs by name, in the order they are used."""
        found = {"gradient": self.gradient.traced.module}
        if self.linearization is not None:
            found["primal"] = self.linearization.primal
            if self.linearization.hvp is not None:
                found["hvp"] = self.linearization.hvp
            if self.linearization.hvps is not None:
                found["hvps"] = self.linearization.hvps
            if self.linearization.mixed is not None:
                found["mixed"] = self.linearization.mixed
        if self.read_gradient is not None:
            found["read gradient"] = self.read_gradient.traced.module
        if self.step is not None:
            found["step"] = self.step.module
        if self.repeated is not None:
            found[f"{self.repeated.times} steps"] = self.repeated.module
        if self.descent is not None:
            found["descent"] = self.descent.module
        if self.update is not None:
            found["update"] = self.update.module
        return found


def differentiate(
    loss: LossGraph,
    batch: Batch,
    layouts: Mapping[str, FlatLayout],
    needs: ProductNeeds,
    axis: TaskAxis | None = None,
    split: SplitPolicy = SplitPolicy(),  # noqa: B008 - it is immutable
) -> DerivativeGraphs:
    """Build the graphs of the derivatives that the program needs.

    Args:
        loss: The captured loss; with tasks, of one task.
        batch: A batch it is valid for; with tasks, of all tasks.
        layouts: Flat layouts of all problems by name.
        needs: The derivatives that are used.
        axis: The loss's task axis, if it has one.
        split: How second-order products are split into halves.
    """
    loss = dataclasses.replace(loss, module=replace_layers(loss.module))
    whole = inputs = loss.bind(batch.tensors)
    if axis is not None:
        if split.budget is not None:
            split = dataclasses.replace(split, budget=split.budget // axis.num_tasks)
        dims = axis.input_dims(loss)
        inputs = [t if d is None else t[0] for t, d in zip(whole, dims, strict=True)]
    single = {name: layout.of_one_task for name, layout in layouts.items()}
    linearization = read_gradient = None
    given, at_once = (loss, inputs, single), 0 if axis else needs.hvps_at_once
    products: dict[str, Any] = {"hvp": needs.hvp, "targets": needs.mixed, "hvps_at_once": at_once, "split": split}
    if not (needs.hvp or needs.mixed):
        gradient = gradient_graph(*given, needs.cotangents)
    elif (needs.hvp and needs.curvature == "ggn") or not shares_gradient(loss):
        # Gauss-Newton products have another backward: the network outputs are leaves of their own.
        gradient = gradient_graph(*given, needs.cotangents)
        linearization = linearization_graphs(*given, curvature=needs.curvature, **products)
    else:
        gradient, linearization = gradient_and_linearization_graphs(*given, needs.cotangents, **products)
    if needs.read_gradients:
        read_gradient = read_gradient_graph(*given, needs.read_gradients)
    if axis is not None:
        layout = layouts[loss.problem]
        own = torch.empty(layout.vector_shape, dtype=layout.dtype, device=layout.device)
        gradient = gradient_over_tasks(gradient, loss, whole, axis)
        if linearization is not None:
            linearization = linearization_over_tasks(linearization, loss, whole, own, axis)
        if read_gradient is not None:
            read_gradient = read_gradient_over_tasks(read_gradient, loss, whole, own, axis)
    return DerivativeGraphs(loss, gradient, linearization, read_gradient, has_tasks=axis is not None)


class GraphDerivatives(AbstractDerivatives):
    """Derivatives by captured graphs, lowered by a backend."""

    runs_user_code = False

    backend: AbstractBackend

    def __init__(self, graphs: DerivativeGraphs, backend: AbstractBackend) -> None:
        self.graphs = graphs
        self.backend = backend
        self._loss = graphs.loss
        modules = graphs.modules()
        backend.prepare([module for module in modules.values() if not backend.is_prepared(module)])
        self._call = {name: backend.lower(module) for name, module in modules.items()}
        if graphs.step is not None:
            repeated = graphs.repeated
            several = None if repeated is None else (repeated, self._call[f"{repeated.times} steps"])
            descent = None
            if graphs.descent is not None:
                graph = graphs.descent
                call = self._call["descent"]
                descent = backend.lower_descent(graph.structure, graph.module, call, graph.num_steps)
            self.step = CompiledStep(graphs.step, graphs.loss, self._call["step"], several, descent)
        if graphs.update is not None:
            self.update = CompiledUpdate(graphs.update, self._call["update"])
        self._values: Mapping[int, torch.Tensor] = {}
        self.is_random = is_random(graphs.gradient.traced.module)

    def adopt(self, other: GraphDerivatives) -> None:
        """Run the same graphs as another object does from now on; nothing that was linearized before may be in use."""
        assert other.graphs.gradient is self.graphs.gradient, "other graphs, not another backend"
        self.graphs, self.backend, self._call = other.graphs, other.backend, other._call
        self.step, self.update = other.step, other.update

    def compiled(self, name: str) -> Compiled:
        """Return what became of a graph, by its name in `DerivativeGraphs.modules`."""
        return self._call[name]

    def lowerings(self) -> dict[str, Lowering]:
        """Return what became of each graph."""
        found = {name: call.lowering for name, call in self._call.items()}
        if self.step is not None and self.step.descent is not None:
            found["descent"] = self.step.descent.lowering
        return found

    @contextlib.contextmanager
    def at(self, values: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """Give the graphs other tensors for inputs."""
        before, self._values = self._values, {**self._values, **values}
        try:
            yield
        finally:
            self._values = before

    def accepts(self, batch: Batch) -> bool:
        """Evaluate the shape guards of every graph."""
        graphs = self.graphs
        if graphs.has_tasks:
            return False  # batched graphs hold for the sizes they were made for
        traced = [g.traced for g in (graphs.gradient, graphs.linearization, graphs.read_gradient) if g is not None]
        return all(guard.accepts(batch.tensors) for guard in (self._loss.guard, *(t.guard for t in traced)))

    def gradient(self, batch: Batch) -> GradientResult:
        """Run the gradient graph."""
        inputs = self._loss.bind(batch.tensors, self._values)
        graph, loss = self.graphs.gradient, self._loss
        outputs = list(self._call["gradient"](*inputs))
        start = 1 + len(loss.metrics)
        middle = start + len(graph.own)
        end = middle + len(graph.cotangents)
        value, metrics, own, cotangents, buffers = (
            outputs[0],
            outputs[1:start],
            outputs[start:middle],
            outputs[middle:end],
            outputs[end:],
        )
        return GradientResult(
            loss=value,
            metrics=loss.named_metrics(metrics),
            own=own,
            cotangents=dict(zip(graph.cotangents, cotangents, strict=True)),
            buffers=[(loss.live(i), v) for i, v in zip(graph.written_buffers, buffers, strict=True)],
        )

    def linearize(self, batch: Batch) -> AbstractLinearization:
        """Run the primal graph."""
        return self.linearization_of(self.residuals(batch))

    def residuals(self, batch: Batch) -> Sequence[Any]:
        """Return what the primal graph hands over to the products: tensors, and sizes."""
        assert self.graphs.linearization is not None, f"the plan of {self._loss.problem} needs no linearization"
        return self._call["primal"](*self._loss.bind(batch.tensors, self._values))

    def linearization_of(self, residuals: Sequence[Any]) -> AbstractLinearization:
        """Return the products of what `residuals` returned."""
        assert self.graphs.linearization is not None, f"the plan of {self._loss.problem} needs no linearization"
        return _GraphLinearization(residuals, self._call, self.graphs.linearization)

    def read_gradient(self, batch: Batch, own: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the read-gradient graph."""
        graph = self.graphs.read_gradient
        assert graph is not None, f"the plan of {self._loss.problem} needs no read gradient"
        outputs = self._call["read gradient"](*self._loss.bind(batch.tensors, self._values), own)
        return dict(zip(graph.targets, outputs, strict=True))


class _GraphLinearization(AbstractLinearization):
    def __init__(self, residuals: Sequence[Any], call: Mapping[str, Compiled], graphs: LinearizationGraphs) -> None:
        self._residuals = residuals
        self._call = call
        self._targets = graphs.targets
        self._hvp_graph = graphs.hvp
        self._hvps_graph = graphs.hvps

    @functools.cached_property
    def _operator(self) -> Any:
        """The native operator of this point."""
        call = self._call["hvp"]
        return call.native_operator([*self._residuals, None], len(self._residuals))

    @functools.cached_property
    def _kernel(self) -> Any:
        """The native operator, if it is a kernel: then it is the product, wherever one is asked for."""
        call = self._call["hvp"]
        operator = self._operator if call.is_kernel else None
        return operator if call.is_kernel else None  # it may have measured, and decided otherwise

    @functools.cached_property
    def _rows_at_once(self) -> int:
        """How many products the graph of several makes; 0 if there is none for these sizes."""
        if self._hvps_graph is None or not fits(self._hvps_graph, self._residuals):
            return 0
        *_, rows = (n for n in self._hvps_graph.graph.nodes if n.op == "placeholder")
        return int(rows.meta["val"].shape[0])

    def hvp(self, vector: torch.Tensor) -> torch.Tensor:
        if self._kernel is not None:
            return self._kernel.apply(vector) if vector.ndim == 1 else self._kernel.apply_rows(vector)
        (product,) = self._call["hvp"](*self._residuals, vector)
        return product

    def hvps(self, rows: torch.Tensor) -> torch.Tensor:
        if self._kernel is not None:
            return self._kernel.apply_rows(rows)
        if self._rows_at_once:
            num = self._rows_at_once
            parts = []
            for part in rows.split(num):
                padded = part if len(part) == num else torch.cat([part, part.new_zeros(num - len(part), part.shape[1])])
                (products,) = self._call["hvps"](*self._residuals, padded)
                parts.append(products[: len(part)])
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        # vmap needs torch operations, so it takes the graph itself whatever the backend made of it.
        graph = self._hvp_graph
        assert graph is not None
        with torch.no_grad():
            return torch.func.vmap(lambda v: graph(*self._residuals, v)[0])(rows)

    def native_hvp(self) -> Any:
        return self._operator

    def mixed(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self._targets, self._call["mixed"](*self._residuals, vector), strict=True))


class NoProducts(AbstractLinearization):
    """Stands for the Hessian of a problem whose estimator has said that it does not multiply with it."""

    def __init__(self, estimator: AbstractEstimator) -> None:
        self._estimator = estimator

    def hvp(self, vector: torch.Tensor) -> torch.Tensor:
        """Raise ValueError: the estimator contradicts itself."""
        raise ValueError(
            f"{self._estimator!r} multiplies with H in solve(), but its `uses_hvp` is False; set it to True"
        )

    def mixed(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Not asked of an operator."""
        raise AssertionError("mixed products are not asked of an operator")
