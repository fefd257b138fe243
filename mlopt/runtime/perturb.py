"""Perturb the live parameters by rounding errors for a moment, to see how much rounding can do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from mlopt.problem import Problem
from mlopt.runtime.exchange import exchanged


@contextlib.contextmanager
def perturbed_parameters(
    problems: Mapping[str, Problem], generator: torch.Generator, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Let every parameter of every problem be a copy off by at most one unit roundoff per element (see `perturb`).

    The parameter objects stay what they are (their ``data`` is exchanged), and afterwards the very same storages are
    back, so optimizers and the user's own references are not disturbed.
    """
    parameters = {id(p): p for problem in problems.values() for p in problem.module.parameters()}
    moved = dict(zip(parameters, perturb([p.detach() for p in parameters.values()], generator, dtype), strict=True))
    with exchanged(problems.values(), moved):
        yield


def perturb(
    tensors: Sequence[torch.Tensor], generator: torch.Generator, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """Return copies, the floating-point ones off by a relative error of at most the machine epsilon per element.

    Args:
        tensors: What to copy.
        generator: Draws the errors.
        dtype: Whose machine epsilon; default: that of each tensor.
    """
    changed = []
    for tensor in tensors:
        if tensor.is_floating_point():
            noise = 2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1
            factor = (1 + torch.finfo(dtype or tensor.dtype).eps * noise).to(tensor.device)
            changed.append((tensor.double() * factor).to(tensor.dtype))
        else:
            changed.append(tensor)
    return changed
