"""What a benchmark problem is: modules, two losses, data and settings, with no word of who solves it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

Loss = Callable[[nn.Module, nn.Module, Any], torch.Tensor]


@dataclasses.dataclass
class Instance:
    """A bilevel problem to run.

    Attributes:
        lower: The lower module.
        upper: The upper module.
        lower_loss: ``(lower, upper, batch) -> scalar``.
        upper_loss: ``(lower, upper, batch) -> scalar``.
        lower_data: Batches of the lower problem, cycled.
        upper_data: Batches of the upper problem, cycled.
        lower_lr: Step size of the lower SGD.
        momentum: Its momentum.
        upper_lr: Step size of the upper Adam.
        unroll_steps: Lower steps per upper step: one of these and one upper step are an outer iteration.
        solver_steps: Products with the Hessian per upper step.
        neumann_scale: Step of the Neumann series where that is the solver.
    """

    lower: nn.Module
    upper: nn.Module
    lower_loss: Loss
    upper_loss: Loss
    lower_data: list[Any]
    upper_data: list[Any]
    lower_lr: float
    momentum: float
    upper_lr: float
    unroll_steps: int
    solver_steps: int
    neumann_scale: float

    @property
    def device(self) -> torch.device:
        """Where modules and data are."""
        return next(self.lower.parameters()).device

    def to(self, device: str) -> Instance:
        """Move modules and data; returns the instance itself."""
        for module in (self.lower, self.upper):
            module.to(device)
        self.lower_data, self.upper_data = tree_map(lambda t: t.to(device), (self.lower_data, self.upper_data))
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkProblem:
    """A problem by name.

    Attributes:
        name: Short name.
        title: What it is, in a line.
        make: ``(dtype, smoke) -> Instance``; the same tensors at every call.
        targets: Name of a case (see `benchmarks.cases`) -> how many times Betty's speed mlopt is to reach.
    """

    name: str
    title: str
    make: Callable[[torch.dtype, bool], Instance]
    targets: dict[str, float]


class LogDecay(nn.Module):
    """One logarithm of a weight decay per parameter of the lower module."""

    def __init__(self, lower: nn.Module, start: float) -> None:
        super().__init__()
        self.rates = nn.ParameterList([nn.Parameter(torch.full_like(p, start)) for p in lower.parameters()])


def decay_loss(lower: nn.Module, upper: nn.Module) -> torch.Tensor:
    """Return ``1/2 sum_i exp(rate_i) theta_i^2``."""
    return sum(0.5 * (rate.exp() * p.square()).sum() for rate, p in zip(upper.rates, lower.parameters(), strict=True))


def ridge_loss(lower: nn.Module, strength: float) -> torch.Tensor:
    """Return ``strength/2 ||theta||^2``; it keeps the Hessian of an untrained network positive definite.

    Conjugate gradients then make all their steps, in every method: without it, a method that stops at a direction of
    negative curvature would do less work than one that does not look.
    """
    return 0.5 * strength * sum(p.square().sum() for p in lower.parameters())
