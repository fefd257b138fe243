"""Gradient and second-order products from one trace: the graphs that traces of their own give."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.autodiff import FlatLayout, gradient_and_linearization_graphs, gradient_graph, shares_gradient
from mlopt.capture import capture_loss
from mlopt.runtime.data import BatchStream
from tests.helpers.extras import extras

aten = torch.ops.aten


class Lower(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        logits = self.module(x)
        penalty = (self.upper.module.weight.exp() * sum((p**2).sum() for p in self.module.parameters())).sum()
        loss = F.cross_entropy(logits, y) + penalty
        return {"loss": loss, "acc": (logits.argmax(1) == y).double().mean(), "twice": 2 * loss.detach()}


class Upper(mlopt.Problem):
    def training_step(self, batch):
        return F.cross_entropy(self.lower.module(batch[0]), batch[1])


def captured(*layers):
    """The loss of a network of some layers between two linear ones, its inputs, and the layouts."""
    net = nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 3)).double()
    weight = nn.Linear(1, 1, bias=False).double()
    data = [(torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3)]
    by_name = {
        "lower": Lower("lower", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), data=data),
        "upper": Upper("upper", module=weight, optimizer=torch.optim.SGD(weight.parameters(), lr=0.1), data=data),
    }
    for p in by_name.values():
        p.bind(by_name)
    layouts = {name: FlatLayout.of(name, p.trained_parameters()) for name, p in by_name.items()}
    batch = BatchStream(by_name["lower"]).peek()
    loss = capture_loss(by_name["lower"], list(by_name.values()), batch.tensors, batch.spec)
    return loss, loss.bind(batch.tensors), layouts


def layers(kind):
    return {
        "plain": [nn.Tanh()],
        "batch-norm": [nn.BatchNorm1d(8), nn.ReLU()],
        "dropout": [nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.2)],
        "layer-norm": [nn.LayerNorm(8), nn.GELU()],
        "softplus": [nn.Softplus(), nn.Softmax(1)],
    }[kind]


KINDS = extras(["plain", "batch-norm", "dropout", "layer-norm", "softplus"], lambda k: k in ("layer-norm", "softplus"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_a_trace_of_its_own(kind):
    """To the bit: losses, metrics, gradients, cotangents and new buffers."""
    loss, inputs, layouts = captured(*layers(kind))
    assert shares_gradient(loss)
    alone = gradient_graph(loss, inputs, layouts, ["upper"])
    shared, products = gradient_and_linearization_graphs(loss, inputs, layouts, ["upper"], hvp=True, targets=["upper"])
    assert (shared.own, shared.cotangents, shared.written_buffers) == (
        alone.own,
        alone.cotangents,
        alone.written_buffers,
    )
    results = []
    for graph in (alone, shared):
        torch.manual_seed(4)
        results.append(graph.traced.module(*inputs))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    # The halves of the products see the masks of the gradient: H v is its directional derivative.
    direction = torch.randn(layouts["lower"].size, dtype=torch.float64)
    torch.manual_seed(4)
    got = products.hvp(*products.primal(*inputs), direction)[0]
    step, moved = 1e-6, []
    own = [i for i, x in enumerate(loss.inputs) if x.name in layouts["lower"].names and x.role.name == "OWN"]
    parts = dict(zip(layouts["lower"].names, layouts["lower"].split(direction), strict=True))
    for sign in (1, -1):
        at = list(inputs)
        for i in own:
            at[i] = inputs[i].detach() + sign * step * parts[loss.inputs[i].name]
        torch.manual_seed(4)
        made = shared.traced.module(*at)[1 + len(loss.metrics) :][: len(shared.own)]
        moved.append(layouts["lower"].flatten(list(made)))
    torch.testing.assert_close(got, (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("made_of_others", [False, True], ids=["batch-norm", "group-norm"])
def test_what_has_another_gradient_where_it_is_differentiated_again(made_of_others):
    """Autograd takes a GroupNorm's gradient apart then; the plain gradient keeps the one operation."""
    loss, inputs, layouts = captured(nn.GroupNorm(2, 8) if made_of_others else nn.BatchNorm1d(8))
    assert shares_gradient(loss) == (not made_of_others)
    if made_of_others:
        calls = [n.target for n in gradient_graph(loss, inputs, layouts, ()).traced.module.graph.nodes]
        assert aten.native_group_norm_backward.default in calls
