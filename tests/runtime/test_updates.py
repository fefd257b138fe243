"""Compiled updates of problems above others, and graphs of several steps, against the optimizer's own, in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.optim import lr_scheduler

import mlopt
from tests.helpers.extras import extras
from tests.helpers.steps import GraphBackend, assert_same_state, compiled, state_of


class Lower(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        decay = sum(
            (r.exp() * p.square()).sum() for r, p in zip(self.upper.module.rates, self.module.parameters(), strict=True)
        )
        return F.cross_entropy(self.module(x), y) + 0.1 * decay


class Upper(mlopt.Problem):
    """Reads one of its parameters directly, one through the lower problem, one both ways, one not at all."""

    def training_step(self, batch):
        x, y = batch
        direct = (self.module.rates[0] - 0.1).square().sum() + self.module.offset.square().sum()
        return {"loss": F.cross_entropy(self.lower(x) + self.module.offset, y) + 0.01 * direct, "acc": 0.5}


class Rates(nn.Module):
    def __init__(self, lower):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(3).double())
        self.rates = nn.ParameterList([nn.Parameter(torch.full_like(p, -3.0)) for p in lower.parameters()])
        self.unused = nn.Parameter(torch.ones(2).double())


class Hooked(Upper):
    def param_callback(self):
        self.module.offset.data.clamp_(-1, 1)


def make(
    upper_optimizer=lambda ps: optim.Adam(ps, lr=0.02),
    *,
    cls=Upper,
    batches=1,
    lower_scheduler=None,
    upper_scheduler=None,
    unroll_steps=12,
    dropout=0.0,
    **options,
):
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(4, 3))
    net = net.double()
    rates = Rates(net)
    data = [(torch.randn(9, 5).double(), torch.randint(0, 3, (9,))) for _ in range(batches + 1)]
    sgd = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    adam = upper_optimizer(rates.parameters())
    lower = Lower(
        "lower",
        module=net,
        optimizer=sgd,
        data=data[:-1],
        scheduler=lower_scheduler and lower_scheduler(sgd),
        hypergradient=mlopt.CG(max_steps=5, damping=0.1),
        unroll_steps=unroll_steps,
    )
    upper = cls(
        "upper",
        module=rates,
        optimizer=adam,
        data=data[-1:],
        scheduler=upper_scheduler and upper_scheduler(adam),
        **options,
    )
    return [lower, upper]


def compare(make, monkeypatch, *, steps=(30, 40), tolerance=1e-9):
    """Train two equal programs, by graphs and by the optimizers themselves."""
    ours, theirs = make(), make()
    plan = compiled(ours, GraphBackend(), monkeypatch)
    reference = compiled(theirs, "eager", monkeypatch)
    torch.manual_seed(7)
    results = [plan.run(n) for n in steps]
    torch.manual_seed(7)
    for n, result in zip(steps, results, strict=True):
        expected = reference.run(n)
        for name in expected:
            torch.testing.assert_close(result[name], expected[name], rtol=tolerance, atol=tolerance)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_state(state_of(a), state_of(b), tolerance)
    return plan


def count_leaps(monkeypatch, plan):
    """Count the calls of the lower problem's graph of several steps."""
    (derivatives,) = plan._report.graphs["lower"]
    graph, calls = derivatives.step.several[1], []
    forward = graph._forward

    def counted(*args):
        calls.append(None)
        return forward(*args)

    monkeypatch.setattr(graph, "_forward", counted)
    return calls


