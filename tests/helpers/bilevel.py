"""A small reweighting program with the features that make losses hard: BatchNorm, dropout, dict losses."""

import torch
import torch.nn.functional as F
from torch import nn

import mlopt


class Classifier(mlopt.Problem):
    num_calls = 0

    def training_step(self, batch):
        self.num_calls += 1
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        weights = self.reweight(losses.detach()[:, None]).squeeze(1)
        return (weights * losses).mean()


class Reweight(mlopt.Problem):
    num_calls = 0

    def training_step(self, batch):
        self.num_calls += 1
        x, y = batch
        logits = self.classifier(x)
        return {"loss": F.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).float().mean().item()}


def data(sizes=(12,), features=6, classes=3, dtype=torch.float32):
    return [(torch.randn(n, features, dtype=dtype), torch.randint(0, classes, (n,))) for n in sizes]


def make(*, dropout=0.0, batch_norm=False, dtype=torch.float32, sizes=(12, 12), classifier=Classifier, **options):
    """Return the two problems; `options` go to the classifier."""
    layers = [nn.Linear(6, 8)]
    if batch_norm:
        layers.append(nn.BatchNorm1d(8))
    layers += [nn.Tanh(), *([nn.Dropout(dropout)] if dropout else []), nn.Linear(8, 3)]
    net = nn.Sequential(*layers).to(dtype)
    weights = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).to(dtype)
    options.setdefault("optimizer", torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    options.setdefault("data", data(sizes, dtype=dtype))
    options.setdefault("hypergradient", mlopt.CG(max_steps=5, damping=1.0))
    lower = classifier("classifier", module=net, **options)
    upper = Reweight(
        "reweight",
        module=weights,
        optimizer=torch.optim.Adam(weights.parameters(), lr=0.01),
        data=data(sizes, dtype=dtype),
    )
    return lower, upper


def compiled(**options):
    lower, upper = make(**options)
    return mlopt.compile(mlopt.Graph([lower, upper]), strict=True, progress=False), lower, upper
