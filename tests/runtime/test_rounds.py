"""Rounds of steps in one native call: bit for bit what single steps do, wherever they end."""

import itertools
import warnings

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

import mlopt
from mlopt import ops
from mlopt.errors import SolverWarning
from mlopt.runtime import rounds
from mlopt.runtime.due import Calendar
from mlopt.runtime.rounds import RoundRunner
from tests.helpers.packages import PackageBackend
from tests.helpers.twins import Twins, assert_same, batches, make

pytestmark = pytest.mark.skipif(not ops.available(), reason="the native extension is not built")
ROUND = 3  # lower steps
WARM = 8 * ROUND  # global steps after which every step has its program, and rounds have been tried again


class Counted:
    """Notes the programs of every call."""

    def __init__(self, monkeypatch):
        self.made = []
        native = rounds._extension()

        class Extension:
            @staticmethod
            def run_programs(calls, order, recorder, shield):
                result = native.run_programs(calls, order, recorder, shield)
                self.made.append(len(result.values) + (result.doubtful is not None))
                return result

        monkeypatch.setattr(rounds, "_extension", lambda: Extension)

    def take(self):
        """Return what was noted since the last time."""
        made, self.made = self.made, []
        return made


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


def sound(**options):
    """Solves that end well."""
    return make(estimator=mlopt.CG(max_steps=3, damping=5.0), **options)


def three():
    """An upper step after every third lower one."""
    return sound(lower={"unroll_steps": ROUND})


def test_steps_and_runs(monkeypatch, counted):
    """A step is a round of its own; a run makes several of them at once, more and more."""
    twins = Twins(sound, monkeypatch)
    twins.step(WARM)
    counted.take()
    assert twins.step(4) == 4
    assert counted.take() == [2] * 4
    twins.run(30)
    made = counted.take()
    assert sum(made) == 60 and made[:-1] == sorted(made[:-1]) and max(made) >= 16


def test_longer_unrolls(monkeypatch, counted):
    """Steps of a minibatch loop are made one by one; with what is due after the last."""
    twins = Twins(three, monkeypatch)
    twins.step(WARM)
    counted.take()
    twins.step(2 * ROUND)
    assert counted.take() == [1, 1, 2] * 2


@pytest.mark.parametrize("order", [1, -1], ids=["in-step", "out-of-step"])
def test_lists_of_different_lengths(order, monkeypatch, counted):
    """Every round has its own pair of batches."""
    sizes = iter([(8, 8, 8), (8, 8)][::order] * 2)
    twins = Twins(lambda: sound(data=lambda: batches(next(sizes))), monkeypatch)
    twins.run(WARM)
    counted.take()
    twins.run(13)
    assert sum(counted.take()) == 26


def test_loaders_draw_in_the_order_of_steps(monkeypatch, counted):
    """Both shuffle by the one global generator, so one round is made at a time."""

    def loader():
        return DataLoader(TensorDataset(*batches([24])[0]), batch_size=8, shuffle=True)

    twins = Twins(lambda: sound(data=loader), monkeypatch)
    twins.run(WARM)
    counted.take()
    twins.run(9)
    assert counted.take() == [2] * 9


class Failing:
    """A loader of which one batch cannot be read at first."""

    def __init__(self, fails_at):
        self.count, self.fails_at = 0, fails_at

    def __iter__(self):
        return self

    def __next__(self):
        if self.count + 1 == self.fails_at:
            self.fails_at = 0
            raise OSError("of the disk")
        self.count += 1
        generator = torch.Generator().manual_seed(self.count)
        return torch.randn(8, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)


