"""`GlmGraph`: a Hessian product of a loss that reads its parameters through ``X W``, by one kernel."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from mlopt import ops
from mlopt.backends.base import Changing, Compiled, Lowering
from mlopt.backends.native.choice import Choice
from mlopt.passes import GlmRowKind, GlmStructure

_ROWS = {
    GlmRowKind.DIAGONAL: "diagonal",
    GlmRowKind.RANK_ONE: "diagonal plus rank one",
    GlmRowKind.BLOCK: "a full block",
}
_PRODUCTS = 10  # what a solve makes, about; binding the kernel to a point is paid once for all of them


class GlmGraph:
    """A graph ``(residuals, v) -> (H v,)`` whose structure is known.

    As an operator it is the kernel, in which the curvature of every row is computed once per point. Called as a graph,
    and where X is not laid out by rows, it is the graph that the other backend made.

    Args:
        structure: What was found in the graph.
        graph: The graph by another backend.
        choice: Which of the two is faster, measured at the first point.
    """

    def __init__(self, structure: GlmStructure, graph: Compiled, choice: Choice) -> None:
        self._structure = structure
        self._graph = graph
        self._choice = choice

    @property
    def is_kernel(self) -> bool:
        """See `Compiled`."""
        return self._choice.first is not False

    @property
    def lowering(self) -> Lowering:
        """What is reported of the graph."""
        if not self.is_kernel:
            lowering = self._graph.lowering
            return Lowering(lowering.backend, "; ".join(filter(None, [lowering.note, self._choice.figures])))
        s = self._structure
        parts = [
            f"X^T f(X V), X [{'T, ' if self._structure.tasks else ''}n, {s.num_features}], "
            f"{s.num_columns} column{'s' if s.num_columns > 1 else ''}",
            f"f {_ROWS[s.kind]} per row",
            *(["biases"] if s.bias else []),
            *(["a diagonal term"] if s.has_diagonal else []),
            *([self._choice.figures] if self._choice.figures else []),
        ]
        return Lowering("glm kernel", "; ".join(parts))

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """Run the graph."""
        return self._graph(*arguments)

    def native_call(self, arguments: Sequence[Any]) -> Any:
        """See `Compiled`."""
        return self._graph.native_call(arguments)

    def native_operator(self, arguments: Sequence[Any], hole: int) -> Any:
        """See `Compiled`."""
        if self._choice.first is False:
            return self._graph.native_operator(arguments, hole)
        residuals = list(arguments[:-1])
        if hole != len(residuals) or not self._fits(self._structure.matrix(residuals)):
            self._choice.refuse("X is not laid out by rows")
            return self._graph.native_operator(arguments, hole)
        operator = self._bind(residuals)
        if self._choice.first is None:
            x = self._structure.matrix(residuals)
            shape = (x.shape[0], self._structure.size) if self._structure.tasks else (self._structure.size,)
            vector = x.new_ones(shape, dtype=self._structure.dtype)

            def kernel() -> None:
                new = self._bind(residuals)  # its price is paid once per point
                apply = new.apply_rows if self._structure.tasks else new.apply
                for _ in range(_PRODUCTS):
                    apply(vector)

            def graph() -> None:
                for _ in range(_PRODUCTS):
                    self._graph(*residuals, vector)

            if not self._choice.measure(kernel, graph, x.device, f"{_PRODUCTS} products at one point"):
                return self._graph.native_operator(arguments, hole)
        return operator

    def native_steps(self, arguments: Sequence[Any], changing: Changing) -> Any:
        """See `Compiled`."""
        return self._graph.native_steps(arguments, changing)

    def _fits(self, x: torch.Tensor) -> bool:
        return x.is_contiguous() and ops.has_kernels(x.device, self._structure.dtype)

    def _bind(self, residuals: Sequence[Any]) -> Any:
        """Return the operator of one point."""
        s = self._structure
        x = s.matrix(residuals)
        with torch.no_grad():
            curvature, diagonal = s.curvature(residuals), s.diagonal(residuals)
            extension: Any = importlib.import_module("mlopt._C")
            return extension.GlmOperator(x, s.kind.value, curvature, s.positions.to(x.device), s.size, s.bias, diagonal)
