"""Graphs over tasks: copies into the channels-last order cannot be batched, and are replaced."""

import torch
from torch import fx

from mlopt.autodiff.tasks import _contiguous


def test_channels_last_copies_become_contiguous():
    def last(x):
        y = torch.ops.aten.clone.default(x, memory_format=torch.channels_last)
        return (torch.ops.aten.view.default(y.contiguous() * 2, [x.shape[0], -1]),)

    module = fx.symbolic_trace(last)
    x = torch.randn(2, 1, 3, 4)
    replaced = _contiguous(module)
    assert replaced is not module and torch.equal(replaced(x)[0], module(x)[0])
    batched = torch.func.vmap(lambda t: replaced(t)[0])(torch.stack([x, x + 1]))
    assert torch.equal(batched[1], module(x + 1)[0])


def test_other_graphs_stay():
    module = fx.symbolic_trace(lambda x: x + 1)
    assert _contiguous(module) is module
