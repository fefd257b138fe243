"""Whole programs on a device of choice, and what training makes of them: to be compared with the same on the CPU."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import mlopt

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# For what takes more than a second: that the test itself is right shows on the CPU, in the long run of the suite.
LONG = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.cuda)]
GPU = [pytest.param("cuda", marks=pytest.mark.cuda)]


def moved(problems, device):
    """Move modules, optimizers, data that is a list, and loose tensors of problems; parameters stay who they are."""

    def move(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    for problem in problems:
        problem.module.to(device)
        for parameter, state in problem.optimizer.state.items():  # some make it when they are made
            state |= {k: v.to(device) for k, v in state.items() if getattr(v, "shape", None) == parameter.shape}
        for key, value in vars(problem).items():
            if isinstance(value, torch.Tensor | dict) and key != "env":
                setattr(problem, key, tree_map(move, value))
        if isinstance(problem.data, list):
            problem.data = tree_map(move, problem.data)
    return list(problems)


def compiled(problems, backend="eager", **options):
    """Compile, by a backend's name or object; a derivative that disagrees is an error."""
    options = {"strict": True, "progress": False, **options}
    if isinstance(backend, str):
        return mlopt.compile(mlopt.Graph(problems), backend=backend, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["mlopt.compile"], "get_backend", lambda *args: backend)
        return mlopt.compile(mlopt.Graph(problems), backend="eager", **options)


def lowerings(plan):
    """(problem, graph) -> backend that runs it."""
    return {
        (name, graph): lowering.backend
        for name, captures in plan._report.graphs.items()
        for derivatives in captures
        for graph, lowering in derivatives.lowerings().items()
    }


def floats(value):
    """On the CPU in float64."""
    return value.detach().double().cpu()


def hypergradients(plan):
    """Those of all problems above others, by name."""
    uppers = [p.name for p in plan.program.problems if p.lowers]
    return {f"d{name}/{k}": floats(v) for name in uppers for k, v in plan.hypergradient(name).items()}