@pytest.mark.parametrize("name", ["lower", "upper"])
def test_a_batch_that_cannot_be_read(name, monkeypatch, counted):
    """Nothing was made; said with the step, once; and no batch is left out."""
    fails = iter([(30, 0), (0, 0)] if name == "lower" else [(0, 30), (0, 0)])

    def problems():
        lower_fails, upper_fails = next(fails)
        made = sound()
        made[0].data, made[1].data = Failing(lower_fails), Failing(upper_fails)
        return made

    twins = Twins(problems, monkeypatch)
    twins.run(WARM)
    assert sum(counted.take()) > 0
    with pytest.raises(OSError, match="of the disk") as caught:
        twins.plan.run(12)
    assert f"(in step 30 of problem {name!r})" in caught.value.__notes__
    assert twins.plan.num_steps == twins.plan.steps_of("lower") == twins.plan.steps_of("upper") == 29
    twins.plan.run(12 - (29 - WARM))
    twins.reference.run(12)
    assert_same(*(values(plan) for plan in (twins.plan, twins.reference)))


def test_a_loss_that_draws_makes_no_rounds(monkeypatch, counted):
    for options in ({"dropout": 0.5}, {"lower_dropout": 0.5}):
        Twins(lambda options=options: sound(**options), monkeypatch).run(WARM)
    assert sum(counted.take()) == 0


def replace_batch(plan, problems):
    problems[0].data[0] = tuple(t.clone() for t in problems[0].data[1])


def change_rate(plan, problems):
    problems[0].optimizer.param_groups[0]["lr"] *= 0.5
    problems[1].optimizer.param_groups[0]["lr"] *= 2


def load_optimizer(plan, problems):
    for problem in problems:
        problem.optimizer.load_state_dict(problem.optimizer.state_dict())


def evaluate(plan, problems):
    problems[1].module.norm.eval()


def write_parameters(plan, problems):
    with torch.no_grad():
        for problem in problems:
            for parameter in problem.module.parameters():
                parameter.mul_(0.9)


def keep(plan, problems):
    plan.keep_gradients = True


def schedule(plan, problems):
    problems[0].scheduler = optim.lr_scheduler.StepLR(problems[0].optimizer, 1, gamma=0.9)


def unroll(plan, problems):
    problems[0].unroll_steps = 2


def hook(plan, problems):
    problems[0].on_inner_loop_start = lambda: problems[0].module[0].bias.data.zero_()


def restore(plan, problems):
    plan.load_state_dict(plan.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        *(replace_batch, change_rate, load_optimizer, evaluate, write_parameters, keep, schedule, unroll, hook),
        restore,
    ],
    ids=lambda f: f.__name__,
)
def test_what_is_changed_between_runs(change, monkeypatch, counted):
    twins = Twins(sound, monkeypatch)
    twins.run(WARM)
    assert sum(counted.take()) > 10
    twins.each(change)
    twins.run(7)
    twins.step(3)
    twins.run(11)


def fail(backend, call, error):
    """Let one call of a package fail, counted from now on."""
    calls = itertools.count()

    def before(inputs):
        if next(calls) == call:
            backend.before = lambda inputs: None
            raise error

    backend.before = before


def calls_in_a_round(twins, backend):
    """Make one, and return how many packages it called: the first makes the lower step."""
    calls = itertools.count()
    backend.before = lambda inputs: next(calls)
    twins.run(1)
    backend.before = lambda inputs: None
    return next(calls)


@pytest.mark.parametrize("call", range(0, 21, 3))
def test_a_package_that_fails(call, monkeypatch, counted):
    """What has been written stays; the rest of the round is made in the usual way, and so is what had failed."""
    backend = PackageBackend()
    twins = Twins(sound, monkeypatch, [backend, PackageBackend()])
    twins.run(2 * WARM)
    size = calls_in_a_round(twins, backend)
    counted.take()
    fail(backend, call, RuntimeError("of the machine"))
    twins.run(12)
    made = counted.take()
    assert made[0] == call // size * 2 + (call % size > 0)
    assert sum(made[1:]) == 0


@pytest.mark.parametrize("call", [0, 2])
def test_a_package_that_fails_in_a_single_step(call, monkeypatch, counted):
    """The step is made all the same, and returns what it always returns."""
    backend = PackageBackend()
    twins = Twins(sound, monkeypatch, [backend, PackageBackend()])
    twins.step(WARM)
    fail(backend, call, RuntimeError("of the machine"))
    twins.step(3)


