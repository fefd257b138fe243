"""`ShapeGuard`: for which shapes a graph is valid.

torch's shape environments record what tracing assumed about free sizes ("the batch is larger than 16", "these two
sizes are equal", or, after a specialization, "the batch is 20"). A graph used outside its assumptions has wrong
constants inside and gives a wrong gradient, not an error, so the assumptions are evaluated once for every new shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class ShapeGuard:
    """The assumptions of one shape environment about a list of tensors.

    Args:
        shape_env: The environment that traced the graph. Take the guard after tracing has ended.
        examples: The fake tensors that stood for the inputs.
    """

    def __init__(self, shape_env: ShapeEnv, examples: Sequence[torch.Tensor]) -> None:
        self._shape_env = shape_env
        self._ndims = [x.ndim for x in examples]
        fakes = [x for x in examples if isinstance(x, FakeTensor)]
        self._expression = shape_env.produce_guards_expression(fakes, ignore_static=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the environment behind: an expression is evaluated without it."""
        return {"ndims": self._ndims, "expression": self._expression}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take an environment that knows nothing."""
        self._shape_env = ShapeEnv()
        self._ndims, self._expression = state["ndims"], state["expression"]

    def accepts(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether sizes and strides of `tensors` satisfy the assumptions (dtypes and devices are not compared)."""
        if [x.ndim for x in tensors] != self._ndims:
            return False
        if self._expression is None:
            return True
        plain = [without_offset(x) for x in tensors]
        return bool(self._shape_env.evaluate_guards_expression(self._expression, plain))


def without_offset(tensor: torch.Tensor) -> torch.Tensor:
    """Return a data-free tensor of the same size and stride at storage offset 0.

    A batch that is a slice of a larger tensor has another offset every time; no graph depends on it.
    """
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