def count(monkeypatch, plan, name, method):
    """Count the calls of a method of a problem's compiled update."""
    (derivatives,) = plan._report.graphs[name]
    target = derivatives.update
    original, calls = getattr(type(target), method), []

    def counted(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if self is target:
            calls.append(result)
        return result

    monkeypatch.setattr(type(target), method, counted)
    return calls


OPTIMIZERS = {
    "sgd": lambda ps: optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: optim.Adam(ps, lr=0.02),
    "adamw": lambda ps: optim.AdamW(ps, lr=0.02),
    "rmsprop": lambda ps: optim.RMSprop(ps, lr=0.01),
    "groups": lambda ps: optim.Adam([{"params": [p], "lr": 0.01 * (k + 1)} for k, p in enumerate(ps)]),
}


@pytest.mark.parametrize("name", extras(OPTIMIZERS, lambda name: list(OPTIMIZERS).index(name) % 6))
def test_updates_of_an_upper_problem(name, monkeypatch):
    plan = compare(functools.partial(make, OPTIMIZERS[name]), monkeypatch)
    assert "one graph makes this update" in plan.explain()
    unused = plan.graph.problems["upper"].module.unused
    assert torch.equal(unused, torch.ones(2).double()) and unused.grad is None
    calls = count(monkeypatch, plan, "upper", "run")
    plan.run(36)
    assert len(calls) == 3


@pytest.mark.parametrize(
    "options",
    [{"clip_norm": 0.01}, pytest.param({"normalize_gradient": True}, marks=pytest.mark.slow)],
    ids=["clip", "normalize"],
)
def test_the_total_gradient_is_scaled(options, monkeypatch):
    plan = compare(functools.partial(make, **options), monkeypatch)
    assert "one graph makes this update" in plan.explain()


def test_schedulers(monkeypatch):
    compare(functools.partial(make, upper_scheduler=lambda o: lr_scheduler.StepLR(o, 2, 0.5)), monkeypatch)


@pytest.mark.slow
def test_several_lower_batches_and_accumulation(monkeypatch):
    compare(functools.partial(make, batches=3, gradient_accumulation=2), monkeypatch)


@pytest.mark.slow
def test_hooks_see_the_gradient(monkeypatch):
    plan = compare(functools.partial(make, cls=Hooked), monkeypatch)
    assert "it has hooks around its step: param_callback" in plan.explain()


def test_gradients_are_kept_where_asked_for(monkeypatch):
    ours = make()
    plan = compiled(ours, GraphBackend(), monkeypatch)
    plan.run(24)
    assert all(p.grad is None for p in ours[1].module.parameters())
    plan.keep_gradients = True
    plan.run(12)
    assert all(p.grad is not None for n, p in ours[1].module.named_parameters() if n != "unused")


def test_a_changed_optimizer_steps_by_itself(monkeypatch):
    ours, theirs = make(), make()
    plan, reference = compiled(ours, GraphBackend(), monkeypatch), compiled(theirs, "eager", monkeypatch)
    calls = count(monkeypatch, plan, "upper", "run")
    plan.run(24), reference.run(24)
    for problems in (ours, theirs):
        problems[1].optimizer.param_groups[0].update(amsgrad=True, lr=0.5)
        for state in problems[1].optimizer.state.values():
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
    plan.run(24), reference.run(24)
    assert len(calls) == 1  # the first step made the optimizer's state
    for a, b in zip(ours, theirs, strict=True):
        assert_same_state(state_of(a), state_of(b), 1e-9)


class Wrong(GraphBackend):
    """Gets one kind of graph wrong: those with so many outputs."""

    def __init__(self, is_wrong):
        self.is_wrong = is_wrong

    def lower(self, module):
        graph = super().lower(module)
        if self.is_wrong(module):
            forward = graph._forward
            graph._forward = lambda *args: [r * 1.001 if i == 0 else r for i, r in enumerate(forward(*args))]
        return graph


def num_ends(module):
    nodes = list(module.graph.nodes)
    return sum(n.op == "placeholder" for n in nodes), len(nodes[-1].args[0])


def test_a_wrong_update_is_not_used(monkeypatch):
    backend = Wrong(lambda module: any("sqrt" in str(n.target) for n in module.graph.nodes))  # Adam's
    with pytest.raises(mlopt.errors.VerificationError, match="compiled step disagrees with its optimizer's own"):
        compiled(make(), backend, monkeypatch)


def test_several_steps_in_one_graph(monkeypatch):
    plan = compare(make, monkeypatch)
    (derivatives,) = plan._report.graphs["lower"]
    assert derivatives.graphs.repeated.times == 11
    calls = count_leaps(monkeypatch, plan)
    plan.run(2)  # until the upper problem is due
    assert not calls
    plan.run(12), plan.run(5)
    assert len(calls) == 1


@pytest.mark.slow
def test_a_schedule_within_a_graph_of_several_steps_is_kept(monkeypatch):
    make_ = functools.partial(make, lower_scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.97))
    plan = compare(make_, monkeypatch)
    calls = count_leaps(monkeypatch, plan)
    plan.run(12)
    assert not calls


@pytest.mark.parametrize(
    "options", [{"batches": 2}, {"unroll_steps": 3}, {"dropout": 0.3}], ids=["batches", "short", "random"]
)
def test_no_graph_of_several_steps(options, monkeypatch):
    plan = compiled(make(**options), GraphBackend(), monkeypatch)
    (derivatives,) = plan._report.graphs["lower"]
    assert derivatives.graphs.step is not None and derivatives.graphs.repeated is None


def test_wrong_graphs_of_several_steps_are_not_used(monkeypatch):
    def is_several(module):
        return num_ends(module)[1] == 8 and len(module.graph.nodes) > 300

    with pytest.raises(mlopt.errors.VerificationError, match="11 steps by one graph differ"):
        compiled(make(), Wrong(is_several), monkeypatch)


class Failing(GraphBackend):
    """The graph of several steps raises at its second call after verification, or Ctrl-C is pressed."""

    def __init__(self, error):
        self.error, self.countdown = error, -1

    def lower(self, module):
        graph = super().lower(module)
        if num_ends(module)[1] == 8 and len(module.graph.nodes) > 300:
            forward = graph._forward

            def fail(*args):
                self.countdown -= 1
                if self.countdown == 0:
                    raise self.error
                return forward(*args)

            graph._forward = fail
        return graph


def test_ctrl_c_between_graphs_of_several_steps(monkeypatch):
    ours, theirs = make(unroll_steps=34), make(unroll_steps=34)
    backend = Failing(KeyboardInterrupt())
    plan, reference = compiled(ours, backend, monkeypatch), compiled(theirs, "eager", monkeypatch)
    plan.run(1), reference.run(1)
    backend.countdown = 2
    with pytest.raises(KeyboardInterrupt):
        plan.run(30)
    reference.run(11)
    assert plan.num_steps == 12
    assert_same_state(state_of(ours[0]), state_of(theirs[0]), 1e-10)


@pytest.mark.slow
def test_an_error_between_graphs_of_several_steps(monkeypatch):
    ours, theirs, backend = make(unroll_steps=34), make(unroll_steps=34), Failing(RuntimeError("no more"))
    plan, reference = compiled(ours, backend, monkeypatch), compiled(theirs, "eager", monkeypatch)
    plan.run(1), reference.run(1)
    backend.countdown = 2
    plan.run(40), reference.run(40)
    assert_same_state(state_of(ours[0]), state_of(theirs[0]), 1e-9)
