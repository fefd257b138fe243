"""The captured update against the optimizer's own step, for every optimizer and option."""

import copy
import time

import pytest
import torch
from torch import nn, optim

from mlopt.capture import UpdateRole, capture_update, update_kinds
from mlopt.errors import MloptError, UpdateError
from tests.helpers.extras import extras
from tests.helpers.optimizers import ELEMENTWISE, ONE_EACH, gradients, make, parameters, set_gradients, twin, walk

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_same_step(update, params, optimizer, tolerance):
    """Apply the graph, make the real step, compare everything the step changes."""
    results = update.apply(update.bind())
    optimizer.step()
    for x, result in zip(update.outputs, results, strict=True):
        if x.role is UpdateRole.PARAMETER:
            live = params[x.parameter]
        elif x.role is UpdateRole.STATE:
            live = optimizer.state[params[x.parameter]][x.key]
        else:
            live = optimizer.param_groups[x.group][x.key]
        if not isinstance(live, torch.Tensor):
            assert isinstance(live, x.number) or x.number is float
            live = torch.tensor(live, dtype=torch.float64)
        assert result.dtype == live.dtype and result.shape == live.shape, str(x)
        torch.testing.assert_close(result, live, rtol=tolerance, atol=tolerance, msg=lambda m, x=x: f"{x}: {m}")
    state = {(x.parameter, x.key) for x in update.outputs if x.role is UpdateRole.STATE}
    assert state == {(name, key) for name, p in params.items() for key in optimizer.state[p]} - set(update.made)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", extras(ELEMENTWISE, lambda name: name.count("-") > 1 or name.endswith("-maximize")))
def test_equals_the_real_step(name, dtype):
    params, optimizer = make(name, dtype)
    update, done = None, 0
    for t in (1, 2, 10, 100):
        walk(params, optimizer, t - 1 - done, start=done + 1)
        set_gradients(params, gradients(params, t))
        if update is None or not update.accepts():
            update = capture_update("p", optimizer, params)
            assert update.accepts()
        assert_same_step(update, params, optimizer, TOLERANCE[dtype])
        done = t


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_trajectory_without_the_optimizer(name):
    """Steps on the graph alone, captured anew when it says so, against real ones."""
    params, optimizer = make(name)
    real_params, real = twin(params, optimizer)
    update, captures = None, 0
    for t in range(1, 31):
        set_gradients(params, gradients(params, t))
        if update is None or not update.accepts():
            update, captures = capture_update("p", optimizer, params), captures + 1
        update.commit(update.apply(update.bind()))
    walk(real_params, real, 30)
    assert captures <= 4
    for key, p in params.items():
        torch.testing.assert_close(p, real_params[key], rtol=1e-10, atol=1e-10)
        ours, theirs = optimizer.state[p], real.state[real_params[key]]
        assert ours.keys() == theirs.keys()
        for k in ours:
            assert type(ours[k]) is type(theirs[k])
            torch.testing.assert_close(ours[k], theirs[k], rtol=1e-10, atol=1e-10)
    optimizer.step()  # the live optimizer goes on from what commit wrote


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "adagrad", "rmsprop", "nadam"])
@pytest.mark.parametrize("flag", ["foreach", "fused", "differentiable", "none"])
def test_implementation_flags_do_not_matter(name, flag):
    if flag == "fused" and name in ("rmsprop", "nadam"):
        pytest.skip("has no fused implementation")
    params, optimizer = make(name, **({} if flag == "none" else {flag: True}))
    if flag == "differentiable":  # torch's own step then records autograd, and refuses to write leaves that need it
        for p in params.values():
            p.requires_grad_(False)
    walk(params, optimizer, 3)
    update = capture_update("p", optimizer, params)
    set_gradients(params, gradients(params, 4))
    # With differentiable=True torch computes Adam's bias corrections in the float32 of the step counter.
    assert_same_step(update, params, optimizer, 1e-7 if flag == "differentiable" else 1e-12)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", ONE_EACH)