def values(plan):
    """All but the positions in the data: of a list, any number of batches may have been looked at."""
    state = plan.state_dict()
    return [(p["tensors"], p["optimizer"], p["samples"]) for p in state["problems"].values()]


@pytest.mark.parametrize("call", range(0, 25, 5))
def test_ctrl_c(call, monkeypatch, counted):
    """Every step is made whole or not at all, and all counters tell which."""
    backend = PackageBackend()
    twins = Twins(sound, monkeypatch, [backend, PackageBackend()])
    twins.run(2 * WARM)
    counted.take()
    before = twins.plan.num_steps
    lower, upper = twins.plan.steps_of("lower"), twins.plan.steps_of("upper")
    fail(backend, call, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        twins.plan.run(12)
    made = counted.take()[0]
    assert twins.plan.num_steps == before + made // 2
    assert (twins.plan.steps_of("lower"), twins.plan.steps_of("upper")) == (lower + (made + 1) // 2, upper + made // 2)
    twins.reference.run(made // 2)
    if made % 2:
        twins.reference._executor.step("lower")
    assert_same(*(values(plan) for plan in (twins.plan, twins.reference)))
    twins.plan.run(12 - made // 2)
    if made % 2:
        twins.reference._executor.step("upper")
    twins.reference.run(12 - made // 2 - made % 2)
    assert_same(*(values(plan) for plan in (twins.plan, twins.reference)))
    assert twins.plan.num_steps == before + 12


@pytest.mark.parametrize(
    ("estimator", "rate"),
    [(mlopt.CG(max_steps=3), -2.0), (mlopt.Neumann(num_terms=8, scale=0.1), 50.0)],
    ids=["cg", "series"],
)
def test_a_solve_that_ends_badly_is_told_of_before_it_is_used(estimator, rate, monkeypatch, counted):
    twins = Twins(lambda: make(estimator=estimator), monkeypatch)
    twins.run(WARM)
    twins.each(lambda plan, problems: problems[1].module.rates.data.fill_(rate))
    before = twins.plan.steps_of("lower")
    counted.take()
    for plan in (twins.plan, twins.reference):
        plan._executor._warned.clear()
    for plan in (twins.plan, twins.reference):
        with warnings.catch_warnings():
            warnings.simplefilter("error", SolverWarning)
            with pytest.raises(SolverWarning):
                plan.run(6)
        assert plan.steps_of("lower") == before + 1 and plan.steps_of("upper") == before
        plan._executor._warned.clear()
    assert counted.take() == [2]  # the second was not written
    assert_same(*(values(plan) for plan in (twins.plan, twins.reference)))
    with pytest.warns(SolverWarning):
        twins.run(6)


def test_kernels_of_descent(tmp_path, monkeypatch, counted):
    """A whole unroll on one batch is one kernel and a last step; several rounds are one call."""
    from mlopt.backends import NativeBackend
    from mlopt.backends.native import choice

    times = itertools.count()
    monkeypatch.setattr(choice, "least_time", lambda *args: next(times))

    def linear():
        torch.manual_seed(1)
        net, rates = nn.Linear(5, 1, bias=False), nn.Linear(5, 1, bias=False)

        class Lower(mlopt.Problem):
            def training_step(self, batch):
                x, y = batch
                penalty = (self.upper.module.weight.exp() * self.module.weight.square()).sum()
                return nn.functional.binary_cross_entropy_with_logits(self.module(x).squeeze(1), y) + penalty

        class Upper(mlopt.Problem):
            def training_step(self, batch):
                x, y = batch
                return nn.functional.binary_cross_entropy_with_logits(self.lower(x).squeeze(1), y)

        def data():
            return [(torch.randn(40, 5), torch.randint(0, 2, (40,)).float())]

        sgd = optim.SGD(net.parameters(), lr=0.1)
        cg = mlopt.CG(max_steps=3)
        return [
            Lower("lower", module=net, optimizer=sgd, data=data(), unroll_steps=10, hypergradient=cg),
            Upper("upper", module=rates, optimizer=optim.Adam(rates.parameters()), data=data()),
        ]

    backends = [NativeBackend(PackageBackend(), tmp_path), NativeBackend(PackageBackend(), tmp_path)]
    twins = Twins(linear, monkeypatch, backends)
    for derivatives in twins.plan._report.graphs["lower"] + twins.reference._report.graphs["lower"]:
        kernel = derivatives._call["hvp"]  # products of a kernel are no part of programs
        derivatives._call["hvp"] = getattr(kernel, "_graph", kernel)
    twins.run(80)
    counted.take()
    twins.run(70)
    made = counted.take()
    assert sum(made) == 14 and max(made) > 2, twins.plan.explain()
    twins.run(15)  # ends within a round
    twins.run(25)


def test_callbacks_see_every_step(monkeypatch, counted):
    """Where somebody is told of results, steps are made in the usual way."""
    twins = Twins(sound, monkeypatch)
    twins.run(WARM)
    counted.take()
    told = []
    twins.plan.run(6, on_results=lambda results, count: told.append((list(results), count)))
    assert sum(count for names, count in told if "upper" in names) == 6 and counted.take() == []


def test_nothing_is_tried_where_nothing_can_be(monkeypatch):
    """Looking for programs takes as long as a small step, and is given up, though never for good."""
    tried = []
    parts = RoundRunner._parts
    monkeypatch.setattr(RoundRunner, "_parts", lambda self, limit: tried.append(limit) or parts(self, limit))
    twins = Twins(sound, monkeypatch, "eager")
    for _ in range(1000):
        twins.plan._rounds.run(1)
    assert 10 < len(tried) < 40


class TestCalendar:
    """Two lowest problems, one above both, one above that."""

    @pytest.fixture
    def states(self):
        return {"a": 0, "b": 0, "mid": 0, "top": 0}

    @pytest.fixture
    def calendar(self, states):
        lowers = {"a": [], "b": [], "mid": ["a", "b"], "top": ["mid"]}

        class Planned:
            def __init__(self, name):
                self.name, self.lowers = name, lowers[name]

        class Plan:
            problems = [Planned(name) for name in lowers]

            def __getitem__(self, name):
                return Planned(name)

        class Problem:
            def __init__(self, unroll, warmup=0):
                self.unroll_steps, self.warmup_steps = unroll, warmup

        class State:
            num_steps, steps_seen = 0, {}

        self.states = {name: State() for name in lowers}
        problems = {"a": Problem(3, 2), "b": Problem(2), "mid": Problem(2), "top": Problem(1)}
        return Calendar(Plan(), problems, self.states)

    def play(self, calendar, count):
        """Make steps one by one; return the problems that step above, for each global step."""
        played = []
        for _ in range(count):
            due = []
            for name in ("a", "b", "mid", "top"):
                if calendar.is_due(name):
                    due.append(name)
                    state = self.states[name]
                    state.num_steps += 1
                    lowers = {"mid": ("a", "b"), "top": ("mid",)}.get(name, ())
                    state.steps_seen = {lower: self.states[lower].num_steps for lower in lowers}
            played.append(due[2:])
        return played

    def test_due(self, calendar):
        """`a` warms up for two steps; `mid` waits for the slower of the two, `top` for two steps of `mid`."""
        expected = [[], [], [], [], ["mid"], [], [], ["mid", "top"], [], [], ["mid"], [], [], ["mid", "top"]]
        assert self.play(calendar, len(expected)) == expected

    def test_ahead(self, calendar):
        """What is foreseen is what comes, for every limit."""
        for limit in (1, 2, 5, 3, 7, 4, 1, 2, 9, 5):
            count = calendar.steps_until_due(limit)
            foreseen = calendar.due_after(count)
            assert 1 <= count <= limit
            assert self.play(calendar, count) == [[]] * (count - 1) + [foreseen]

    def test_beginning(self, calendar):
        beginnings = []
        for _ in range(14):
            beginnings.append(calendar.is_beginning())
            self.play(calendar, 1)
        assert [k for k, yes in enumerate(beginnings) if yes] == [8]
