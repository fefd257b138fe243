"""What a method is: something that makes outer iterations of a problem."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.problems import Instance

CASES = ("cg", "cg-ggn", "neumann", "finite-difference")
FINITE_DIFFERENCE_STEP = 0.01  # times 1 / ||v||, as Betty's default


class UnavailableError(Exception):
    """This method cannot run this problem or case here; the text says why."""


class AbstractRunner(abc.ABC):
    """One method on one instance, ready to go.

    Attributes:
        exact: Whether it computes what the case says, so that its results can be compared.
    """

    exact = True

    @abc.abstractmethod
    def outer(self) -> None:
        """Make one outer iteration: all lower steps, and an upper step with its hypergradient."""

    @abc.abstractmethod
    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return lower and upper parameters as two float64 vectors."""


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return tensors as one float64 vector of the CPU."""
    return torch.cat([t.detach().double().cpu().reshape(-1) for t in tensors])


class TorchRunner(AbstractRunner):
    """The common part of the methods that train the instance's own modules.

    Attributes:
        theta: Lower parameters.
        rates: Upper parameters.
    """

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.theta = list(instance.lower.parameters())
        self.rates = list(instance.upper.parameters())

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        return flat(self.theta), flat(self.rates)

    def optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        """Return the lower and the upper optimizer."""
        i = self.instance
        return (
            torch.optim.SGD(self.theta, lr=i.lower_lr, momentum=i.momentum),
            torch.optim.Adam(self.rates, lr=i.upper_lr),
        )


def cycle(batches: list[Any]) -> Iterator[Any]:
    return itertools.cycle(batches)
