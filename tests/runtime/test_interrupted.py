"""Global steps that end in an error in the middle: what has been made is counted, and is not made again."""

import copy

import pytest
import torch
from torch import nn

import mlopt
from tests.helpers.twins import assert_same


class Fit(mlopt.Problem):
    """Squares of linear maps; fails before a step of which the number is in `fail_at`."""

    def get_batch(self):
        self.drawn += 1
        if self.drawn in self.fail_at:
            self.fail_at.discard(self.drawn)
            self.drawn -= 1
            raise self.error
        generator = torch.Generator().manual_seed(1000 * len(self.name) + self.drawn)
        return torch.randn(6, 3, generator=generator)

    def get_extra_state(self):
        return {"drawn": self.drawn}

    def set_extra_state(self, state):
        self.drawn = state["drawn"]

    def training_step(self, batch):
        out = self.module(batch)
        loss = (out - 1).square().mean()
        for name in self.reads:
            other = getattr(self, name)
            loss = loss + 0.1 * (other(batch) * out).mean() + 0.1 * other.module.weight.square().sum()
        return loss


def make(fail_at=None, error=None, unroll=2):
    """Two lowest problems, one above both, and one above that."""
    torch.manual_seed(0)
    problems = []
    for name, reads in {"a": ["mid"], "bb": ["mid"], "mid": ["a", "bb", "top"], "top": ["mid"]}.items():
        net = nn.Linear(3, 2)
        problem = Fit(
            name,
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9),
            unroll_steps=unroll if len(name) < 3 else 1,
            hypergradient=mlopt.CG(max_steps=3),
        )
        problem.reads, problem.drawn, problem.error = reads, 0, error
        problem.fail_at = {fail_at[name]} if fail_at and name in fail_at else set()
        problems.append(problem)
    return mlopt.compile(mlopt.Graph(problems), backend="eager", progress=False, strict=True)


def steps(plan):
    return {name: plan.steps_of(name) for name in plan.graph.problems}


CASES = {"a": 6, "bb": 7, "mid": 3, "top": 3}


@pytest.mark.parametrize("how", ["step", "run", "run of many"])
@pytest.mark.parametrize("error", [OSError("of the disk"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("name", CASES)
def test_it_goes_on_where_it_stopped(name, error, how):
    """As many calls as would have been made otherwise give the same numbers, and the same counters."""
    expected = make()
    expected.run(12)
    plan = make({name: CASES[name]}, error)
    interrupted = 0
    while plan.num_steps < 12:
        try:
            if how == "step":
                assert {"a", "bb"} <= plan.step().keys()
            else:
                plan.run(1 if how == "run" else 12 - plan.num_steps)
        except (OSError, KeyboardInterrupt):
            interrupted += 1
            assert plan.steps_of("a") - plan.num_steps in (0, 1)
    assert interrupted == 1 and plan.num_steps == 12
    assert steps(plan) == steps(expected) == {"a": 12, "bb": 12, "mid": 6, "top": 6}
    assert_same(plan.state_dict(), expected.state_dict())


def test_the_state_knows_what_is_left():
    """A process that goes on from it makes the rest first."""
    expected = make()
    expected.run(7)
    plan = make({"mid": 3}, OSError("of the disk"))
    with pytest.raises(OSError, match="of the disk"):
        plan.run(7)
    assert (plan.num_steps, steps(plan)) == (5, {"a": 6, "bb": 6, "mid": 2, "top": 2})
    state = copy.deepcopy(plan.state_dict())
    other = make()
    other.load_state_dict(state)
    for each, told in ((plan, ["a", "bb", "mid", "top"]), (other, ["mid", "top"])):
        results = each.step()
        assert (list(results), each.num_steps) == (told, 6)
        each.step()
        assert_same(each.state_dict(), expected.state_dict())


def test_several_lowest_problems_are_brought_in_step():
    """One of them had run ahead of the other when that failed."""

    def program(fail=False):
        torch.manual_seed(0)
        problems = []
        for name in ("a", "bb"):
            net = nn.Linear(3, 2)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
            problems.append(Fit(name, module=net, optimizer=optimizer, hypergradient=None))
            problems[-1].reads, problems[-1].drawn, problems[-1].error = [], 0, OSError("of the disk")
            problems[-1].fail_at = {3} if fail and name == "bb" else set()
        return mlopt.compile(mlopt.Graph(problems), backend="eager", progress=False)

    expected, plan = program(), program(fail=True)
    expected.run(5)
    with pytest.raises(OSError, match="of the disk"):
        plan.run(5)
    assert (plan.num_steps, steps(plan)) == (2, {"a": 3, "bb": 2})
    plan.run(3)
    assert_same(plan.state_dict(), expected.state_dict())


def test_an_engine_counts_what_was_made():
    """A run that is called again makes as many steps as were asked for, not more."""
    plan = make({"a": 8}, OSError("of the disk"))
    engine = mlopt.Engine(plan, steps=12, log_every=5, progress=False)
    with pytest.raises(OSError, match="of the disk"):
        engine.run()
    assert engine.step == plan.num_steps == 7
    engine.run()
    assert engine.step == plan.num_steps == plan.steps_of("a") == 12
    expected = make()
    expected.run(12)
    assert_same(plan.state_dict(), expected.state_dict())
