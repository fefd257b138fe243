"""Which residuals are kept: the fewest bytes by brute force, budgets, and products that stay the same to rounding."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.autodiff import Recompute, SplitPolicy
from mlopt.autodiff.recompute import _may_recompute, choose_residuals, num_bytes, total_bytes
from mlopt.autodiff.split import dependents, residuals_of
from mlopt.passes import find_glm
from tests.helpers.steps import GraphBackend, compiled


class Lower(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        penalty = (self.upper.module.weight.exp() * sum((p**2).sum() for p in self.module.parameters())).sum()
        return F.cross_entropy(self.module(x), y) + penalty


class Upper(mlopt.Problem):
    def training_step(self, batch):
        return F.cross_entropy(self.lower(batch[0]), batch[1])


class Block(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return torch.relu(x + self.dropout(self.norm(self.conv(x))) * 0.5).clamp(max=4.0)


def program(blocks=3, dropout=0.0, estimator=None, size=16):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), *[Block(6, dropout) for _ in range(blocks)], nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(size, 1, 10, 10), torch.randint(0, 3, (size,))
    net(x)
    net, upper = net.double(), nn.Linear(1, 1, bias=False).double()
    data = [(x.double(), y)]
    return [
        Lower("lower", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.01), data=data,
              hypergradient=estimator or mlopt.CG(max_steps=3, damping=10.0)),
        Upper("upper", module=upper, optimizer=torch.optim.SGD(upper.parameters(), lr=0.01), data=data),
    ]  # fmt: skip


def halves(plan):
    (derivatives,) = plan._report.graphs["lower"]
    return derivatives.graphs.linearization


def joint(plan):
    """Return the whole graph of the product, its outputs, and what depends on the vector."""
    graph = halves(plan).traced.module.graph
    *_, vector = (n for n in graph.nodes if n.op == "placeholder")
    return next(n for n in graph.nodes if n.op == "output").args[0], dependents(vector)


@pytest.fixture(scope="module")
def plan():
    return mlopt.compile(mlopt.Graph(program()), backend="eager", progress=False, strict=True)


@pytest.mark.parametrize("level", list(Recompute))
def test_residuals_are_a_cut_and_less_with_every_level(plan, level, monkeypatch):
    monkeypatch.setattr("mlopt.autodiff.recompute._WORTH_IT", 0)
    outputs, tangent = joint(plan)
    kept = choose_residuals(outputs, tangent, SplitPolicy(level))
    assert set(kept).isdisjoint(tangent)
    below = choose_residuals(outputs, tangent, SplitPolicy(Recompute(max(level - 1, 0))))
    assert total_bytes(kept) <= total_bytes(below)
    assert (total_bytes(kept) < 0.5 * total_bytes(below)) == (level in (Recompute.POINTWISE, Recompute.PRODUCTS))
    again, stack = set(), [n for t in tangent for n in t.all_input_nodes if n not in tangent]
    while stack:  # everything the tangent half can see is kept, or made again from what is
        node = stack.pop()
        if node in kept or node in again or node.op == "get_attr":
            continue
        again.add(node)
        assert node.op != "placeholder"
        assert level or node.target.is_view  # of constants
        assert _may_recompute(node, level) or not level
        stack.extend(node.all_input_nodes)


def test_no_cut_is_smaller(monkeypatch):
    """All subsets of a small graph, tried one by one."""
    monkeypatch.setattr("mlopt.autodiff.recompute._WORTH_IT", 0)

    class Small(Lower):
        def training_step(self, batch):
            h = torch.relu(self.module[1](self.module[0](batch[0])))
            return (h * h * h).mean() + (self.upper.module.weight**2).sum()

    torch.manual_seed(0)
    net, upper = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)).double(), nn.Linear(1, 1, bias=False).double()
    data = [(torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 3, (7,)))]
    problems = [
        Small("lower", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.01), data=data,
              hypergradient=mlopt.CG(max_steps=3, damping=1.0)),
        type("U", (Upper,), {"training_step": lambda self, b: self.lower(b[0]).square().mean()})(
            "upper", module=upper, optimizer=torch.optim.SGD(upper.parameters(), lr=0.01), data=data),
    ]  # fmt: skip
    outputs, tangent = joint(mlopt.compile(mlopt.Graph(problems), backend="eager", progress=False, strict=True))
    graph = outputs[0].graph
    needed = residuals_of(outputs, tangent)
    above, stack = set(), list(needed)
    while stack:
        node = stack.pop()
        if node not in above and node.op != "get_attr":
            above.add(node)
            stack.extend(node.all_input_nodes)
    sizes = {n: max(num_bytes(n), 1) for n in above}
    level = Recompute.POINTWISE
    kept = choose_residuals(outputs, tangent, SplitPolicy(level))
    fixed = [n for n in above if n.op == "placeholder" or not _may_recompute(n, level)]
    free = [n for n in above if n not in fixed]
    assert 3 <= len(free) <= 18

    def complete(choice):
        """Add what must be kept if these are kept; None if something in the choice is of no use."""
        found, stack, seen = set(), list(needed), set()
        while stack:
            node = stack.pop()
            if node in seen or node.op == "get_attr":
                continue
            seen.add(node)
            if node in choice or node in fixed:
                found.add(node)
            else:
                stack.extend(node.all_input_nodes)
        return found

    best = min(
        sum(sizes[n] for n in complete(set(choice)))
        for count in range(len(free) + 1)
        for choice in itertools.combinations(free, count)
    )
    assert sum(sizes[n] for n in kept) == best < sum(sizes[n] for n in needed)
    assert [n for n in graph.nodes if n in kept] == kept


@pytest.mark.slow
def test_products_are_the_same(monkeypatch):
    """Hypergradients and trajectories, whatever is computed again; random numbers are drawn once."""
    monkeypatch.setattr("mlopt.autodiff.recompute._WORTH_IT", 0)
    found = []
    for policy in map(SplitPolicy, Recompute):
        monkeypatch.setattr("mlopt.compiler.SplitPolicy", lambda *args, given=policy: given)
        problems = program(dropout=0.3, size=4)
        plan = compiled(problems, "eager", monkeypatch)
        torch.manual_seed(1)
        plan.run(2)
        found.append([*plan.hypergradient("upper").values(), *problems[0].module.parameters()])
        assert (halves(plan).num_recomputed > 0) == (policy.allowed > 0)
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-10, atol=1e-12)


def test_a_budget_is_kept_and_the_least_is_computed_again(plan):
    outputs, tangent = joint(plan)
    most = total_bytes(choose_residuals(outputs, tangent, SplitPolicy()))
    products = []
    for part in (1.0, 0.6, 0.3, 0.1, 0.0):
        kept = choose_residuals(outputs, tangent, SplitPolicy(budget=int(part * most)))
        assert total_bytes(kept) <= part * most
        needed, stack = set(), [n for t in tangent for n in t.all_input_nodes if n not in tangent]
        while stack:
            node = stack.pop()
            if node not in needed and node not in kept and node not in tangent:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        products.append(sum("conv" in str(n.target) for n in needed))
    assert products[0] == products[1] == 0
    assert products == sorted(products) and products[-2] < products[-1]


@pytest.mark.slow
def test_compile_takes_the_budget_and_says_what_is_kept(monkeypatch):
    full = compiled(program(), GraphBackend(), monkeypatch)
    plan = compiled(program(), GraphBackend(), monkeypatch, residual_budget=100_000)
    assert halves(full).residual_bytes > halves(plan).residual_bytes <= 100_000
    assert "made again" in plan.explain()
    torch.testing.assert_close(plan.hypergradient("upper"), full.hypergradient("upper"), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="`residual_budget`: expected bytes >= 0 or None, got -1"):
        mlopt.compile(mlopt.Graph(program()), residual_budget=-1)


def test_kernels_keep_their_structure(monkeypatch):
    """The structure of a linear model shows in the plain split, so recomputation leaves it alone."""
    monkeypatch.setattr("mlopt.autodiff.recompute._WORTH_IT", 0)

    class Linear(mlopt.Problem):
        def training_step(self, batch):
            return (self.upper(batch[1]) * F.cross_entropy(self.module(batch[0]), batch[2], reduction="none")).mean()

    class Weights(mlopt.Problem):
        def training_step(self, batch):
            return F.cross_entropy(self.lower(batch[0]), batch[2])

    class PerSample(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(50))

        def forward(self, index):
            return torch.sigmoid(self.w[index])

    net, weights = nn.Linear(6, 3), PerSample()
    data = [(torch.randn(50, 6), torch.arange(50), torch.randint(0, 3, (50,)))]
    problems = [
        Linear("lower", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), data=data,
               hypergradient=mlopt.CG(max_steps=3, damping=1.0)),
        Weights("upper", module=weights, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1), data=data),
    ]  # fmt: skip
    plan = compiled(problems, GraphBackend(), monkeypatch)
    assert halves(plan).num_recomputed == 0
    assert find_glm(halves(plan).hvp) is not None
