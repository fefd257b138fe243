"""Lowest problems beside each other: runs of many steps are what as many single steps are, whoever reads whom."""

import pytest
import torch
from torch import nn, optim

import mlopt
from mlopt import ops
from tests.helpers.packages import PackageBackend
from tests.helpers.steps import GraphBackend, compiled

needs_extension = pytest.mark.skipif(not ops.available(), reason="the native extension is not built")


class Value(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))


class Leader(mlopt.Problem):
    """Follows the upper problem, and keeps a mean of itself in a buffer."""

    def training_step(self, batch):
        self.module.mean.mul_(0.5).add_(self.module.w.detach(), alpha=0.5)
        return (self.module.w - self.top.module.w).square().sum()


class Hooked(Leader):
    """Writes into a buffer of another problem after each of its steps."""

    def param_callback(self):
        self.b.module.mean.copy_(self.module.w.detach())


def follower(target):
    class Follower(mlopt.Problem):
        def training_step(self, batch):
            return (self.module.w - target(self)).square().sum() + 0 * self.top.module.w.sum()

    return Follower


class Top(mlopt.Problem):
    def training_step(self, batch):
        return sum((p.module.w - 3).square().sum() for p in (self.a, self.b))


KINDS = {
    "parameter": (Leader, follower(lambda self: self.a.module.w)),
    "detached": (Leader, follower(lambda self: self.a.module.w.detach())),
    "buffer": (Leader, follower(lambda self: self.a.module.mean)),
    "hook": (Hooked, follower(lambda self: self.module.mean)),
}


def make(kind):
    problems = []
    for cls, name, start in zip((*KINDS[kind], Top), ("a", "b", "top"), (0.0, 1.0, 2.0), strict=True):
        module = Value(start)
        optimizer = optim.SGD(module.parameters(), lr=0.1)
        problems.append(cls(name, module=module, optimizer=optimizer, unroll_steps=10, data=[torch.zeros(1)]))
    return problems


@pytest.mark.filterwarnings("ignore::mlopt.errors.StructureWarning")
@pytest.mark.parametrize("how", ["run", "engine"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_one_runs_ahead_of_those_who_look(kind, how, monkeypatch):
    ours, theirs = make(kind), make(kind)
    plan, reference = compiled(ours, GraphBackend(), monkeypatch), compiled(theirs, "eager", monkeypatch)
    if how == "run":
        plan.run(23)
    else:
        mlopt.Engine(plan, steps=23, progress=False).run()
    for _ in range(23):
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.module.state_dict().values(), b.module.state_dict().values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


class Low(mlopt.Problem):
    def training_step(self, batch):
        return (self.module.w - batch * self.top.module.w).square().sum()


class Sum(mlopt.Problem):
    def training_step(self, batch):
        return (self.p.module.w + self.q.module.w - 3).square().sum()


@needs_extension
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", [mlopt.FiniteDifference(exact=False), mlopt.SAMA(exact=False)], ids=repr)
def test_one_solved_by_products_beside_one_that_is_not(other, order, monkeypatch):
    """Their step is no native program; it is made in the usual way."""

    def problems():
        made = []
        for cls, name, estimator in zip(
            (Low, Low, Sum), ("p", "q", "top"), (*[mlopt.CG(max_steps=3), other][::order], mlopt.CG()), strict=True
        ):
            module = Value(1.0)
            optimizer, data = optim.SGD(module.parameters(), lr=0.1), [torch.ones(1, dtype=torch.float64) / 3]
            made.append(cls(name, module=module, optimizer=optimizer, data=data, hypergradient=estimator))
        return made

    ours, theirs = problems(), problems()
    plan, reference = compiled(ours, PackageBackend(), monkeypatch), compiled(theirs, "eager", monkeypatch)
    for _ in range(6):
        plan.step(), reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.module.w, b.module.w, rtol=1e-12, atol=0)
