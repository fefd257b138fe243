"""The real optimizer's step as a differentiable function."""

import copy

import pytest
import torch
from torch import optim

import mlopt
from mlopt.autodiff.update import OptimizerState, apply_update, update_factor

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd dampening": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3),
    "sgd nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "adam": lambda p: optim.Adam(p, lr=0.1),
    "adam foreach": lambda p: optim.Adam(p, lr=0.1, foreach=True, weight_decay=0.1),
    "adam amsgrad": lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1),
    "rmsprop centred": lambda p: optim.RMSprop(p, lr=0.1, centered=True, momentum=0.9),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.01),
    "adadelta": lambda p: optim.Adadelta(p, lr=1.0),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=0.1),
}


def gradients(t, dtype=torch.float64):
    g = torch.Generator().manual_seed(t)
    return [torch.randn(3, 2, generator=g, dtype=dtype), torch.randn(4, generator=g, dtype=dtype)]


def parameters(dtype=torch.float64):
    return [torch.nn.Parameter(p + 2) for p in gradients(1000, dtype)]


def at_step(make, t, dtype=torch.float64):
    """Parameters and optimizer after t - 1 steps."""
    ps = parameters(dtype)
    optimizer = make(ps)
    for i in range(1, t):
        for p, g in zip(ps, gradients(i, dtype), strict=True):
            p.grad = g
        optimizer.step()
    return ps, optimizer


def real_step(ps, optimizer, grads):
    """What the user's own optimizer does, on copies."""
    ps, optimizer = copy.deepcopy((ps, optimizer))
    for p, g in zip(ps, grads, strict=True):
        p.grad = g
    optimizer.step()
    return ps, optimizer


@pytest.mark.parametrize("t", [1, 2, 10])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
class TestEveryOptimizer:
    def test_the_update_is_the_real_one(self, make, t):
        ps, optimizer = at_step(make, t)
        before = copy.deepcopy((ps, optimizer.state_dict()))
        state = OptimizerState.of(optimizer, ps)
        got, after = apply_update(optimizer, [p.detach() for p in ps], gradients(t), state)
        expected, theirs = real_step(ps, optimizer, gradients(t))
        # NAdam itself multiplies its momenta up in float32.
        tolerance = 1e-7 if isinstance(optimizer, optim.NAdam) else 1e-12
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=tolerance, atol=tolerance)
        for a, b in zip(after.tensors, OptimizerState.of(theirs, expected).tensors, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-12, atol=1e-12)
        # Nothing of the user's has moved, and the step can be made again from the same state.
        assert all(torch.equal(p, q) for p, q in zip(ps, before[0], strict=True))
        assert str(optimizer.state_dict()) == str(before[1])
        again, _ = apply_update(optimizer, [p.detach() for p in ps], gradients(t), state)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))

    def test_the_factor_is_the_derivative_of_the_real_step(self, make, t):
        """D16, D17: against central differences of the user's own optimizer."""
        ps, optimizer = at_step(make, t)
        grads = gradients(t)
        got = update_factor(optimizer, ps, grads, OptimizerState.of(optimizer, ps))
        eps = 1e-6
        sides = [real_step(ps, optimizer, [g + sign * eps for g in grads])[0] for sign in (1, -1)]
        for factor, plus, minus in zip(got, *sides, strict=True):
            expected = -(plus - minus).detach() / (2 * eps)
            torch.testing.assert_close(factor, expected, rtol=1e-5, atol=1e-7)

    def test_all_derivatives(self, make, t):
        """With respect to parameters, gradients and state at once, against central differences along a direction."""
        ps, optimizer = at_step(make, t)
        state = OptimizerState.of(optimizer, ps)
        inputs = [t.detach() for t in (*ps, *gradients(t), *state.flat())]
        generator = torch.Generator().manual_seed(0)
        direction = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs]
        weights = None

        def value(tensors):
            nonlocal weights
            updated, after = apply_update(optimizer, tensors[:2], tensors[2:4], state.with_tensors(tensors[4:]))
            outputs = [*updated, *after.flat()]
            weights = weights or [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
            return sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))

        leaves = [x.clone().requires_grad_() for x in inputs]
        found = torch.autograd.grad(value(leaves), leaves, allow_unused=True)
        slope = sum((g * d).sum() for g, d in zip(found, direction, strict=True) if g is not None)
        eps = 1e-9
        plus, minus = (value([x + s * eps * d for x, d in zip(inputs, direction, strict=True)]) for s in (1, -1))
        torch.testing.assert_close(slope, (plus - minus) / (2 * eps), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("t", [1, 2, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d16_adamw_has_bias_correction(t, dtype):
    """Against the formula of Kingma and Ba 2015 written out: m_hat / (sqrt(v_hat) + eps)."""
    ps, optimizer = at_step(lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.1), t, dtype)
    grads = gradients(t, dtype)
    got = update_factor(optimizer, ps, grads, OptimizerState.of(optimizer, ps))
    for p, g, factor in zip(ps, grads, got, strict=True):
        state = optimizer.state.get(p, {})
        zero = torch.zeros_like(g).double()
        m, v = (state.get(k, zero).double() for k in ("exp_avg", "exp_avg_sq"))
        x = g.double().requires_grad_()
        m_hat = (0.9 * m + 0.1 * x) / (1 - 0.9**t)
        v_hat = (0.999 * v + 0.001 * x * x) / (1 - 0.999**t)
        (expected,) = torch.autograd.grad((0.1 * m_hat / (v_hat.sqrt() + 1e-8)).sum(), x)
        torch.testing.assert_close(factor.double(), expected, rtol=1e-6 if dtype == torch.float64 else 1e-3, atol=1e-6)


@pytest.mark.parametrize("make", [OPTIMIZERS["adam"], OPTIMIZERS["rmsprop"], OPTIMIZERS["adagrad"]])
def test_elements_without_any_gradient_have_finite_factors(make):
    ps = parameters()
    optimizer = make(ps)
    grads = [torch.zeros_like(p) for p in ps]
    factors = update_factor(optimizer, ps, grads, OptimizerState.of(optimizer, ps))
    assert all(torch.isfinite(f).all() for f in factors)
    for factor in factors:  # eps is what is left of the denominator
        assert (factor > 0).all()


def test_learning_rate_and_weight_decay_have_derivatives():
    for make in (OPTIMIZERS["sgd momentum"], OPTIMIZERS["adamw"], OPTIMIZERS["adam foreach"]):
        ps, optimizer = at_step(make, 3)
        state, grads = OptimizerState.of(optimizer, ps), gradients(3)

        def value(lr, decay, optimizer=optimizer, ps=ps, state=state, grads=grads):
            hyper = [{"lr": lr, "weight_decay": decay}]
            updated, _ = apply_update(optimizer, [p.detach() for p in ps], grads, state, hyper)
            return sum(u.square().sum() for u in updated)

        lr, decay = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.05))
        assert torch.autograd.gradcheck(value, (lr, decay))


