"""Plain autograd for a problem whose loss is evaluated for several tasks: one task after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from mlopt.autodiff import FlatLayout, TaskAxis
from mlopt.capture.tasks import leaves_of_task
from mlopt.planner import ProductNeeds
from mlopt.problem import Problem
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import AbstractDerivatives, AbstractLinearization, GradientResult, mean_result
from mlopt.runtime.reference import AutogradDerivatives


class TaskAutogradDerivatives(AbstractDerivatives):
    """Derivatives by `torch.autograd` on the live `training_step`, called once per task.

    Args:
        problem: The problem.
        problems: All problems of the graph by name.
        layouts: Flat layouts of all problems by name.
        needs: The derivatives that the program uses.
        axis: The problem's task axis.
    """

    is_random = True

    def __init__(
        self,
        problem: Problem,
        problems: Mapping[str, Problem],
        layouts: Mapping[str, FlatLayout],
        needs: ProductNeeds,
        axis: TaskAxis,
    ) -> None:
        one = {name: layout.of_one_task for name, layout in layouts.items()}
        self._single = AutogradDerivatives(problem, problems, one, needs)
        self._problems = problems
        self._name = problem.name
        self._layouts = layouts
        self._axis = axis

    def at(self, values: Mapping[int, torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """See `AutogradDerivatives.at`; values have the task axis."""
        return self._single.at(values)

    def accepts(self, batch: Batch) -> bool:
        """Any batch will do."""
        return True

    def reads(self, batch: Batch) -> dict[str, tuple[str, ...]]:
        """Look at the first task."""
        with self._task(0):
            return self._single.reads(batch.of_task(0))

    def gradient(self, batch: Batch) -> GradientResult:
        """Sum up the tasks as `TaskAxis` says."""
        results = []
        for t in range(self._axis.num_tasks):
            with self._task(t):
                results.append(self._single.gradient(batch.of_task(t)))
        buffers: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        for result in results:
            for live, value in result.buffers:
                buffers.setdefault(id(live), (live, []))[1].append(value)
        average = mean_result(results, [])
        own = [
            None
            if parts[0] is None
            else self._axis.combine(torch.stack([p for p in parts if p is not None]), self._name)
            for parts in zip(*(r.own for r in results), strict=True)
        ]
        return GradientResult(
            loss=average.loss,
            metrics=average.metrics,
            own=own,
            cotangents=self._combined([r.cotangents for r in results]),
            buffers=[(live, self._axis.of_buffer(torch.stack(values))) for live, values in buffers.values()],
        )

    def linearize(self, batch: Batch) -> AbstractLinearization:
        """Linearize every task."""
        parts = []
        for t in range(self._axis.num_tasks):
            with self._task(t):
                parts.append(self._single.linearize(batch.of_task(t)))
        return _TaskLinearization(parts, self)

    def read_gradient(self, batch: Batch, own: torch.Tensor) -> dict[str, torch.Tensor]:
        """Differentiate every task's loss by what is read, at its own parameters."""
        with_tasks = self._name in self._axis.with_tasks
        products = []
        for t in range(self._axis.num_tasks):
            with self._task(t):
                products.append(self._single.read_gradient(batch.of_task(t), own[t] if with_tasks else own))
        return self._combined(products)

    def _combined(self, products: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {r: self._axis.combine(torch.stack([p[r] for p in products]), r) for r in products[0]}

    @contextlib.contextmanager
    def _task(self, index: int) -> Iterator[None]:
        with leaves_of_task(self._problems.values(), index) as leaves, self._single.on_leaves(leaves):
            yield


class _TaskLinearization(AbstractLinearization):
    def __init__(self, parts: list[AbstractLinearization], derivatives: TaskAutogradDerivatives) -> None:
        self._parts = parts
        self._axis, self._name = derivatives._axis, derivatives._name
        self._combined = derivatives._combined

    def hvp(self, vector: torch.Tensor) -> torch.Tensor:
        products = [part.hvp(self._of_task(vector, t)) for t, part in enumerate(self._parts)]
        return self._axis.combine(torch.stack(products), self._name)

    def mixed(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._combined([part.mixed(self._of_task(vector, t)) for t, part in enumerate(self._parts)])

    def _of_task(self, vector: torch.Tensor, index: int) -> torch.Tensor:
        return vector[index] if self._name in self._axis.with_tasks else vector
