"""Plain Python values that a training_step reads: a plan never goes on with an old one."""

import argparse
import warnings

import pytest
import torch
from torch import nn

import mlopt
from mlopt import compiler
from mlopt.errors import CaptureError, IslandWarning, VerificationWarning


class Tempered(nn.Module):
    """A linear layer with a temperature, as relaxed architectures have."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        self.temperature = 1.0

    def forward(self, x):
        return self.linear(x) / self.temperature


class Lower(mlopt.Problem):
    coefficient = 1.0  # in the class, until an instance has its own

    def training_step(self, batch):
        scale = self.upper.module.weight
        return (
            (self(batch) - 1).square().mean()
            + self.coefficient * (scale * self.module.linear.weight).square().sum()
            + self.settings.l1 * self.module.linear.weight.abs().sum()
        )


class Upper(mlopt.Problem):
    def training_step(self, batch):
        return self.lower.module.linear.weight.square().sum() + 0.1 * self.module.weight.square().sum()


def build(lower_class=Lower):
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64)
    module, scale = Tempered(), nn.Linear(2, 1, bias=False, dtype=torch.float64)
    lower = lower_class(
        "lower",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        data=[x],
        hypergradient=mlopt.Dense(),
    )
    lower.settings = argparse.Namespace(l1=0.0, name="lower")
    upper = Upper("upper", module=scale, optimizer=torch.optim.SGD(scale.parameters(), lr=0.1))
    return lower, upper, x


def expected(lower, upper, x):
    """The hypergradient by hand: H q = v, minus the mixed product."""
    theta, scale = lower.module.linear.weight, upper.module.weight
    v = 2 * theta.detach().flatten()
    t, c = lower.module.temperature, lower.coefficient
    hessian = 2 * x.T @ x / len(x) / t**2 + 2 * c * torch.diag(scale.detach().flatten() ** 2)
    q = torch.linalg.solve(hessian, v)
    return 0.2 * scale.detach() - (4 * c * scale * theta * q).detach()


CHANGES = {
    "of the problem": lambda lower: setattr(lower, "coefficient", 0.3),
    "of the module": lambda lower: setattr(lower.module, "temperature", 0.5),
    "in settings": lambda lower: setattr(lower.settings, "l1", 0.2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_value_is_used(change):
    lower, upper, x = build()
    plan = mlopt.compile(mlopt.Graph([lower, upper]), strict=True)
    torch.testing.assert_close(plan.hypergradient("upper")["weight"], expected(lower, upper, x))
    before = plan._executor.evaluate("lower").result.loss
    CHANGES[change](lower)
    torch.testing.assert_close(plan.hypergradient("upper")["weight"], expected(lower, upper, x))
    after = plan._executor.evaluate("lower").result.loss
    assert after != before
    torch.testing.assert_close(after, lower.training_step(x).detach())


def test_a_value_that_comes_back_needs_no_new_capture():
    lower, upper, _ = build()
    plan = mlopt.compile(mlopt.Graph([lower, upper]))
    for temperature in (1.0, 2.0, 1.0, 2.0):
        lower.module.temperature = temperature
        plan.step()
    assert len(plan._report.graphs["lower"]) == 2


def test_a_value_that_keeps_changing_makes_an_island():
    lower, upper, x = build()
    plan = mlopt.compile(mlopt.Graph([lower, upper]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(compiler._MAX_CHANGES + 3):
            lower.module.temperature = 1 + 0.1 * step
            plan.step()
            torch.testing.assert_close(plan.hypergradient("upper")["weight"], expected(lower, upper, x))
    (said,) = [str(w.message) for w in seen if issubclass(w.category, IslandWarning)]
    assert "self.module.temperature of problem 'lower'" in said and "register_buffer" in said
    assert "lower" in plan._report.islands


@pytest.mark.slow
def test_a_value_that_keeps_changing_is_an_error_if_strict():
    lower, upper, _ = build()
    plan = mlopt.compile(mlopt.Graph([lower, upper]), strict=True)
    with pytest.raises(CaptureError, match="keeps changing"):
        for step in range(compiler._MAX_CHANGES + 3):
            lower.coefficient = 1 + 0.1 * step
            plan.step()


def test_a_loss_that_depends_on_its_own_counter_is_noticed():
    class Counting(Lower):
        count = 0

        def training_step(self, batch):
            self.count += 1
            return super().training_step(batch) / self.count

    lower, upper, _ = build(Counting)
    with pytest.warns(VerificationWarning, match="problem 'lower'"):
        mlopt.compile(mlopt.Graph([lower, upper]))


def test_values_that_are_only_written_are_nobodys_business():
    class Logging(Lower):
        def training_step(self, batch):
            loss = super().training_step(batch)
            self.latest = 1.0
            return loss

    lower, upper, _ = build(Logging)
    mlopt.compile(mlopt.Graph([lower, upper]), strict=True)


def test_a_value_behind_a_property():
    class Annealed(Lower):
        progress = 0

        @property
        def coefficient(self):
            return 1 / (1 + self.progress)

    lower, upper, x = build(Annealed)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), strict=True)
    lower.progress = 3
    torch.testing.assert_close(plan.hypergradient("upper")["weight"], expected(lower, upper, x))


def test_dropout_rates_are_looked_at():
    lower, upper, _ = build()
    lower.module.linear = nn.Sequential(lower.module.linear, nn.Dropout(0.0))
    lower.module.linear.weight = lower.module.linear[0].weight
    plan = mlopt.compile(mlopt.Graph([lower, upper]))
    loss = plan._executor.evaluate("lower").result.loss
    lower.module.linear[1].p = 1.0
    assert plan._executor.evaluate("lower").result.loss != loss
