"""Graphs run by torch calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt


class Low(mlopt.Problem):
    def training_step(self, x):
        return (self.module(self.image(x).flatten(1)) * self.up.module.t.exp() - 1).square().mean()

    def image(self, x):
        values, places = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(values, places, 2, output_size=x.shape[-2:])


class Shuffled(Low):
    def image(self, x):
        return F.channel_shuffle(x, 2)


class Up(mlopt.Problem):
    def training_step(self, x):
        return (self.low.module.weight - 1).square().sum() + self.module.t.square()


class Exponent(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))


@pytest.mark.parametrize("cls", [Low, Shuffled])
def test_kernels_that_keep_channels_last_where_a_trace_does_not(cls):
    """Views of the trace are none of what these return; the numbers are those of plain autograd."""
    torch.manual_seed(0)
    x = torch.randn(4, 4, 4, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    net, exponent = nn.Linear(64, 1).double(), Exponent()
    low = cls(
        "low",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=[x],
        hypergradient=mlopt.Neumann(num_terms=3, scale=0.1),
    )
    up = Up("up", module=exponent, optimizer=torch.optim.SGD(exponent.parameters(), lr=0.1), data=[x])
    plan = mlopt.compile(mlopt.Graph([low, up]), backend="eager", progress=False, strict=True, verify=False)
    found = plan.hypergradient("up")["t"]
    loss = low.training_step(x)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    outer = Up.training_step(up, x)
    v = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(parameters, torch.autograd.grad(outer, parameters, allow_unused=True), strict=True)
    ]
    term, total = v, v
    for _ in range(2):
        product = torch.autograd.grad(gradients, parameters, term, retain_graph=True)
        term = [a - 0.1 * b for a, b in zip(term, product, strict=True)]
        total = [a + b for a, b in zip(total, term, strict=True)]
    q = [0.1 * a for a in total]
    (mixed,) = torch.autograd.grad(gradients, exponent.t, q)
    torch.testing.assert_close(found, 2 * exponent.t.detach() - mixed, rtol=1e-9, atol=1e-12)
