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
    """Layout of one problem's trained parameters in a vector of N elements.

    Attributes:
        problem: The problem's name.
        names: Parameter names in `module.named_parameters()` order.
        shapes: Their shapes.
        dtypes: Their dtypes.
        dtype: Dtype of the vector: the one all parameter dtypes promote to.
        device: Their common device.
    """

    problem: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, problem: str, parameters: Mapping[str, torch.Tensor]) -> FlatLayout:
        """Lay out the given parameters (at least one) in their order."""
        tensors = list(parameters.values())
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return cls(
            problem=problem,
            names=tuple(parameters),
            shapes=tuple(tuple(t.shape) for t in tensors),
            dtypes=tuple(t.dtype for t in tensors),
            dtype=dtype,
            device=tensors[0].device,
        )

    @property
    def size(self) -> int:
        """N, the number of elements."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Concatenate tensors in layout order into a new vector [N]; None stands for zeros."""
        parts = [
            torch.zeros(math.prod(shape), dtype=self.dtype, device=self.device)
            if tensor is None
            else tensor.reshape(-1).to(self.dtype)
            for tensor, shape in zip(tensors, self.shapes, strict=True)
        ]
        return torch.cat(parts)

    def split(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Cut a vector [N] into views with the parameters' shapes (copies where a dtype differs)."""
        parts = torch.split(flat, [math.prod(shape) for shape in self.shapes])
        return [
            part.reshape(shape).to(dtype) for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]