def test_the_users_objects_are_untouched(name, steps):
    params, optimizer = make(name)
    walk(params, optimizer, steps)
    optim.lr_scheduler.StepLR(optimizer, 1)  # replaces optimizer.step by a counting wrapper
    optimizer.defaults["note"] = "mine"
    set_gradients(params, gradients(params, 9))
    before = {k: copy.deepcopy(v) for k, v in vars(optimizer).items() if k not in ("state", "param_groups", "step")}
    keys, groups = list(vars(optimizer)), [dict(g) for g in optimizer.param_groups]
    tensors = [t for p in params.values() for t in (p, p.grad, *optimizer.state[p].values())]
    tensors = [(t, t.clone(), t._version) for t in tensors if isinstance(t, torch.Tensor)]
    state = {p: dict(optimizer.state[p]) for p in params.values()}
    random = torch.get_rng_state()
    step = type(optimizer).step
    capture_update("p", optimizer, params)
    assert list(vars(optimizer)) == keys and type(optimizer).step is step
    assert {k: v for k, v in vars(optimizer).items() if k in before} == before
    assert all(t._version == version and torch.equal(t, value) for t, value, version in tensors)
    assert torch.equal(torch.get_rng_state(), random)
    for group, old in zip(optimizer.param_groups, groups, strict=True):
        assert list(group) == list(old) and all(group[k] is old[k] for k in old)
    for p in params.values():
        assert list(optimizer.state[p]) == list(state[p]) and all(
            optimizer.state[p][k] is v for k, v in state[p].items()
        )


def test_param_groups():
    params = parameters()
    matrix, vector, scalar, _ = params.values()
    optimizer = optim.AdamW(
        [{"params": [matrix], "lr": 0.1}, {"params": [scalar, vector], "weight_decay": 0.0, "amsgrad": True}], lr=0.01
    )
    given = {name: params[name] for name in ("vector", "matrix", "scalar")}
    for t in range(1, 4):
        set_gradients(params, gradients(params, t))
        params["empty"].grad = None
        update = capture_update("p", optimizer, given)
        assert_same_step(update, given, optimizer, 1e-12)


def test_parameters_without_gradient_are_left_alone():
    params, optimizer = make("adam")
    walk(params, optimizer, 2)
    given = {name: p for name, p in params.items() if name != "matrix"}
    params["matrix"].grad = None
    update = capture_update("p", optimizer, given)
    assert "matrix" not in {x.parameter for x in (*update.inputs, *update.outputs)}
    old, state = params["matrix"].clone(), copy.deepcopy(optimizer.state[params["matrix"]])
    update.commit(update.apply(update.bind()))
    assert torch.equal(params["matrix"], old)
    assert all(torch.equal(optimizer.state[params["matrix"]][k], v) for k, v in state.items())


def test_schedulers_change_an_input():
    params, optimizer = make("sgd-momentum")
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    walk(params, optimizer, 1)
    update = capture_update("p", optimizer, params)
    for t in range(2, 6):
        scheduler.step()
        set_gradients(params, gradients(params, t))
        assert update.accepts()
        assert_same_step(update, params, optimizer, 1e-12)


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "rmsprop", "adamw", "radam"])
def test_tensor_lr(name):
    lr = torch.tensor(0.03, dtype=torch.float64)
    params, optimizer = make(name, lr=lr, foreach=False)
    walk(params, optimizer, 2)
    update = capture_update("p", optimizer, params)
    lr.mul_(0.5)
    set_gradients(params, gradients(params, 3))
    assert update.accepts()
    assert_same_step(update, params, optimizer, 1e-12)


@pytest.mark.parametrize("cls", [optim.Adam, optim.AdamW])
def test_tensor_betas(cls):
    params = parameters()
    betas = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64))
    optimizer = cls(params.values(), betas=betas, foreach=False)
    walk(params, optimizer, 2)
    update = capture_update("p", optimizer, params)
    set_gradients(params, gradients(params, 3))
    assert_same_step(update, params, optimizer, 1e-12)


@pytest.mark.parametrize("name", ["sgd-nesterov", "adam", "adamw", "rmsprop-centered", "adagrad"])
def test_bfloat16(name):
    params, optimizer = make(name, torch.bfloat16)
    walk(params, optimizer, 2)
    set_gradients(params, gradients(params, 3))
    assert_same_step(capture_update("p", optimizer, params), params, optimizer, 2e-2)


def test_the_guard_follows_control_flow():
    params, optimizer = make("sgd-momentum")
    first = capture_update("p", optimizer, params)
    walk(params, optimizer, 1)
    assert not first.accepts()  # the momentum buffer exists now
    later = capture_update("p", optimizer, params)
    assert later.accepts()
    group = optimizer.param_groups[0]
    for key, value, holds in (
        ("lr", 3.0, True),
        ("momentum", 0.5, True),
        ("momentum", 0.0, False),
        ("weight_decay", 0.1, False),
        ("nesterov", True, False),
        ("foreach", True, True),
    ):
        old, group[key] = group[key], value
        assert later.accepts() == holds, key
        group[key] = old
    assert later.accepts()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert not later.accepts()


def test_rectified_adam_changes_its_formula_once():
    params, optimizer = make("radam")
    walk(params, optimizer, 2)
    update = capture_update("p", optimizer, params)
    accepted = []
    for t in range(3, 10):
        accepted.append(update.accepts())
        walk(params, optimizer, 1, start=t)
    assert accepted == [True, True, True, False, False, False, False]  # rho_t > 5 from t = 6


