"""What a `training_step` does besides computing a loss: found while it is captured, and undone."""

import argparse
import collections
import copy
import dataclasses
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.errors import CaptureError, IslandWarning, ProblemError

RATE = 0.5
ARGS = argparse.Namespace(scale=1.0, inner=argparse.Namespace(depth=2.0))
HISTORY = []


def scaled(loss):
    return loss * RATE


class Fit(mlopt.Problem):
    """Evaluates `body`, a function of the problem, its loss and its batch."""

    def training_step(self, batch):
        return self.body(F.mse_loss(self.module(batch), torch.ones(4, 1)), batch)


def program(body, **options):
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    problem = Fit("fit", module=net, optimizer=optimizer, data=[torch.randn(4, 3)], hypergradient=None)
    vars(problem)["body"] = body.__get__(problem)
    options = {"backend": "eager", "progress": False, **options}
    return problem, lambda: mlopt.compile(mlopt.Graph([problem]), **options)


def loss_of(plan):
    return float(plan.step()["fit"]["loss"])


def write_out(training_step, **members):
    """Compile a problem of a class with these members."""
    cls = type("Written", (mlopt.Problem,), {"training_step": training_step, **members})
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    problem = cls("fit", module=net, optimizer=optimizer, data=[torch.randn(4, 3)], hypergradient=None)
    return mlopt.compile(mlopt.Graph([problem]), backend="eager", progress=False, strict=True)


class TestVariables:
    """Plain values of globals and enclosing functions are looked at in every step, like attributes."""

    def test_a_global(self, monkeypatch):
        plan = write_out(lambda self, batch: self.module(batch).square().mean() * RATE)
        before = loss_of(plan)
        monkeypatch.setitem(globals(), "RATE", 1.0)
        assert loss_of(plan) == pytest.approx(2 * before)

    def test_a_global_of_a_function_that_is_called(self, monkeypatch):
        plan = write_out(lambda self, batch: scaled(self.module(batch).square().mean()))
        before = loss_of(plan)
        monkeypatch.setitem(globals(), "RATE", 1.0)
        assert loss_of(plan) == pytest.approx(2 * before)

    def test_a_method_and_a_nested_function(self, monkeypatch):
        plan = write_out(
            lambda self, batch: self.weigh(self.module(batch).square().mean()),
            weigh=lambda self, loss: (lambda: loss * RATE)(),
        )
        before = loss_of(plan)
        monkeypatch.setitem(globals(), "RATE", 1.0)
        assert loss_of(plan) == pytest.approx(2 * before)

    def test_settings_within_settings(self, monkeypatch):
        plan = write_out(lambda self, batch: self.module(batch).square().mean() * ARGS.scale * ARGS.inner.depth)
        before = loss_of(plan)
        monkeypatch.setattr(ARGS.inner, "depth", 4.0)
        assert loss_of(plan) == pytest.approx(2 * before)
        monkeypatch.setattr(ARGS, "scale", 0.5)
        assert loss_of(plan) == pytest.approx(before)

    def test_a_variable_of_an_enclosing_function(self):
        @dataclasses.dataclass
        class Settings:
            temperature: float = 1.0

        settings, rate = Settings(), 0.5
        plan = write_out(lambda self, batch: self.module(batch).square().mean() * settings.temperature * rate)
        before = loss_of(plan)
        settings.temperature = 3.0
        assert loss_of(plan) == pytest.approx(3 * before)
        rate = 1.0
        assert loss_of(plan) == pytest.approx(6 * before)

    def test_one_that_has_no_value(self):
        """An empty cell; it may be filled later."""

        def training_step(self, batch):
            loss = self.module(batch).square().mean()
            return loss * rate if self.uses_rate else loss

        plan = write_out(training_step, uses_rate=False)
        before = loss_of(plan)
        rate = 2.0
        assert loss_of(plan) == pytest.approx(before)

    def test_one_that_changes_in_every_step_is_named(self, monkeypatch):
        plan = write_out(lambda self, batch: self.module(batch).square().mean() * RATE)
        with pytest.raises(CaptureError, match=r"it reads the global RATE of tests\.capture\.test_watch, which keeps"):
            for k in range(20):
                monkeypatch.setitem(globals(), "RATE", float(k))
                plan.step()

    def test_one_that_the_code_changes_itself_is_a_counter(self, monkeypatch):
        def training_step(self, batch):
            global RATE
            RATE += 1
            return self.module(batch).square().mean()

        monkeypatch.setitem(globals(), "RATE", 0.5)
        plan = write_out(training_step)
        now = RATE
        plan.step()
        assert now == RATE


