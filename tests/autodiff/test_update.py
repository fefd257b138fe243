"""Derivatives of the captured update against torch's differentiable steps and finite differences of real ones."""

import pytest
import torch
from torch import optim

from mlopt.autodiff import FlatLayout, update_factor, update_vjp
from mlopt.capture import UpdateRole, capture_update
from mlopt.errors import UpdateError
from tests.helpers.optimizers import (
    ELEMENTWISE,
    ONE_EACH,
    SUPPORTED,
    gradients,
    make,
    parameters,
    set_gradients,
    twin,
    walk,
)


def factor(params, optimizer, known=None):
    """Return the factor; `known` holds a graph to go on with as long as it is valid."""
    known = {} if known is None else known
    if not known or not known["update"].accepts():
        known["update"] = capture_update("p", optimizer, params)
        known["factor"] = update_factor(known["update"], FlatLayout.of("p", params)).traced.module
    (flat,) = known["factor"](*known["update"].bind())
    return flat


def factor_by_differences(params, optimizer, grads, step=1e-6):
    """``-d theta_new / d g`` element by element from two real steps of copies (the update is element-wise)."""
    results = []
    for sign in (1, -1):
        copies, other = twin(params, optimizer)
        set_gradients(copies, {name: g + sign * step for name, g in grads.items()})
        other.step()
        results.append(torch.cat([p.detach().reshape(-1) for p in copies.values()]))
    return -(results[0] - results[1]) / (2 * step)


def factor_by_torch(params, optimizer):
    """The same by autograd through torch's own ``differentiable=True`` step."""
    options = {**optimizer.param_groups[0], "differentiable": True, "foreach": False}
    options.pop("params")
    leaves = [p.detach().clone().requires_grad_() for p in params.values()]
    moved = [p.clone() for p in leaves]
    options.pop("decoupled_weight_decay" if isinstance(optimizer, optim.AdamW) else "", None)
    other = type(optimizer)(moved, **{k: v for k, v in options.items() if k not in ("initial_lr",)})
    grads = [p.grad.clone().requires_grad_() for p in params.values()]
    for p, new, g in zip(params.values(), moved, grads, strict=True):
        new.grad = g
        for key, value in optimizer.state[p].items():
            # torch's differentiable path keeps the dtype of the counter in its bias corrections
            other.state[new][key] = value.detach().clone().double() if torch.is_tensor(value) else value
    with torch.enable_grad():
        other.step()
    found = torch.autograd.grad(moved, grads, [torch.ones_like(p) for p in moved])
    return -torch.cat([d.reshape(-1) for d in found])


def random_gradients(params, t):
    """No zero entries: there the references divide by zero; see `test_zero_gradients`."""
    return {name: torch.where(g == 0, 0.3, g) for name, g in gradients(params, t).items()}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_factor(name):
    params, optimizer = make(name, only=("vector", "scalar"))
    known, done = {}, 0
    for t in (1, 2, 10, 100):
        for s in range(done + 1, t):
            set_gradients(params, random_gradients(params, s))
            optimizer.step()
        grads = random_gradients(params, t)
        set_gradients(params, grads)
        ours = factor(params, optimizer, known)
        torch.testing.assert_close(ours, factor_by_differences(params, optimizer, grads), rtol=1e-6, atol=1e-8)
        # ASGD ignores the flag in its counters, and the user-written ones have none.
        if name in SUPPORTED and name != "asgd" and t > 1:
            torch.testing.assert_close(ours, factor_by_torch(params, optimizer), rtol=1e-6, atol=1e-12)
        optimizer.step()
        done = t