def test_outputs_share_no_memory():
    params, optimizer = make("sgd-momentum")
    set_gradients(params, gradients(params, 1))
    update = capture_update("p", optimizer, params)
    inputs = update.bind()
    results = update.apply(inputs)
    pointers = [t.data_ptr() for t in (*inputs, *results) if t.numel()]
    assert len(set(pointers)) == len(pointers)


def test_constants_of_a_first_step_are_not_shared():
    params, optimizer = make("old-adam")
    set_gradients(params, gradients(params, 1))
    update = capture_update("p", optimizer, params)
    first, second = update.apply(update.bind()), update.apply(update.bind())
    for a in first:
        a.detach().add_(7)
    for b, c in zip(second, update.apply(update.bind()), strict=True):
        assert torch.equal(b, c)


class OldSGD(optim.SGD):
    """Deprecated argument orders, an assignment to ``.data``, a flag in the state, a tensor lr that decays itself."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                grad = p.grad.data
                grad.add_(group["weight_decay"], p.data)
                grad.addcmul_(group["momentum"], p.data, p.data)
                if not self.state[p].get("seen"):
                    grad = grad * 0.5
                self.state[p]["seen"] = True
                p.data.add_(-group["lr"], grad)
                p.data = p.data.clamp(-1, 1)
            group["lr"].mul_(0.9)


@pytest.mark.filterwarnings("ignore:This overload")
def test_old_spellings():
    params = parameters()
    lr = torch.tensor(0.5, dtype=torch.float64)
    optimizer = OldSGD(params.values(), lr=lr, weight_decay=0.1, momentum=0.2)
    for t in range(1, 4):
        set_gradients(params, gradients(params, t))
        update = capture_update("p", optimizer, params)
        assert bool(update.made) == (t == 1)
        copies, other = twin(params, optimizer)
        set_gradients(copies, gradients(params, t))
        update.commit(update.apply(update.bind()))
        other.step()
        for name, p in params.items():
            torch.testing.assert_close(p, copies[name], rtol=1e-12, atol=1e-12)
            assert optimizer.state[p] == other.state[copies[name]]
        assert optimizer.param_groups[0]["lr"] is lr
        torch.testing.assert_close(lr, other.param_groups[0]["lr"])


class Branching(optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad.norm() > 1:
                p.sub_(p.grad)


class Reading(optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * float(self.param_groups[0]["lr"]))


class Counting(optim.SGD):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.num_steps += 1
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad / self.num_steps)


class Remembering(optim.SGD):
    def __init__(self, params, **kwargs):
        params = list(params)
        super().__init__(params, **kwargs)
        self.start = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self, closure=None):
        for p, s in zip(self.param_groups[0]["params"], self.start, strict=True):
            p.lerp_(s, 0.5)


RATE = torch.tensor(0.1, dtype=torch.float64)


class Outside(optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad * RATE)


class Wrapping(optim.SGD):
    def __init__(self, params, **kwargs):
        params = list(params)
        super().__init__(params, **kwargs)
        self.base = optim.SGD(params, **kwargs)

    def step(self, closure=None):
        self.base.step()


class Listing(optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("past", []).append(p.grad.clone())


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (optim.LBFGS, "its step calls a closure"),
        (optim.SparseAdam, "does not support dense gradients"),
        (optim.Adafactor, "branches on the value of the parameter matrix"),
        (Branching, "branches on the value of the gradient matrix"),
        (Reading, r"reads a value, float\(\) of a tensor, at .*test_update.py:\d+: p.sub_"),
        (Counting, "changes the attribute \\['num_steps'\\]"),
        (Remembering, r"a tensor of shape \(4, 3\) that is no parameter"),
        (Outside, r"a tensor of shape \(\) that is no parameter"),
        (Wrapping, r"wraps another optimizer \(SGD\)"),
        (Listing, "puts a list into the state"),
    ],
)
def test_refused_by_name(cls, reason):
    params = parameters()
    kwargs = {} if cls in (optim.LBFGS, optim.SparseAdam, optim.Adafactor) else {"lr": 0.1}
    before = copy.deepcopy(params)
    optimizer = cls(params.values(), **kwargs)
    with pytest.raises(UpdateError, match=f"problem 'p': .* optimizer {cls.__name__} cannot be captured: .*{reason}"):
        capture_update("p", optimizer, params)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in params.items())
    assert not any(optimizer.state.get(p) for p in params.values())
    assert issubclass(UpdateError, MloptError)


def test_complex_sparse_and_foreign_parameters():
    complex_ = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UpdateError, match="'w' is complex"):
        capture_update("p", optim.SGD([complex_], lr=0.1), {"w": complex_})
    params, optimizer = make("sgd")
    with pytest.raises(UpdateError, match="does not hold the parameter 'x'"):
        capture_update("p", optimizer, {"x": nn.Parameter(torch.zeros(2))})
    with pytest.raises(UpdateError, match="none of its parameters receives a gradient"):
        capture_update("p", optimizer, {})
    update = capture_update("p", optimizer, params)
    with pytest.raises(UpdateError, match="dense gradient for the parameter 'matrix', got none"):
        update.bind()
    sparse = {name: torch.zeros(p.shape).to_sparse() for name, p in params.items() if p.ndim}
    with pytest.raises(UpdateError, match="got one of layout torch.sparse_coo"):
        update.bind(sparse)


def test_hooks_and_replaced_steps_are_refused():
    params, optimizer = make("sgd")
    handle = optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(UpdateError, match="it has step hooks"):
        capture_update("p", optimizer, params)
    handle.remove()
    capture_update("p", optimizer, params)
    optimizer.step = lambda closure=None: None
    with pytest.raises(UpdateError, match="replaced on the object"):
        capture_update("p", optimizer, params)


# name -> (class, options) of optimizers whose parameters see each other, or are not treated alike.
def _norm_of_all(self):
    total = sum((p.grad**2).sum() for g in self.param_groups for p in g["params"] if p.grad is not None).sqrt()
    for group in self.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.sub_(group["lr"] * p.grad / total)


def _by_position(self):
    for group in self.param_groups:
        for i, p in enumerate(group["params"]):
            if p.grad is not None:
                p.sub_(group["lr"] * 0.5**i * p.grad)


def _counting(self):
    for group in self.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                group["count"] += 1
                p.sub_(group["lr"] / group["count"] * p.grad)


class _Written(optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "count": 0})


WRITTEN = {
    f.__name__: type(
        f"Written{f.__name__}", (_Written,), {"step": torch.no_grad()(lambda self, closure=None, f=f: f(self))}
    )
    for f in (_norm_of_all, _by_position, _counting)
}


def many(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (3,), (4, 3), (3,), (4, 3), (3,), (4, 3), (), ()]
    return {
        f"p{i}": nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for i, s in enumerate(shapes)
    }


@pytest.mark.parametrize(
    "name", extras([*ELEMENTWISE, *WRITTEN], lambda n: n in ELEMENTWISE and n not in ("sgd", "adamw"))
)
def test_many_parameters_of_one_kind(name, monkeypatch):
    """Traced by a few of each kind where that is right, whole where it is not; never wrong."""
    params = many()
    cls, settings = ELEMENTWISE.get(name) or (WRITTEN[name], {})
    optimizer = cls(params.values(), **settings)
    traced = []
    trace = update_kinds.trace_update

    def traces(problem, optimizer, given):
        traced.append(len(given))
        return trace(problem, optimizer, given)

    monkeypatch.setattr(update_kinds, "trace_update", traces)
    for t in (1, 2):
        traced.clear()
        set_gradients(params, gradients(params, t))
        update = capture_update("p", optimizer, params)
        assert update.accepts()
        assert_same_step(update, params, optimizer, 1e-12)
    # The group's counters of Lion may depend on the number of parameters, so it is traced whole, too.
    assert traced == ([6, 9] if name in (*WRITTEN, "lion") else [6])


@pytest.mark.slow
def test_parameters_of_one_kind_at_different_steps():
    params = many()
    optimizer = optim.RAdam(params.values(), lr=0.01)
    for t in range(1, 9):
        set_gradients(params, gradients(params, t))
        if t < 8:
            params["p6"].grad = None  # its first step, where the others take another formula
        update = capture_update("p", optimizer, {n: p for n, p in params.items() if p.grad is not None})
        assert update.accepts()
        optimizer.step()
    set_gradients(params, gradients(params, 9))
    update = capture_update("p", optimizer, params)
    assert update.accepts()
    assert_same_step(update, params, optimizer, 1e-12)


def test_a_net_of_sixty_tensors_is_captured_at_once():
    params = {f"p{i}": nn.Parameter(torch.zeros(8, 8)) for i in range(60)}
    optimizer = optim.Adam(params.values())
    set_gradients(params, {n: torch.ones_like(p) for n, p in params.items()})
    optimizer.step()
    seconds = []
    for count in (2, 60):
        start = time.perf_counter()
        update = capture_update("p", optimizer, dict([*params.items()][:count]))
        seconds.append(time.perf_counter() - start)
    assert len(update.outputs) == 4 * 60
    assert seconds[1] < 10 * seconds[0]  # traced whole it takes 25 times as long