CONTAINERS = {
    "list": ([], lambda c: c.append(1)),
    "replaced": ([None], lambda c: c.__setitem__(0, 1)),
    "dict": ({}, lambda c: c.__setitem__("k", 1)),
    "set": (set(), lambda c: c.add(1)),
    "deque": (collections.deque(maxlen=3), lambda c: c.append(1)),
    "counter": (collections.Counter(), lambda c: c.update(["k"])),
    "defaultdict": (collections.defaultdict(list), lambda c: c["k"]),
}


class TestContainers:
    @pytest.mark.parametrize("kind", CONTAINERS)
    def test_writing_into_one_is_refused_and_undone(self, kind):
        container, write = copy.deepcopy(CONTAINERS[kind])

        def body(self, loss, batch):
            write(self.kept)
            return loss

        problem, make = program(body, strict=True)
        problem.kept = container
        before = copy.deepcopy(container)
        with pytest.raises(CaptureError, match=r"training_step writes into self\.kept of problem 'fit'"):
            make()
        assert container == before and type(container) is type(before)

    def test_of_a_module_of_a_global_and_new_ones(self, monkeypatch):
        def to_module(self, batch):
            self.module.seen.append(1)
            return self.module(batch).mean()

        def to_global(self, batch):
            HISTORY.append(1)
            return self.module(batch).mean()

        def to_new(self, batch):
            vars(self).setdefault("new", []).append(1)
            return self.module(batch).mean()

        monkeypatch.setattr(nn.Linear, "seen", None, raising=False)
        for step, name in ((to_global, "the global HISTORY of"), (to_new, "self.new of problem 'fit'")):
            with pytest.raises(CaptureError, match=name):
                write_out(step)
        assert HISTORY == []
        original = nn.Linear.__init__

        def made(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.seen = []

        monkeypatch.setattr(nn.Linear, "__init__", made)
        with pytest.raises(CaptureError, match=r"self\.module\.seen of problem 'fit'"):
            write_out(to_module)

    def test_what_an_island_writes_is_kept(self):
        """With the same results as by plain autograd: as often as the loss is evaluated."""

        def body(self, loss, batch):
            self.kept.append(loss.detach())
            return loss

        problem, make = program(body)
        problem.kept = []
        with pytest.warns(IslandWarning, match="writes into"):
            plan = make()
        count = len(problem.kept)
        losses = [loss_of(plan) for _ in range(3)]
        assert [float(x) for x in problem.kept[count:]] == losses

    def test_tensors_without_values_are_not_left_behind(self):
        def body(self, loss, batch):
            self.last, self.known = loss.detach(), batch
            return loss

        problem, make = program(body, strict=True)
        problem.known = known = torch.zeros(2)
        make()
        assert problem.known is known or problem.known.shape == (4, 3)
        for name in ("last", "known"):
            assert type(vars(problem).get(name, known)) is torch.Tensor


class TestParameters:
    @pytest.mark.parametrize("precision", [None, "bf16"])
    @pytest.mark.parametrize("verify", [True, False])
    def test_a_list_made_before(self, verify, precision):
        """However small their part in the loss is."""
        problem, make = program(
            lambda self, loss, batch: loss + 1e-7 * sum(p.square().sum() for p in self.kept), verify=verify
        )
        problem.precision = precision
        problem.kept = tuple(problem.module.parameters())
        said = r"reads, not through its module, the parameter fit\.weight\n  at .*1e-7"
        with pytest.warns(IslandWarning, match=said):
            make()

    def test_sizes_of_one_may_be_read(self):
        def body(self, loss, batch):
            return loss / self.kept[0].numel() / self.kept[0].shape[1] + (self.kept[0].dtype is torch.float64)

        problem, make = program(body, strict=True)
        problem.kept = list(problem.module.parameters())
        make()

    def test_trained_parameters(self):
        """By name, as everywhere else; without those that the optimizer does not hold."""
        found = []

        def body(self, loss, batch):
            found.append(sorted(self.trained_parameters()))
            return loss + sum(p.square().sum() for p in self.trained_parameters().values())

        problem, make = program(body, strict=True)
        plan = make()
        assert found[0] == ["bias", "weight"] and "_trained_names" not in vars(problem)
        expected = [p.detach().clone().requires_grad_() for p in problem.module.parameters()]
        loss = F.mse_loss(F.linear(problem.data[0], *expected), torch.ones(4, 1))
        (loss + sum(p.square().sum() for p in expected)).backward()
        plan.step()
        for p, q in zip(problem.module.parameters(), expected, strict=True):
            torch.testing.assert_close(p, q - 0.1 * q.grad)

    @pytest.mark.parametrize("how", ["method", "attribute", "module"])
    def test_switching_requires_grad(self, how):
        def body(self, loss, batch):
            weight = self.module.weight
            if how == "method":
                weight.requires_grad_(False)
            elif how == "attribute":
                weight.requires_grad = False
            else:
                self.module.requires_grad_(False)
            loss = loss + self.module(batch).mean()
            self.module.requires_grad_(True)
            return loss

        _, make = program(body, strict=True)
        with pytest.raises(CaptureError, match=r"sets `requires_grad` of a parameter[^\n]*\n  at .*test_watch\.py"):
            make()

    def test_a_switch_that_is_left_is_put_back(self):
        def body(self, loss, batch):
            self.module.bias.requires_grad_(False)
            return loss

        problem, make = program(body)
        with pytest.raises((CaptureError, ProblemError)):
            make()
        assert problem.module.bias.requires_grad
        problem, make = program(lambda self, loss, batch: self.other.requires_grad_(False).sum() * 0 + loss)
        problem.other = problem.module.weight
        with pytest.raises((CaptureError, ProblemError)):
            make()
        assert problem.module.weight.requires_grad

    def test_setting_what_is_set_is_no_switch(self):
        def body(self, loss, batch):
            self.module.requires_grad_(True)
            return loss

        program(body, strict=True)[1]()

    def test_writing_through_data(self):
        def body(self, loss, batch):
            self.module.weight.data.mul_(0.5)
            return loss

        problem, make = program(body)
        before = problem.module.weight.detach().clone()
        with pytest.raises(ProblemError, match=r"writes to the parameter 'fit\.weight'"):
            make()
        torch.testing.assert_close(problem.module.weight.detach(), before, rtol=0, atol=0)


def test_the_optimizer_is_not_read_once():
    problem, make = program(lambda self, loss, batch: loss * self.optimizer.param_groups[0]["lr"])
    with pytest.warns(IslandWarning, match="reads the `optimizer` of problem 'fit'"):
        plan = make()
    first = loss_of(plan)
    problem.optimizer.param_groups[0]["lr"] = 0.0
    assert first > 0 and loss_of(plan) == 0


def test_a_failed_capture_says_one_thing(capfd):
    """torch.export would print the whole graph so far."""
    _, make = program(lambda self, loss, batch: loss * 2 if loss.item() > 1 else loss)
    with pytest.warns(IslandWarning, match=r"could not be captured as a graph\n  at .*loss\.item\(\) > 1"):
        make()
    assert capfd.readouterr().err == ""


def test_standard_error_of_a_capture_that_succeeds_is_shown(capfd):
    def body(self, loss, batch):
        sys.stderr.write("of the user's\n")
        return loss

    program(body, strict=True)[1]()
    assert "of the user's" in capfd.readouterr().err


def test_a_problem_without_data_is_told_so():
    net = nn.Linear(3, 1)
    cls = type("Fit", (mlopt.Problem,), {"training_step": lambda self, batch: self.module(batch[0]).mean()})
    problem = cls("fit", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), hypergradient=None)
    with pytest.raises(CaptureError, match=r"the batch is None: this problem was given no `data`"):
        mlopt.compile(mlopt.Graph([problem]), backend="eager", progress=False)
