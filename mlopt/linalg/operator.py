"""Linear operators: what a matrix is to a solver."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch

from mlopt.linalg.native import native_damped

# How many products a matrix is made of at once, unless told otherwise.
ROWS_AT_ONCE = 256


class AbstractLinearOperator(abc.ABC):
    """A square linear map on vectors of N elements, or T such maps side by side.

    Attributes:
        size: N.
        blocks: None for one map. T for T independent maps (one per task): `mm` then takes exactly T rows and applies
            to each its own map.
        dtype: Dtype of the vectors.
        device: Device of the vectors.
        native: The same map for loops in C++ (see `mlopt.linalg.native`), or None.
    """

    size: int
    blocks: int | None = None
    dtype: torch.dtype
    device: torch.device
    native: Any = None

    @abc.abstractmethod
    def mv(self, vector: torch.Tensor) -> torch.Tensor:
        """Apply the operator to one vector [N]; returns a new vector [N]."""

    def mm(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the operator to each row of [K, N]; returns a new [K, N]."""
        return torch.stack([self.mv(row) for row in rows]) if len(rows) else torch.empty_like(rows)

    def as_matrix(self, chunk_size: int = ROWS_AT_ONCE) -> torch.Tensor:
        """Materialize the operator as [N, N], or [T, N, N] with blocks, by N products.

        Args:
            chunk_size: How many products are made at once.
        """
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        if self.blocks is not None:
            columns = [self.mm(e.expand(self.blocks, -1).contiguous()) for e in eye]
            return torch.stack(columns, dim=-1)
        return torch.cat([self.mm(rows) for rows in eye.split(chunk_size)]).T


class FunctionOperator(AbstractLinearOperator):
    """An operator given by a function, and possibly by a native operator that does the same.

    Args:
        function: ``[N] -> [N]``.
        size: N.
        rows: ``[K, N] -> [K, N]``, if there is something faster than `function` on each row.
        dtype: Dtype of the vectors.
        device: Device of the vectors.
        native: The same as `function` in C++ (see `mlopt.linalg.native`), or None.
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        size: int,
        *,
        rows: Callable[[torch.Tensor], torch.Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        native: Any = None,
    ) -> None:
        self._function = function
        self._rows = rows
        self.native = native
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)

    def mv(self, vector: torch.Tensor) -> torch.Tensor:
        """Apply the function."""
        return self._function(vector)

    def mm(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the function to each row."""
        return super().mm(rows) if self._rows is None or not len(rows) else self._rows(rows)


class BlockOperator(AbstractLinearOperator):
    """T maps side by side, given by one function on all of them.

    Args:
        function: ``[T, N] -> [T, N]``; row t of the result depends on row t alone.
        size: N.
        blocks: T.
        dtype: Dtype of the vectors.
        device: Device of the vectors.
        native: The same as `function` in C++ (see `mlopt.linalg.native`), or None.
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        size: int,
        blocks: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        native: Any = None,
    ) -> None:
        self._function = function
        self.native = native
        self.size, self.blocks, self.dtype, self.device = size, blocks, dtype, torch.device(device)

    def mv(self, vector: torch.Tensor) -> torch.Tensor:
        """Refuse: there are T maps, so there is no single vector to apply them to."""
        raise ValueError(f"BlockOperator: expected [T, N] = [{self.blocks}, {self.size}], got one vector; use mm")

    def mm(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply map t to row t."""
        return self._function(rows)


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


class DiagonalOperator(AbstractLinearOperator):
    """An operator given by its diagonal, [N], or [T, N] for T blocks."""

    def __init__(self, diagonal: torch.Tensor) -> None:
        self._diagonal = diagonal
        self.size = diagonal.shape[-1]
        self.blocks = diagonal.shape[0] if diagonal.ndim == 2 else None
        self.dtype, self.device = diagonal.dtype, diagonal.device

    def mv(self, vector: torch.Tensor) -> torch.Tensor:
        """Multiply element by element."""
        return self._diagonal * vector

    def mm(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply each row element by element."""
        return self._diagonal * rows


class DampedOperator(AbstractLinearOperator):
    """``A + damping I``."""

    def __init__(self, operator: AbstractLinearOperator, damping: float) -> None:
        self._operator = operator
        self._damping = damping
        self.size, self.dtype, self.device = operator.size, operator.dtype, operator.device
        self.blocks = operator.blocks
        self.native = native_damped(operator.native, damping)

    def mv(self, vector: torch.Tensor) -> torch.Tensor:
        """Return ``A v + damping v``."""
        return self._operator.mv(vector).add(vector, alpha=self._damping)

    def mm(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``A v + damping v`` for each row."""
        return self._operator.mm(rows).add(rows, alpha=self._damping)
