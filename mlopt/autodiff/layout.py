"""`FlatLayout`: the order in which one problem's trained parameters lie in a flat vector.

Solvers see one vector per problem. The layout is the only place that knows where each parameter lies in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class FlatLayout:
    """Layout of one problem's trained parameters in a vector of N elements, or T such vectors as rows of [T, N].

    Attributes:
        problem: The problem's name.
        names: Parameter names in `module.named_parameters()` order.
        shapes: Their shapes; with tasks, of one task.
        dtypes: Their dtypes.
        dtype: Dtype of the vector: the one all parameter dtypes promote to.
        device: Their common device.
        tasks: T if every parameter has a leading axis of T tasks, else None.
    """

    problem: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device
    tasks: int | None = None

    @classmethod
    def of(cls, problem: str, parameters: Mapping[str, torch.Tensor], tasks: int | None = None) -> FlatLayout:
        """Lay out the given parameters (at least one) in their order."""
        tensors = list(parameters.values())
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return cls(
            problem=problem,
            names=tuple(parameters),
            shapes=tuple(tuple(t.shape[0 if tasks is None else 1 :]) for t in tensors),
            dtypes=tuple(t.dtype for t in tensors),
            dtype=dtype,
            device=tensors[0].device,
            tasks=tasks,
        )

    @property
    def size(self) -> int:
        """N, the number of elements (of one task)."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """Shape of a vector: (N,) or (T, N)."""
        return (*self._lead, self.size)

    @property
    def of_one_task(self) -> FlatLayout:
        """The same layout without the task axis."""
        return dataclasses.replace(self, tasks=None)

    @property
    def _lead(self) -> tuple[int, ...]:
        return () if self.tasks is None else (self.tasks,)

    def flatten(self, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Concatenate tensors in layout order into a new vector; None stands for zeros."""
        parts = [
            torch.zeros((*self._lead, math.prod(shape)), dtype=self.dtype, device=self.device)
            if tensor is None
            else tensor.reshape((*self._lead, math.prod(shape))).to(self.dtype)
            for tensor, shape in zip(tensors, self.shapes, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Cut a vector into views with the parameters' shapes (copies where a dtype differs)."""
        parts = torch.split(flat, [math.prod(shape) for shape in self.shapes], dim=-1)
        return [
            part.reshape((*self._lead, *shape)).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
