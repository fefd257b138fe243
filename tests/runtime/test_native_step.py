"""Steps of problems above others as native programs: bit for bit those that are made one part after the other."""

import copy

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import mlopt
from mlopt import ops
from mlopt.backends import NativeBackend
from mlopt.runtime.finite import NonFiniteGuard
from tests.helpers.extras import extras
from tests.helpers.packages import PackageBackend
from tests.helpers.twins import CG, FIRST, Twins, Upper, batches, make

pytestmark = pytest.mark.skipif(not ops.available(), reason="the native extension is not built")

WARM = mlopt.CG(max_steps=3, damping=0.1, warm_start=True)


def loader():
    x, y = batches([14])[0]
    return DataLoader([*zip(x, y, strict=True)], batch_size=5, shuffle=True)


@pytest.mark.parametrize(
    "estimator",
    extras(
        [
            CG,
            mlopt.CG(max_steps=3),
            mlopt.CG(max_steps=2, damping=0.2, curvature="ggn"),
            mlopt.Neumann(num_terms=3, scale=0.1),
            mlopt.Neumann(num_terms=3, scale=0.1, curvature="ggn"),
        ],
        lambda e: e not in (CG, mlopt.Neumann(num_terms=3, scale=0.1)),
    ),
    ids=repr,
)
def test_estimators(estimator, monkeypatch):
    twins = Twins(lambda: make(estimator=estimator), monkeypatch)
    assert twins.step(6) == 6 - FIRST
    assert all(p.grad is None for p in twins.ours[1].module.parameters())


@pytest.mark.parametrize(
    "options",
    extras(
        [
            {"estimator": WARM},
            {"estimator": mlopt.CG(max_steps=3, preconditioner=mlopt.Nystrom(2, 0.1))},
            {"estimator": mlopt.Neumann(num_terms=1, scale=0.1)},
            {"estimator": mlopt.Identity()},
            {"estimator": mlopt.FiniteDifference(exact=False)},
            {"estimator": mlopt.Unroll(2)},
            {"dropout": 0.3},
            {"lower_dropout": 0.3},
            {"gradient_accumulation": 2},
            {"lower": {"gradient_accumulation": 2}},
            {"precision": "fp16"},
            {"lower": {"precision": "fp16"}},
        ],
        lambda o: "dropout" not in o and o.get("estimator") not in (mlopt.Identity(), WARM),
    ),
    ids=str,
)
def test_steps_that_are_no_native_programs(options, monkeypatch):
    assert Twins(lambda: make(**options), monkeypatch).step(5) == 0


@pytest.mark.parametrize(
    "options",
    extras(
        [
            {"clip_norm": 0.01, "normalize_gradient": True},
            {"precision": "bf16"},
            {"lower": {"precision": "bf16", "clip_norm": 0.1}},
            {"roll_back": True, "lower": {"unroll_steps": 2}},
            {"lower": {"unroll_steps": 3, "warmup_steps": 2}},
        ],
        lambda o: "roll_back" not in o,
    ),
    ids=str,
)
def test_options_of_problems(options, monkeypatch):
    assert Twins(lambda: make(**options), monkeypatch).step(18) >= 2


def sgd(parameters):
    return optim.SGD(parameters, lr=0.1)


def nesterov(parameters):
    return optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


def adamw(parameters):
    return optim.AdamW(parameters, lr=0.01, amsgrad=True)


def adam_with_tensor(parameters):
    return optim.Adam(parameters, lr=torch.tensor(0.01))


def groups(parameters):
    return optim.SGD([{"params": [p], "lr": 0.1 + 0.1 * k} for k, p in enumerate(parameters)], momentum=0.5)


@pytest.mark.parametrize(
    "optimizer",
    extras([sgd, nesterov, adamw, adam_with_tensor, groups], lambda o: o is not groups),
    ids=lambda o: o.__name__,
)
def test_optimizers(optimizer, monkeypatch):
    first = FIRST - 1 if optimizer is sgd else FIRST
    assert Twins(lambda: make(optimizer), monkeypatch).step(7) == 7 - first


