"""The problem graph that the losses make."""

import networkx as nx
import torch
from torch import nn

import mlopt
from tests.helpers.quadratics import program


def compiled(spec):
    graph = mlopt.Graph(program(spec))
    mlopt.compile(graph, progress=False)
    return graph


def test_edges_and_levels():
    graph = compiled({"a": ["u"], "b": ["a", "u"], "c": ["a"], "u": ["b", "c"]})
    kinds = {(s, r): d["kind"] for s, r, d in graph.nx.edges(data=True)}
    assert kinds == {
        ("u", "a"): "upper_to_lower",
        ("a", "b"): "lower_to_upper",
        ("u", "b"): "upper_to_lower",
        ("a", "c"): "lower_to_upper",
        ("b", "u"): "lower_to_upper",
        ("c", "u"): "lower_to_upper",
    }
    assert graph.levels() == {"a": 1, "b": 2, "c": 2, "u": 3}
    assert isinstance(graph.nx, nx.DiGraph)
    assert graph.nx.edges["a", "b"]["parameters"] == ("w",)
    assert graph.nx.nodes["u"]["level"] == 3


def test_only_parameters_that_the_loss_uses_make_an_edge():
    """A metric, an unused module and a parameter that nobody trains read nothing."""

    class Lower(mlopt.Problem):
        def training_step(self, batch):
            loss = self.module(torch.ones(1, 2)).square().sum() * self.upper.module.used.square().sum()
            return {"loss": loss, "norm": self.other.module.weight.norm()}

    class Other(mlopt.Problem):
        def training_step(self, batch):
            return self.module.weight.square().sum()

    class Used(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def make(cls, name, module):
        return cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))

    class Upper(mlopt.Problem):
        def training_step(self, batch):
            return self.lower(torch.ones(1, 2)).square().sum()

    problems = [
        make(Lower, "lower", nn.Linear(2, 1)),
        make(Other, "other", nn.Linear(2, 1)),
        make(Upper, "upper", Used()),
    ]
    graph = mlopt.Graph(problems)
    plan = mlopt.compile(graph, strict=True, progress=False)
    assert graph.reads("lower") == {"upper": ("used",)}
    assert graph.reads("other") == {}
    got = plan.hypergradient("upper")
    assert (got["unused"] == 0).all() and (got["used"] != 0).all()
    plan.step()
    assert problems[2].module.unused.grad is None


def test_cost_is_linear_in_the_edges():
    """A ladder of width 2: twice the depth, twice the instructions (path enumeration would square them)."""
    from mlopt.planner.adjoint import plan_hypergradient

    def size(depth):
        order = [f"{side}{i}" for i in range(depth) for side in "ab"] + ["u"]
        reads = {name: [] for name in order}
        for i in range(1, depth):
            for side in "ab":
                reads[f"{side}{i}"] = [f"a{i - 1}", f"b{i - 1}"]
        reads["a0"] = reads["b0"] = ["u"]
        reads["u"] = [f"a{depth - 1}", f"b{depth - 1}"]
        estimators = dict.fromkeys(order, mlopt.CG())
        return len(plan_hypergradient("u", order, reads, estimators))

    sizes = [size(d) for d in (4, 8, 16)]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])
