"""Logistic regression with one weight decay per coefficient, full batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.problems.base import BenchmarkProblem, Instance, LogDecay, decay_loss


def lower_loss(lower, upper, batch):
    x, y = batch
    return F.binary_cross_entropy_with_logits(lower(x).squeeze(1), y) + decay_loss(lower, upper)


def upper_loss(lower, upper, batch):
    x, y = batch
    return F.binary_cross_entropy_with_logits(lower(x).squeeze(1), y)


def make(dtype: torch.dtype, smoke: bool) -> Instance:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    num, width = (50, 5) if smoke else (500, 20)
    truth = torch.randn(width, generator=generator, dtype=torch.float64)

    def split():
        x = torch.randn(num, width, generator=generator, dtype=torch.float64)
        y = (x @ truth + torch.randn(num, generator=generator, dtype=torch.float64) > 0).to(dtype)
        return x.to(dtype), y

    lower = nn.Linear(width, 1, bias=False).to(dtype)
    upper = LogDecay(lower, -3.0)
    return Instance(
        *(lower, upper, lower_loss, upper_loss, [split()], [split()]),
        lower_lr=0.5,
        momentum=0.0,
        upper_lr=1e-2,
        unroll_steps=5 if smoke else 100,
        solver_steps=3,
        neumann_scale=0.5,
    )


PROBLEM = BenchmarkProblem(
    "logistic", "logistic regression 500 x 20, a weight decay per coefficient, 100 steps", make, {"cg": 40}
)
