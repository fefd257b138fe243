"""Linear operators: what a matrix is to a solver."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch

from mlopt.linalg.native import native_damped


class AbstractLinearOperator(abc.ABC):
    """A square linear map on vectors of N elements.

    Attributes:
        size: N.
        dtype: Dtype of the vectors.
        device: Device of the vectors.
        native: The same map for loops in C++ (see `mlopt.linalg.native`), or None.
    """

    size: int
    dtype: torch.dtype
    device: torch.device
    native: Any = None

    @abc.abstractmethod
    def mv(self, vector: torch.Tensor) -> torch.Tensor:
        """Apply the operator to one vector [N]; returns a new vector [N]."""

    def mm(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the operator to each row of [K, N]; returns a new [K, N]."""
        return torch.stack([self.mv(row) for row in rows]) if len(rows) else torch.empty_like(rows)

    def as_matrix(self) -> torch.Tensor:
        """Materialize the operator as [N, N] by N products."""
        return self.mm(torch.eye(self.size, dtype=self.dtype, device=self.device)).T


class FunctionOperator(AbstractLinearOperator):
    """An operator given by a function ``[N] -> [N]``, and possibly by a native operator that does the same."""

    def __init__(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        native: Any = None,
    ) -> None:
        self._function = function
        self.native = native
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)

    def mv(self, vector: torch.Tensor) -> torch.Tensor:
        """Apply the function."""
        return self._function(vector)


class MatrixOperator(AbstractLinearOperator):
    """An operator given by a dense matrix [N, N]."""

    def __init__(self, matrix: torch.Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"MatrixOperator: expected a square matrix [N, N], got shape {tuple(matrix.shape)}")
        self._matrix = matrix
        self.size = matrix.shape[0]
        self.dtype = matrix.dtype
        self.device = matrix.device

    def mv(self, vector: torch.Tensor) -> torch.Tensor:
        """Return ``matrix @ vector``."""
        return self._matrix @ vector

    def mm(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``rows @ matrix.T``."""
        return rows @ self._matrix.T


class DampedOperator(AbstractLinearOperator):
    """``A + damping I``."""

    def __init__(self, operator: AbstractLinearOperator, damping: float) -> None:
        self._operator = operator
        self._damping = damping
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.native = native_damped(operator.native, damping)

    def mv(self, vector: torch.Tensor) -> torch.Tensor:
        """Return ``A v + damping v``."""
        return self._operator.mv(vector).add(vector, alpha=self._damping)

    def mm(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``A v + damping v`` for each row."""
        return self._operator.mm(rows).add(rows, alpha=self._damping)
