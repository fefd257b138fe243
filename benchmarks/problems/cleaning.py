"""Hyper-cleaning: softmax regression with one weight per training sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.problems.base import BenchmarkProblem, Instance, ridge_loss


class SampleWeights(nn.Module):
    """One logit per training sample."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num))


def lower_loss(lower, upper, batch):
    x, y = batch
    return (upper.logits.sigmoid() * F.cross_entropy(lower(x), y, reduction="none")).mean() + ridge_loss(lower, 1e-3)


def upper_loss(lower, upper, batch):
    x, y = batch
    return F.cross_entropy(lower(x), y)


def make(dtype: torch.dtype, smoke: bool) -> Instance:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    num, held_out, width = (60, 30, 8) if smoke else (20_000, 5_000, 784)
    truth = torch.randn(width, 10, generator=generator)

    def split(num):
        x = torch.rand(num, width, generator=generator)
        return x.to(dtype), ((x - 0.5) @ truth).argmax(1)

    lower = nn.Linear(width, 10, bias=False).to(dtype)
    return Instance(
        *(lower, SampleWeights(num).to(dtype), lower_loss, upper_loss, [split(num)], [split(held_out)]),
        lower_lr=0.01,
        momentum=0.0,
        upper_lr=1e-2,
        unroll_steps=5 if smoke else 50,
        solver_steps=3 if smoke else 20,
        neumann_scale=0.02,
    )


PROBLEM = BenchmarkProblem(
    "cleaning", "softmax regression 20000 x 784 x 10, a weight per sample, 50 steps", make, {"cg": 12}
)
