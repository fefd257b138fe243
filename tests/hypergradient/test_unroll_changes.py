"""`Unroll` where something moves between the steps that are differentiated: buffers, learning rates down to 0."""

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import mlopt


class Weighted(nn.Module):
    """A parameter, and a coefficient that somebody sets."""

    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.register_buffer("coefficient", torch.tensor(1.0, dtype=torch.float64))


class Low(mlopt.Problem):
    def training_step(self, batch):
        return self.owner().coefficient * (self.module.w - self.up.module.w).square().sum() / 2

    def owner(self):
        return (self.up if self.of_another else self).module


class Up(mlopt.Problem):
    def training_step(self, batch):
        return (self.low.module.w - 3).square().sum() / 2


def program(estimator, make_optimizer, *, of_another=False, scheduler=None, dtype=torch.float64):
    low_module, up_module = Weighted([1.0, -2.0]).to(dtype), Weighted([0.5, 0.3]).to(dtype)
    optimizer = make_optimizer([low_module.w])
    low = Low(
        "low",
        module=low_module,
        optimizer=optimizer,
        scheduler=scheduler and scheduler(optimizer),
        hypergradient=estimator,
        unroll_steps=100,
    )
    low.of_another = of_another
    up = Up("up", module=up_module, optimizer=optim.SGD([up_module.w], lr=0.1))
    return mlopt.compile(mlopt.Graph([low, up]), backend="eager", progress=False), low_module, up_module


@pytest.mark.parametrize("of_another", [False, True], ids=["own", "of another problem"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7])
def test_buffers_that_somebody_sets_between_steps(num_steps, of_another):
    """Every step is differentiated with what it had, not with what the last checkpoint had, or what there is now."""
    coefficients = [1.0, 2.0, 3.0, 0.5, 4.0, 1.5, 2.5]
    plan, low, up = program(mlopt.Unroll(num_steps), lambda p: optim.SGD(p, lr=0.1), of_another=of_another)
    w, d = low.w.detach().clone(), up.w.detach().clone().requires_grad_()
    for k, c in enumerate(coefficients):
        (up if of_another else low).coefficient.fill_(c)
        plan.step()
        w = w - 0.1 * c * (w - (d if k >= len(coefficients) - num_steps else d.detach()))
    (up if of_another else low).coefficient.fill_(9.0)
    (expected,) = torch.autograd.grad((w - 3).square().sum() / 2, d)
    torch.testing.assert_close(low.w, w.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.hypergradient("up")["w"], expected, rtol=1e-12, atol=0)


def adam_step(w, g, state, t, lr, decay):
    m, v = state
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    w = w * (1 - lr * decay)
    return w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8), (m, v)


SCHEDULES = {
    "warm-up from 0": lambda o: lr_scheduler.LambdaLR(o, lambda k: min(1.0, k / 3)),
    "cosine to 0": lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
}


@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["adam", "adamw"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_adam_with_a_learning_rate_of_zero(schedule, decay):
    """torch's differentiable mode divides by it: the step is right, and its derivatives would be NaN."""
    kind = optim.AdamW if decay else optim.Adam
    settings = {"lr": 0.1, "weight_decay": decay}
    plan, low, up = program(mlopt.Unroll(3), lambda p: kind(p, **settings), scheduler=SCHEDULES[schedule])
    rates, recorded = [], []
    for _ in range(6):
        group = plan.graph.problems["low"].optimizer.param_groups[0]
        rates.append(group["lr"])
        state = plan.graph.problems["low"].optimizer.state.get(low.w)
        zeros = torch.zeros_like(low.w)
        kept = (zeros, zeros) if state is None else (state["exp_avg"].clone(), state["exp_avg_sq"].clone())
        recorded.append((low.w.detach().clone(), kept))
        plan.step()
        d = up.w.detach().clone().requires_grad_()
        first = max(len(rates) - 3, 0)
        w, moments = recorded[first]
        for k in range(first, len(rates)):
            w, moments = adam_step(w, w - d, moments, k + 1, rates[k], decay)
        torch.testing.assert_close(low.w, w.detach(), rtol=1e-9, atol=0)
        (expected,) = torch.autograd.grad((w - 3).square().sum() / 2, d, allow_unused=True)
        torch.testing.assert_close(plan.hypergradient("up")["w"], expected, rtol=1e-7, atol=1e-12)
    assert 0.0 in rates


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sama_with_a_learning_rate_of_zero(schedule, dtype):
    """Its factor is the step per gradient: 0 up to rounding, and no reason to refuse."""
    plan, *_ = program(mlopt.SAMA(), lambda p: optim.Adam(p, lr=0.1), scheduler=SCHEDULES[schedule], dtype=dtype)
    for _ in range(6):
        plan.step()
        found = plan.hypergradient("up")["w"]
        assert torch.isfinite(found).all()
        if plan.graph.problems["low"].optimizer.param_groups[0]["lr"] < 1e-12:
            assert found.abs().max() < 1e-12
