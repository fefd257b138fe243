"""The user's hooks around an optimizer step."""

import pytest
import torch

import mlopt
from mlopt.errors import ProblemError
from tests.helpers.extras import extras
from tests.helpers.quadratics import Quadratic

U = 3


class Logged(Quadratic):
    """Remembers what was called, with what gradient and parameters."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.log = []

    def on_inner_loop_start(self):
        self.log.append("start")

    def grad_callback(self):
        self.log.append("grad")
        self.seen = self.module.w.grad.clone()
        self.module.w.grad.mul_(2)

    def optimizer_step(self):
        self.log.append("step")
        with torch.no_grad():
            self.module.w -= 0.05 * self.module.w.grad

    def param_callback(self):
        self.log.append("param")
        with torch.no_grad():
            self.module.w.clamp_(-0.4, 0.4)


class Resets(Quadratic):
    """Starts every unroll from zero."""

    def on_inner_loop_start(self):
        with torch.no_grad():
            self.module.w.zero_()


class Clamped(Quadratic):
    """Projects its parameters."""

    def param_callback(self):
        with torch.no_grad():
            self.module.w.clamp_(-0.4, 0.4)


def compiled(lower_class, *, backend="eager", hypergradient=None, **upper_options):
    lower = lower_class("low", ["up"], 1, unroll_steps=U, hypergradient=hypergradient)
    upper = Quadratic("up", ["low"], 8, **upper_options)
    return mlopt.compile(mlopt.Graph([lower, upper]), backend=backend, progress=False, strict=True), lower, upper


@pytest.mark.parametrize("backend", extras(["eager", "inductor"], lambda backend: backend == "inductor"))
@pytest.mark.parametrize("run", [False, True])
def test_hooks_run_in_order_around_every_step(backend, run):
    plan, lower, upper = compiled(Logged, backend=backend)
    w, up = lower.module.w.detach().clone(), upper.module.w.detach().clone()
    plan.run(U - 1) if run else [plan.step() for _ in range(U - 1)]
    step = ["grad", "step", "param"]
    assert lower.log == ["start", *step, *step]
    for _ in range(U - 1):
        gradient = lower.A @ w + lower.shift + lower.B["up"] @ up
        w = (w - 0.05 * 2 * gradient).clamp(-0.4, 0.4)
    torch.testing.assert_close(lower.module.w.detach(), w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lower.seen, gradient, rtol=1e-12, atol=1e-12)
    plan.step()
    plan.step()
    assert lower.log == ["start", *step, *step, *step, "start", *step]
    assert "hooks around its step" in plan.explain() or backend == "eager"


def test_clipping_follows_the_gradient_hook():
    plan, lower, _ = compiled(Logged)
    lower.clip_norm = 1e-3
    before = lower.module.w.detach().clone().clamp(-0.4, 0.4)
    with torch.no_grad():
        lower.module.w.copy_(0.1 * before)
    start = lower.module.w.detach().clone()
    plan.step()
    assert lower.seen.norm() > 1e-3
    torch.testing.assert_close((lower.module.w.detach() - start).norm().item(), 0.05e-3, rtol=1e-6, atol=0)


def test_inner_loops_start_after_the_warm_up():
    plan, lower, _upper = compiled(Logged)
    lower.warmup_steps = 2
    plan.run(2 + 2 * U)
    # The warm-up steps belong to the first inner loop.
    starts = [i for i, what in enumerate(lower.log) if what == "start"]
    assert [sum(x == "step" for x in lower.log[:i]) for i in starts] == [0, 2 + U]


def test_roll_back_returns_to_the_state_after_the_reset():
    plan, lower, upper = compiled(Resets, roll_back=True)
    for _ in range(U):
        plan.step()
    w = torch.zeros_like(lower.module.w)
    for _ in range(U):
        w = w - 0.1 * (lower.A @ w + lower.shift + lower.B["up"] @ upper.module.w)
    torch.testing.assert_close(lower.module.w, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [U, 5 * U])
def test_unroll_ends_at_the_reset(steps):
    """However many steps are asked for, those before the reset have no influence on the present parameters."""
    plan, lower, upper = compiled(Resets, hypergradient=mlopt.Unroll(steps))
    plan.run(2 * U + 2)
    up = upper.module.w.detach().clone().requires_grad_()
    w = torch.zeros_like(up)
    for _ in range(2):
        w = w - 0.1 * (lower.A @ w + lower.shift + lower.B["up"] @ up)
    loss = 0.5 * up @ upper.A @ up + upper.shift @ up
    loss = loss + up @ upper.B["low"] @ w + upper.slope["low"] @ w + 0.5 * w @ w
    (expected,) = torch.autograd.grad(loss, up)
    torch.testing.assert_close(plan.hypergradient("up")["w"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimator", [mlopt.Unroll(2), mlopt.SAMA()])
def test_changed_steps_are_not_differentiated(estimator):
    with pytest.raises(ProblemError, match="changes it by param_callback, whose derivative is not known"):
        compiled(Clamped, hypergradient=estimator)