def results_of(plan):
    """Parameters, buffers, optimizer state and hypergradients at the present state, by name."""
    found = {}
    for name, problem in plan.graph.problems.items():
        found |= {f"{name}.{k}": floats(v) for k, v in problem.module.state_dict().items()}
        for i, state in problem.optimizer.state_dict()["state"].items():
            found |= {f"{name}.{i}.{k}": floats(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
    return found | hypergradients(plan)


def train(plan, steps, *, seed=5):
    """Train, and return `results_of` and the losses of the last steps."""
    torch.manual_seed(seed)
    latest = plan.run(steps)
    losses = {f"{name}: {k}": floats(torch.as_tensor(v)) for name, r in latest.items() for k, v in r.items()}
    return losses | results_of(plan)


def assert_close(got, expected, rtol=1e-9, atol=1e-11):
    """Compare dicts of tensors, and say all that differs."""
    assert got.keys() == expected.keys()
    wrong = []
    for key, value in got.items():
        try:
            torch.testing.assert_close(value, expected[key], rtol=rtol, atol=atol)
        except AssertionError as error:
            wrong.append(f"{key}: {str(error).splitlines()[-2:]}")
    assert not wrong, "\n".join(wrong)


def assert_equal(got, expected):
    """Compare dicts of tensors bit for bit."""
    assert_close(got, expected, rtol=0, atol=0)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Linear models under hyperparameters: what the kernels of the family glm are for.

N, D, C = 120, 12, 4


class Linear(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return self.fit(x, y)


class LogisticLower(Linear):
    def fit(self, x, y):
        penalty = (self.upper.module.value.exp() * self.module.weight.square()).sum()
        return F.binary_cross_entropy_with_logits(self.module(x).squeeze(1), y) + penalty / 2


class LogisticUpper(Linear):
    def fit(self, x, y):
        return F.binary_cross_entropy_with_logits(self.lower(x).squeeze(1), y)


class CleaningLower(Linear):
    def fit(self, x, y):
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        return (self.upper.module.value.sigmoid() * losses).mean() + 0.05 * self.module.weight.square().sum()


class CleaningUpper(Linear):
    def fit(self, x, y):
        return F.cross_entropy(self.lower(x), y)


class SquaresLower(Linear):
    def fit(self, x, y):
        penalty = self.upper.module.value.exp().mean() * self.module.weight.square().sum()
        return (self.module(x).squeeze(1) - y).square().mean() + penalty


class SquaresUpper(Linear):
    def fit(self, x, y):
        return (self.lower(x).squeeze(1) - y).square().mean()


class Value(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.value = nn.Parameter(start.clone())


KINDS = {
    "logistic": (LogisticLower, LogisticUpper, 1, D),
    "cleaning": (CleaningLower, CleaningUpper, C, N),
    "squares": (SquaresLower, SquaresUpper, 1, D),
}
CG = mlopt.CG(max_steps=12, rtol=1e-10, damping=0.1)


def linear_model(kind, estimator=CG, *, momentum=0.9, unroll_steps=8, dtype=torch.float64, **options):
    """One batch, SGD below; above, a weight decay per coefficient or a weight per sample."""
    torch.manual_seed(0)
    lower_kind, upper_kind, columns, size = KINDS[kind]

    def batch(seed):
        logits = draw(seed, N, D) @ draw(99, D, columns)
        targets = {"logistic": (logits[:, 0] > 0).to(dtype), "cleaning": logits.argmax(1)}
        return draw(seed, N, D).to(dtype), targets.get(kind, logits[:, 0].to(dtype))

    net, value = nn.Linear(D, columns).to(dtype), Value(draw(7, size).to(dtype) - 2)
    lower = lower_kind(
        "lower",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum),
        data=[batch(1)],
        hypergradient=estimator,
        unroll_steps=unroll_steps,
        **options,
    )
    upper = upper_kind("upper", module=value, optimizer=torch.optim.Adam([value.value], lr=0.05), data=[batch(2)])
    return [lower, upper]


# Networks.


class Classifier(mlopt.Problem):
    """Every sample weighted by a network that sees its loss."""

    def training_step(self, batch):
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        weights = self.weighting(losses.detach()[:, None]).squeeze(1)
        return {"loss": (weights * losses).mean(), "mean": losses.mean()}


class Weighting(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        logits = self.classifier(x)
        return {"loss": F.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).double().mean()}


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12, 3),
    )


def class_batches(seed, count, shape, size=10):
    x = draw(seed, count, size, *shape)
    y = torch.randint(0, 3, (count, size), generator=torch.Generator().manual_seed(seed))
    return list(zip(x, y, strict=True))


def reweighting(
    net=perceptron, shape=(6,), *, optimizer=torch.optim.AdamW, dtype=torch.float64, count=3, settings=None, **options
):
    """A network over minibatches, and a weighting network above."""
    torch.manual_seed(0)
    classifier = net().to(dtype)
    weights = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).to(dtype)
    options = {"unroll_steps": 2, "hypergradient": mlopt.CG(max_steps=4, damping=1.0, warm_start=True), **options}
    data = [[(x.to(dtype), y) for x, y in class_batches(seed, count, shape)] for seed in (1, 2)]
    lower = Classifier(
        "classifier",
        module=classifier,
        optimizer=optimizer(classifier.parameters(), **{"lr": 0.02, **(settings or {})}),
        data=data[0],
        **options,
    )
    upper = Weighting(
        "weighting", module=weights, optimizer=torch.optim.Adam(weights.parameters(), lr=0.05), data=data[1]
    )
    return [lower, upper]


class Alone(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.module(x), y)


def alone(net=perceptron, shape=(6,), *, optimizer=torch.optim.Adam, scheduler=None, dtype=torch.float64, **settings):
    """One problem, to be run in loops of many steps."""
    torch.manual_seed(0)
    module = net().to(dtype)
    made = optimizer(module.parameters(), **{"lr": 0.02, **settings})
    return [
        Alone(
            "alone",
            module=module,
            optimizer=made,
            data=[(x.to(dtype), y) for x, y in class_batches(1, 2, shape)],
            scheduler=scheduler(made) if scheduler else None,
            hypergradient=None,
        )
    ]
