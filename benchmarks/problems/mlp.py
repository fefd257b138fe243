"""A small perceptron under one weight decay per parameter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.problems.base import BenchmarkProblem, Instance, LogDecay, decay_loss


def lower_loss(lower, upper, batch):
    x, y = batch
    return F.cross_entropy(lower(x), y) + decay_loss(lower, upper)


def upper_loss(lower, upper, batch):
    x, y = batch
    return F.cross_entropy(lower(x), y)


def make(dtype: torch.dtype, smoke: bool) -> Instance:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    num, width = (8, 6) if smoke else (64, 64)

    def batch():
        x = torch.randn(num, width, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(0, 10, (num,), generator=generator)

    lower = nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, 10)).to(dtype)
    upper = LogDecay(lower, -0.5)  # strong enough for a positive definite Hessian
    return Instance(
        *(lower, upper, lower_loss, upper_loss, [batch() for _ in range(4)], [batch() for _ in range(4)]),
        lower_lr=0.1,
        momentum=0.9,
        upper_lr=1e-3,
        unroll_steps=1,
        solver_steps=3 if smoke else 20,
        neumann_scale=0.3,
    )


PROBLEM = BenchmarkProblem("mlp", "perceptron 64-32-10, batch 64, a weight decay per parameter", make, {"cg": 6})