def exponential(optimizer):
    return lr_scheduler.ExponentialLR(optimizer, 0.8)


def plateau(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)  # moves the betas, too


@pytest.mark.parametrize(
    "scheduler",
    extras([exponential, plateau, one_cycle], lambda s: s is not one_cycle),
    ids=lambda s: s.__name__,
)
def test_schedulers(scheduler, monkeypatch):
    twins = Twins(lambda: make(scheduler=scheduler), monkeypatch)
    assert twins.step(9) == 9 - FIRST
    assert twins.ours[1].optimizer.param_groups[0]["lr"] != 0.02


class Learned(Upper):
    def optimizer_hyperparameters(self):
        return {"lr": 0.01 * self.module.scale.detach().square()}


def test_learned_settings_arrive(monkeypatch):
    twins = Twins(lambda: make(upper=Learned), monkeypatch)
    assert twins.step(6) == 6 - FIRST
    assert twins.ours[1].optimizer.param_groups[0]["lr"] not in (0.01, 0.02)


def reload_optimizer(plan, problems):
    optimizer = problems[1].optimizer
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_what_is_changed_in_the_middle(monkeypatch):
    """Every change arrives, and programs are made again where it leaves the possibility."""
    twins = Twins(make, monkeypatch)
    assert twins.step(6) == 6 - FIRST
    saved = [plan.state_dict() for plan in (twins.plan, twins.reference)]

    def number(key, value):
        return lambda plan, problems: problems[1].optimizer.param_groups[0].__setitem__(key, value)

    twins.each(number("lr", 0.3))
    assert twins.step(2) == 2
    twins.each(number("betas", (0.5, 0.9)))
    assert twins.step(2) == 2
    twins.each(number("weight_decay", 0.1))  # a branch of the optimizer's code
    assert twins.step(2) == 0
    twins.each(number("weight_decay", 0))
    assert twins.step(2) == 2
    twins.each(
        lambda plan, problems: problems[1].optimizer.load_state_dict(copy.deepcopy(problems[1].optimizer.state_dict()))
    )
    assert twins.step(4) == 2  # into other tensors
    for k, plan in enumerate((twins.plan, twins.reference)):
        plan.load_state_dict(saved[k])
    assert twins.step(4) == 2
    twins.each(lambda plan, problems: plan.hypergradient("upper"))
    twins.each(lambda plan, problems: problems[1].module.scale.data.mul_(2))
    twins.each(lambda plan, problems: setattr(problems[1].module.rates, "data", torch.ones(4)[::2]))  # other strides
    assert twins.step(2) == 2
    twins.each(lambda plan, problems: problems[1].module.norm.eval() and None)
    assert twins.step(4) == 2  # other graphs
    twins.each(lambda plan, problems: problems[1].module.norm.train() and None)
    assert twins.step(2) == 2


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (lambda plan, _: setattr(plan, "keep_gradients", True), lambda plan, _: setattr(plan, "keep_gradients", False)),
        (lambda plan, _: plan.set_guard(NonFiniteGuard("skip")), lambda plan, _: plan.set_guard(None)),
    ],
    ids=["keep_gradients", "guard"],
)
def test_whoever_looks_at_the_gradient_gets_it(begin, end, monkeypatch):
    twins = Twins(make, monkeypatch)
    twins.step(5)
    twins.each(begin)
    assert twins.step(2) == 0
    assert twins.ours[1].module.scale.grad is not None
    twins.each(end)
    assert twins.step(2) == 2
    assert twins.ours[1].module.scale.grad is None


