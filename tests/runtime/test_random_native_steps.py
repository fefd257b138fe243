"""Random programs, random changes in the middle: native steps against the same steps made one part after the other."""

import copy
import random

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import mlopt
from mlopt import ops
from mlopt.runtime.finite import NonFiniteGuard
from tests.helpers.extras import extras
from tests.helpers.twins import Twins

pytestmark = pytest.mark.skipif(not ops.available(), reason="the native extension is not built")

OPTIMIZERS = [
    lambda ps: optim.SGD(ps, lr=0.05),
    lambda ps: optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    lambda ps: optim.SGD(ps, lr=0.05, maximize=True, dampening=0.1, momentum=0.5),
    lambda ps: optim.Adam(ps, lr=0.01),
    lambda ps: optim.Adam(ps, lr=torch.tensor(0.01)),
    lambda ps: optim.AdamW(ps, lr=0.01, amsgrad=True),
    lambda ps: optim.RMSprop(ps, lr=0.01, centered=True, momentum=0.5),
    lambda ps: optim.Adagrad(ps, lr=0.05),
    lambda ps: optim.NAdam(ps, lr=0.01),
]
SCHEDULERS = [
    lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=100, cycle_momentum="momentum" in o.defaults or "betas" in o.defaults
    ),
    lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
]
ESTIMATORS = [
    mlopt.CG(3, damping=0.5),
    mlopt.CG(2),
    mlopt.CG(4, damping=0.1, curvature="ggn", rtol=1e-2),
    mlopt.Neumann(3, 0.1),
    mlopt.Neumann(5, 0.05, curvature="ggn"),
]


class Net(nn.Module):
    def __init__(self, rng):
        super().__init__()
        size = rng.choice([2, 3])
        self.lin = nn.Linear(4, size, bias=rng.random() < 0.7)
        self.vec = nn.Parameter(torch.randn(size))
        self.scale = nn.Parameter(torch.tensor(0.3)) if rng.random() < 0.4 else None
        self.frozen = nn.Parameter(torch.ones(size), requires_grad=False) if rng.random() < 0.3 else None
        self.unused = nn.Parameter(torch.ones(2)) if rng.random() < 0.3 else None
        self.norm = nn.BatchNorm1d(size) if rng.random() < 0.3 else nn.Identity()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("copy", torch.zeros(size))

    def forward(self, x):
        out = torch.tanh(self.norm(self.lin(x))) * self.vec
        return out if self.scale is None else out * (1 + self.scale)


READS = [
    lambda net, out, other, x, y: 0.3 * ((other(x).sum(1) - y) * out.sum(1)).mean(),
    lambda net, out, other, x, y: 0.3 * other.module.vec.sum() * net.vec.sum() + 0.1 * other.module.vec.exp().sum(),
    lambda net, out, other, x, y: (other.module.vec.mean().sigmoid() * out.square().sum(1)).mean(),
    lambda net, out, other, x, y: (other(x).sum(1) - y).square().mean(),
    lambda net, out, other, x, y: 0.2 * (other.module.lin.weight.sum() * net.vec).sum(),
]


class Random(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        net, extra = self.module, self.extra
        out = net(x)
        decay = sum(p.square().sum() for p in net.parameters())
        loss = (out.sum(1) - y).square().mean() + 0.05 * decay
        for name, kind in self.reads.items():
            loss = loss + READS[kind](net, out, getattr(self, name), x, y)
        result = {"loss": loss}
        if "tensor" in extra:
            result["tensor"] = (out.sum(1) > 0).to(out.dtype).mean()
        if "number" in extra:
            result["number"] = out.detach().abs().mean().item()
        if "constant" in extra:
            result["constant"] = 0.25
        if "parameter" in extra:
            result["parameter"] = net.vec[0]
        if "again" in extra:
            result["again"] = loss
        if "mean" in extra:
            net.copy.copy_(net.mean)
            net.mean.mul_(0.9).add_(net.vec.detach(), alpha=0.1)
        elif "copy" in extra:
            net.copy.copy_(net.vec.detach())
        return result


def make(seed):
    rng = random.Random(seed)
    dtype = rng.choice([torch.float32, torch.float64])
    names = [f"p{i}" for i in range(rng.choice([2, 3, 3, 4]))]
    problems = []
    for i, name in enumerate(names):
        is_top = i == len(names) - 1
        net = Net(rng).to(dtype)
        below = [n for n in names[:i] if rng.random() < 0.7] or (names[i - 1 : i] if is_top else [])
        above = [n for n in names[i + 1 :] if rng.random() < 0.6] or ([] if is_top else names[-1:])
        optimizer = rng.choice(OPTIMIZERS)(net.parameters())

        def batch(size, dtype=dtype):
            return torch.randn(size, 4, dtype=dtype), torch.randn(size, dtype=dtype)

        data = rng.choice(
            [
                lambda: [batch(6) for _ in range(rng.choice([1, 2]))],
                lambda: [batch(6), batch(6), batch(4)],
                lambda: DataLoader([*zip(*batch(14), strict=True)], batch_size=5, shuffle=True),
            ]
        )()
        chances = {
            "clip_norm": (0.5, 0.3),
            "normalize_gradient": (True, 0.1),
            "unroll_steps": (2, 0.2),
            "warmup_steps": (2, 0.15),
            "precision": ("bf16", 0.1 if dtype == torch.float32 else 0.0),
            "roll_back": (True, 0.15 if is_top else 0.0),
        }
        problem = Random(
            name,
            module=net,
            optimizer=optimizer,
            data=data,
            hypergradient=rng.choice(ESTIMATORS),
            scheduler=rng.choice(SCHEDULERS)(optimizer) if rng.random() < 0.35 else None,
            **{key: value for key, (value, chance) in chances.items() if rng.random() < chance},
        )
        problem.reads = {n: rng.randrange(len(READS)) for n in [*below, *above]}
        kinds = ("tensor", "number", "constant", "parameter", "again", "mean", "copy")
        problem.extra = [kind for kind in kinds if rng.random() < 0.3]
        problems.append(problem)
    return problems


def reload_optimizers(plan, problems):
    for problem in problems:
        problem.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))


def change_numbers(plan, problems):
    for problem in problems:
        for group in problem.optimizer.param_groups:
            group["lr"] = group["lr"] * 0.5


def change_mode(plan, problems):
    problems[-1].module.train(not problems[-1].module.training)


def evaluate(plan, problems):
    return plan.hypergradient(problems[-1])


def look_at_gradients(plan, problems):
    plan.keep_gradients = not plan.keep_gradients


def guard(plan, problems):
    plan.set_guard(NonFiniteGuard("skip") if plan._executor.check.guard is None else None)


CHANGES = [reload_optimizers, change_numbers, change_mode, evaluate, look_at_gradients, guard]


@pytest.mark.parametrize("seed", extras(range(28), lambda seed: seed >= 3))
def test_native_steps_of_a_random_program(seed, monkeypatch):
    twins = Twins(lambda: make(seed), monkeypatch)
    twins.step(12)
    for change in random.Random(seed).sample(CHANGES, 3):
        twins.each(change)
        twins.step(3)
    assert twins.num_native > 0 or seed >= 3  # of some programs no step can be native