def test_factor_of_sgd_is_the_learning_rate():
    params, optimizer = make("sgd")
    set_gradients(params, gradients(params, 1))
    assert torch.equal(factor(params, optimizer), torch.full((18,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("t", [1, 2, 10, 100])
def test_factor_of_adam_in_closed_form(t):
    params, optimizer = make("adam")
    walk(params, optimizer, t - 1)
    set_gradients(params, gradients(params, t))
    ours = factor(params, optimizer)
    wanted = []
    lr, (b1, b2), eps = 0.01, (0.9, 0.999), 1e-8
    for p in params.values():
        state = optimizer.state[p] or {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        g = p.grad
        m, v = b1 * state["exp_avg"] + (1 - b1) * g, b2 * state["exp_avg_sq"] + (1 - b2) * g * g
        root = (v / (1 - b2**t)).sqrt()
        second = m * (1 - b2) * g / (root * (1 - b2**t) * (root + eps) ** 2)
        second = torch.where(v == 0, 0.0, second)
        wanted.append((lr / (1 - b1**t) * ((1 - b1) / (root + eps) - second)).reshape(-1))
    torch.testing.assert_close(ours, torch.cat(wanted), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_zero_gradients(name):
    """Where every gradient so far was 0, all derivatives are finite; Adam's factor is then lr / eps exactly."""
    params, optimizer = small(name, ELEMENTWISE[name][1].get("eps"))
    for _ in range(2):
        zeros = {key: torch.zeros_like(p) for key, p in params.items()}
        set_gradients(params, zeros)
        update = capture_update("p", optimizer, params)
        vjp = update_vjp(update)
        outputs = dict(zip(update.outputs, update.apply(update.bind()), strict=True))
        cotangents = [torch.ones_like(outputs[x]) for x in vjp.cotangents]
        found = vjp.traced.module(*update.bind(), *cotangents)
        assert all(x is None or x.isfinite().all() for x in found)
        ours = factor(params, optimizer)
        assert ours.isfinite().all()
        if name in ("adam", "adamw", "nadam"):
            torch.testing.assert_close(ours, factor_by_differences(params, optimizer, zeros, 1e-14), rtol=1e-3, atol=0)
        optimizer.step()


def test_parameters_without_gradient_have_factor_zero():
    params, optimizer = make("adam")
    set_gradients(params, gradients(params, 1))
    update = capture_update("p", optimizer, {"vector": params["vector"]})
    (flat,) = update_factor(update, FlatLayout.of("p", params)).traced.module(*update.bind())
    assert flat[:12].eq(0).all() and flat[12:17].ne(0).all() and flat[17] == 0


def test_factor_in_single_precision():
    params, optimizer = make("adam", torch.float32)
    walk(params, optimizer, 3)
    set_gradients(params, gradients(params, 4))
    single = factor(params, optimizer)
    params, optimizer = make("adam", torch.float64)
    walk(params, optimizer, 3)
    set_gradients(params, gradients(params, 4))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), factor(params, optimizer), rtol=1e-4, atol=1e-7)


def test_not_elementwise_is_refused_by_name():
    params, optimizer = make("normalized")
    with pytest.raises(UpdateError, match=r"problem 'p': .* NormalizedSGD .* not element-wise: aten\.\S*norm\S* mixes"):
        update_factor(capture_update("p", optimizer, params), FlatLayout.of("p", params))
    muon = {"matrix": parameters()["matrix"]}
    update = capture_update("p", optim.Muon(muon.values()), muon)
    with pytest.raises(UpdateError, match="Muon .* not element-wise"):
        update_factor(update, FlatLayout.of("p", muon))


class Mixing(optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        first, second = self.param_groups[0]["params"]
        first.sub_(second.grad)
        second.sub_(first.grad)


def test_parameters_that_see_each_others_gradients():
    params = {"a": parameters()["vector"], "b": parameters(seed=1)["vector"]}
    update = capture_update("p", Mixing(params.values(), lr=0.1), params)
    with pytest.raises(UpdateError, match="the new value of 'a' depends on the gradient of 'b'"):
        update_factor(update, FlatLayout.of("p", params))


def optim_defaults(cls):
    return cls([torch.nn.Parameter(torch.zeros(1))]).defaults


@pytest.fixture
def double():
    """Let torch keep its counters in float64; differences do not see past their float32."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(name, eps=1e-2):
    """One vector of three elements, so that gradcheck is quick."""
    cls, options = ELEMENTWISE[name]
    if eps is not None and "eps" in optim_defaults(
        cls
    ):  # the usual 1e-8 makes curvatures that differences of 1e-6 cannot resolve
        options = {**options, "eps": eps}
    params = {"vector": torch.nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=torch.float64))}
    return params, cls(params.values(), **options)


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.usefixtures("double")
def test_gradcheck(name, steps):
    """The graph is differentiable in parameters, gradients, state and hyperparameters."""
    params, optimizer = small(name)
    for t in range(1, steps + 1):
        set_gradients(params, random_gradients(params, t))
        optimizer.step()
    set_gradients(params, random_gradients(params, steps + 1))
    update = capture_update("p", optimizer, params)
    tensors = [t.detach().clone() for t in update.bind()]
    counters = ("step", "eta", "mu", "k")
    free = [i for i, x in enumerate(update.inputs) if x.key not in counters and x not in update.steering]
    free = [i for i in free if tensors[i].dtype == torch.float64]
    # beta = 0 is the end of its range: 0 ** step has no two-sided difference
    free = [i for i in free if not (update.inputs[i].role is UpdateRole.HYPERPARAMETER and tensors[i] == 0)]

    def function(*values):
        full = list(tensors)
        for i, v in zip(free, values, strict=True):
            full[i] = v
        return tuple(r for r in update.apply(full) if r.requires_grad)

    assert torch.autograd.gradcheck(function, [tensors[i].requires_grad_() for i in free], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ONE_EACH)
def test_vjp_equals_autograd_of_the_graph(name):
    params, optimizer = make(name, only=("vector", "scalar"))
    walk(params, optimizer, 2)
    set_gradients(params, random_gradients(params, 3))
    update = capture_update("p", optimizer, params)
    vjp = update_vjp(update)
    tensors = [t.detach().clone() for t in update.bind()]
    wanted = [i for i, x in enumerate(update.inputs) if x in vjp.targets]
    for i in wanted:
        tensors[i].requires_grad_()
    outputs = dict(zip(update.outputs, update.apply(tensors), strict=True))
    cotangents = [torch.randn_like(outputs[x]) for x in vjp.cotangents]
    pairs = [(outputs[x], v) for x, v in zip(vjp.cotangents, cotangents, strict=True) if outputs[x].requires_grad]
    expected = torch.autograd.grad(
        [o for o, _ in pairs], [tensors[i] for i in wanted], [v for _, v in pairs], allow_unused=True
    )
    found = vjp.traced.module(*[t.detach() for t in tensors], *cotangents)
    for x, a, b in zip(vjp.targets, found, expected, strict=True):
        assert (a is None) == (b is None), str(x)
        if a is not None:
            torch.testing.assert_close(a, b)
    assert {x.role for x in vjp.targets} >= {UpdateRole.PARAMETER, UpdateRole.GRADIENT, UpdateRole.HYPERPARAMETER}
    assert not any(x.key == "step" for x in (*vjp.targets, *vjp.cotangents))


@pytest.mark.parametrize("name", ["sgd-nesterov", "adam-amsgrad", "adamw", "rmsprop-centered", "radam", "old-adam"])
def test_unrolled_derivative_of_the_learning_rate(name):
    """Reverse mode over 8 steps on f = sum(theta^4) / 4, against differences of the real optimizer."""
    num_steps, h = 8, 1e-6

    def real(change):
        params, optimizer = small(name)
        optimizer.param_groups[0]["lr"] += change
        for _ in range(num_steps):
            set_gradients(params, {k: p.detach() ** 3 for k, p in params.items()})
            optimizer.step()
        return params["vector"].detach().square().sum()

    params, optimizer = small(name)
    updates, tape = [], []
    for _ in range(num_steps):
        set_gradients(params, {k: p.detach() ** 3 for k, p in params.items()})
        if not updates or not updates[-1].accepts():
            updates.append(capture_update("p", optimizer, params))
        inputs = [t.detach().clone() for t in updates[-1].bind()]
        tape.append((updates[-1], inputs))
        updates[-1].commit(updates[-1].apply(inputs))
    graphs = {id(u): update_vjp(u) for u in updates}
    v = {("parameter", "vector", ""): 2 * params["vector"].detach()}
    v_lr = 0.0
    for update, inputs in reversed(tape):
        graph = graphs[id(update)]
        examples = dict(zip(update.outputs, update.apply(inputs), strict=True))
        cotangents = [
            v.get((x.role.value, x.parameter, x.key), torch.zeros_like(examples[x])) for x in graph.cotangents
        ]
        found = dict(zip(graph.targets, graph.traced.module(*inputs, *cotangents), strict=True))
        v = {(x.role.value, x.parameter, x.key): t for x, t in found.items() if t is not None}
        v_lr += v["hyperparameter", "", "lr"]
        theta = next(t for x, t in zip(update.inputs, inputs, strict=True) if x.role is UpdateRole.PARAMETER)
        v["parameter", "vector", ""] = v["parameter", "vector", ""] + 3 * theta**2 * v["gradient", "vector", ""]
    torch.testing.assert_close(v_lr, (real(h) - real(-h)) / (2 * h), rtol=1e-6, atol=1e-8)
