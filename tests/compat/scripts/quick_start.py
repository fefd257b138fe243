"""Data reweighting, as in the quick start: a classifier, and a network that weights its samples; validation."""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import nn


def make_loader(seed, size=24, batch_size=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=g)
    return [(x[k : k + batch_size], (x[k : k + batch_size, 0] > 0).long()) for k in range(0, size, batch_size)]


class Reweight(ImplicitProblem):
    def training_step(self, batch):
        inputs, labels = batch
        outputs = self.classifier(inputs)
        loss = F.cross_entropy(outputs, labels)
        acc = (outputs.argmax(dim=1) == labels).float().mean().item() * 100
        return {"loss": loss, "acc": acc}


class Classifier(ImplicitProblem):
    def training_step(self, batch):
        inputs, labels = batch
        outputs = self.module(inputs)
        loss = F.cross_entropy(outputs, labels, reduction="none")
        loss_reshape = torch.reshape(loss, (-1, 1))
        weight = self.reweight(loss_reshape.detach())
        return torch.mean(weight * loss_reshape)


class ReweightingEngine(Engine):
    @torch.no_grad()
    def validation(self):
        correct = total = 0
        for x, target in make_loader(2):
            out = self.classifier(x)
            correct += (out.argmax(dim=1) == target).sum().item()
            total += x.size(0)
        self.seen = [*getattr(self, "seen", []), self.global_step]
        return {"acc": correct / total * 100}


def main(type="darts", iters=12, **solver):
    torch.manual_seed(0)
    classifier_module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    weight_module = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1), nn.Sigmoid())
    reweight = Reweight(
        name="reweight",
        module=weight_module,
        optimizer=torch.optim.Adam(weight_module.parameters(), lr=1e-2),
        train_data_loader=make_loader(1),
        config=Config(log_step=4),
    )
    classifier = Classifier(
        name="classifier",
        module=classifier_module,
        optimizer=torch.optim.SGD(classifier_module.parameters(), lr=0.1, momentum=0.9),
        train_data_loader=make_loader(0),
        config=Config(type=type, unroll_steps=2, **solver),
    )
    engine = ReweightingEngine(
        config=EngineConfig(train_iters=iters, valid_step=6),
        problems=[reweight, classifier],
        dependencies={"u2l": {reweight: [classifier]}, "l2u": {classifier: [reweight]}},
    )
    engine.run()
    return {"classifier": classifier_module, "reweight": weight_module, "engine": engine}


if __name__ == "__main__":
    main()
