"""Lower loops on linear models by one kernel: the same training as by single steps, and when it is not used."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import mlopt
from mlopt.backends import inductor
from mlopt.backends.native import choice
from mlopt.backends.native.descent import GlmDescent

pytestmark = [
    pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing())),
    pytest.mark.xdist_group("native-descent"),  # they share packages
]
N, D, C = 30, 5, 3


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


@pytest.fixture
def made(monkeypatch):
    """How many steps each call of the kernel made, with the backend that users get."""
    monkeypatch.setenv("MLOPT_BACKEND", "auto")
    pytest.importorskip("mlopt._C")
    counts = []
    make = GlmDescent.make

    def counting(self, arguments, feedback, num_steps):
        counts.append(num_steps)
        return make(self, arguments, feedback, num_steps)

    monkeypatch.setattr(GlmDescent, "make", counting)
    return counts


def forget_choices(cache):
    for known in cache.rglob("native-*"):
        known.unlink()


@pytest.fixture
def faster(cache, monkeypatch):
    """Let every first way that is measured win."""
    forget_choices(cache)
    times = iter(range(10_000))
    monkeypatch.setattr(choice, "least_time", lambda *args: next(times))


class Linear(nn.Linear):
    """With a weight per sample that is not trained, but that somebody may change."""

    def __init__(self):
        super().__init__(D, C, dtype=torch.float64)
        self.register_buffer("logits", torch.zeros(N, dtype=torch.float64))


class Weighted(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        return {"loss": (self.module.logits.sigmoid() * losses).mean(), "mean": losses.mean()}


def program(backend, cache, scheduler=None):
    torch.manual_seed(0)
    net = Linear()
    optimizer = optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    problem = Weighted(
        "lower",
        module=net,
        optimizer=optimizer,
        data=[(torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,)))],
        scheduler=scheduler(optimizer) if scheduler else None,
        hypergradient=None,
        unroll_steps=10,
    )
    return mlopt.compile(mlopt.Graph([problem]), backend=backend, cache_dir=cache, progress=False, strict=True)


def state(plan):
    return {
        name: [t.detach().clone() for t in (*p.module.parameters(), *_velocities(p.optimizer))]
        for name, p in plan.graph.problems.items()
    }


def _velocities(optimizer):
    return [s["momentum_buffer"] for s in optimizer.state.values() if s.get("momentum_buffer") is not None]


def assert_same(a, b):
    for name, tensors in state(a).items():
        for got, expected in zip(tensors, state(b)[name], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_it_trains_like_single_steps(cache, made, faster):
    ours, theirs = program("auto", cache), program("eager", cache)
    made.clear()
    for lr in (0.3, 0.3, 0.1):  # numbers, what else the loss reads, and the state are read anew each time
        for plan in (ours, theirs):
            plan.graph.problems["lower"].optimizer.param_groups[0]["lr"] = lr
            plan.graph.problems["lower"].module.logits.add_(torch.linspace(-lr, lr, N))
        a, b = ours.run(10), theirs.run(10)
        assert_same(ours, theirs)
        for key, value in b["lower"].items():
            torch.testing.assert_close(a["lower"][key], value, rtol=1e-9, atol=1e-11)
    assert made == [9, 9, 9]  # tried, made, made; of the first run, eight are like these, too few to decide by
    assert "glm kernel" in ours.explain() and "softmax gradient; biases; momentum" in ours.explain()


def test_not_where_numbers_change(cache, made, faster):
    def halving(optimizer):
        return optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)

    ours, theirs = program("auto", cache, halving), program("eager", cache, halving)
    made.clear()
    for _ in range(2):
        ours.run(10)
        theirs.run(10)
    assert_same(ours, theirs)
    assert not made


def test_not_where_it_is_slower(cache, made, monkeypatch):
    times = iter(range(10_000, 0, -1))
    monkeypatch.setattr(choice, "least_time", lambda *args: next(times))
    forget_choices(cache)
    ours, theirs = program("auto", cache), program("eager", cache)
    for _ in range(3):
        ours.run(10)
        theirs.run(10)
    made.clear()
    ours.run(10)
    theirs.run(10)
    assert not made
    assert_same(ours, theirs)
    assert "not used; " in ours.explain()


def test_ctrl_c_while_measuring(cache, made, faster, monkeypatch):
    """It comes through, nothing is written, and what was measured is not kept."""
    plan = program("auto", cache)
    plan.run(2)
    before = state(plan)
    make = GlmDescent.make

    def interrupted(self, arguments, feedback, num_steps):
        outcome = make(self, arguments, feedback, num_steps)
        return dataclasses.replace(outcome, error=KeyboardInterrupt())

    with monkeypatch.context() as patch:
        patch.setattr(GlmDescent, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            plan.run(10)
    assert all(map(torch.equal, state(plan)["lower"], before["lower"]))
    assert not list(cache.rglob("native-*"))


def test_not_when_it_does_not_hold_any_more(cache, made, faster, caplog):
    ours, theirs = program("auto", cache), program("eager", cache)
    ours.run(10)
    theirs.run(10)
    (descent,) = (d.step.descent for d in ours._report.graphs["lower"])
    tables = descent._tables
    descent._tables = lambda *inputs: [*tables(*inputs)[:-1], torch.tensor(False)]
    for _ in range(2):
        ours.run(10)
        theirs.run(10)
    assert_same(ours, theirs)
    assert "not used any more" in caplog.text