def test_groups_keep_their_settings():
    ps = parameters()
    groups = [{"params": [ps[0]], "lr": 0.5}, {"params": [ps[1]], "lr": 0.01, "weight_decay": 0.3}]
    optimizer = optim.SGD(groups, lr=1.0)
    got, _ = apply_update(optimizer, [p.detach() for p in ps], gradients(1), OptimizerState.of(optimizer, ps))
    expected, _ = real_step(ps, optimizer, gradients(1))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.detach())


def test_a_parameter_without_gradient_is_left_alone():
    ps, optimizer = at_step(OPTIMIZERS["adam"], 2)
    state = OptimizerState.of(optimizer, ps)
    got, after = apply_update(optimizer, [p.detach() for p in ps], [None, gradients(2)[1]], state)
    assert torch.equal(got[0], ps[0])
    assert torch.equal(after.tensors[0]["exp_avg"], state.tensors[0]["exp_avg"])
    factor = update_factor(optimizer, ps, [None, gradients(2)[1]], state)
    assert not factor[0].any()


class SignDescent(optim.Optimizer):
    """Written by a user, with the usual decorator."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * torch.tanh(p.grad))


class Mixing(SignDescent):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / p.grad.norm())


def test_user_written_optimizers():
    ps = parameters()
    optimizer = SignDescent(ps, 0.1)
    state = OptimizerState.of(optimizer, ps)
    for factor, g in zip(update_factor(optimizer, ps, gradients(1), state), gradients(1), strict=True):
        torch.testing.assert_close(factor, 0.1 / torch.cosh(g) ** 2)


@pytest.mark.parametrize("make", [lambda p: Mixing(p, 0.1), lambda p: optim.LBFGS(p)])
def test_d17_what_is_not_supported_is_refused_by_name(make):
    ps = parameters()
    optimizer = make(ps)
    with pytest.raises(mlopt.errors.UpdateError, match=f"'lower'.*{type(optimizer).__name__}"):
        update_factor(optimizer, ps, gradients(1), OptimizerState.of(optimizer, ps), problem="lower")