def test_hooks_of_the_optimizer(monkeypatch):
    twins, handles, seen = Twins(make, monkeypatch), [], []
    twins.step(5)
    for problems in (twins.ours, twins.theirs):
        parameter = problems[1].module.rates
        hook = problems[1].optimizer.register_step_pre_hook
        handles.append(hook(lambda *args, p=parameter: seen.append(p.grad.clone())))
    assert twins.step(2) == 0
    assert len(seen) == 4
    for handle in handles:
        handle.remove()
    assert twins.step(2) == 2
    assert len(seen) == 4


class WithGradCallback(Upper):
    def grad_callback(self):
        self.module.scale.grad.mul_(0.5)


class WithParamCallback(Upper):
    def param_callback(self):
        self.module.scale.data.clamp_(0.99, 1.01)


class WithOwnStep(Upper):
    def optimizer_step(self):
        self.optimizer.step()


@pytest.mark.parametrize("cls", [WithGradCallback, WithParamCallback, WithOwnStep])
def test_callbacks_of_the_user(cls, monkeypatch):
    assert Twins(lambda: make(upper=cls), monkeypatch).step(5) == 0


def test_batches_of_other_sizes(monkeypatch):
    """A program for each pair of sizes."""
    twins = Twins(lambda: make(sizes=(8, 8, 6)), monkeypatch)
    assert twins.step(18) == (12 - FIRST) + (6 - 2)
    keys = list(twins.plan._executor.native._programs._known)
    assert len(keys) == 2


def test_batches_of_a_loader(monkeypatch):
    twins = Twins(lambda: make(data=loader), monkeypatch)
    assert twins.step(12) > 4


class Node(mlopt.Problem):
    """Reads whatever it is told to."""

    def training_step(self, batch):
        x, y = batch
        out = self.module(x)
        loss = (out - y).square().mean()
        for name in self.reads:
            other = getattr(self, name)
            loss = loss + 0.3 * (other(x) * out).mean() + 0.1 * torch.tanh(other.module.weight).square().sum()
        return loss + 0.05 * self.module.weight.square().sum()


def nodes(spec, dtype):
    """Return problems by ``{name: names read}``, lowest first."""
    problems = []
    for name, reads in spec.items():
        module = nn.Linear(3, 2).to(dtype)
        problems.append(
            Node(
                name,
                module=module,
                optimizer=optim.SGD(module.parameters(), lr=0.05, momentum=0.9),
                data=[(torch.randn(6, 3, dtype=dtype), torch.randn(6, 2, dtype=dtype)) for _ in range(2)],
                hypergradient=CG,
            )
        )
        problems[-1].reads = reads
    return problems


@pytest.mark.parametrize("dtype", extras([torch.float32, torch.float64], lambda d: d is torch.float32), ids=str)
@pytest.mark.parametrize(
    ("spec", "above"),
    [
        ({"a": ["top"], "b": ["top"], "top": ["a", "b"]}, 1),
        ({"a": ["b", "top"], "b": ["a", "top"], "top": ["b"]}, 2),
        ({"a": ["b"], "b": ["a", "c"], "c": ["a", "b", "top"], "top": ["c", "a"]}, 3),
    ],
    ids=["two-lower", "three-levels", "four-levels"],
)
def test_levels(spec, above, dtype, monkeypatch):
    twins = Twins(lambda: nodes(spec, dtype), monkeypatch)
    assert twins.step(6) == above * (6 - FIRST)


def test_kernels_are_not_called_as_graphs(tmp_path, monkeypatch):
    """A Hessian product that is a kernel's has other bits than its graph."""
    monkeypatch.setattr("mlopt.backends.native.choice.Choice.measure", lambda self, *a: setattr(self, "first", True))
    backend = NativeBackend(PackageBackend(), tmp_path)

    def weighted():
        problems = make()
        problems[0].module = problems[0].module[0]
        return problems

    twins = Twins(weighted, monkeypatch, backend)
    (derivatives,) = twins.plan._report.graphs["lower"]
    assert derivatives.compiled("hvp").is_kernel, twins.plan.explain()
    assert twins.step(5) == 0
