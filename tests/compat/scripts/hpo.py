"""Logistic regression with one weight decay per coefficient, full batch; param_callback; loss of version 0.1."""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import nn


class ParameterVector(nn.Module):
    def __init__(self, size, value):
        super().__init__()
        self.values = nn.Parameter(torch.full((size,), value))

    def forward(self):
        return self.values


def data(seed, size=30, width=6):
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(width, generator=torch.Generator().manual_seed(7))
    x = torch.randn(size, width, generator=g)
    return [(x, (x @ truth > 0).to(x.dtype))]


class HPO(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        return F.binary_cross_entropy_with_logits(x @ self.classifier(), y)

    def param_callback(self, params):
        for p in params:
            p.data.clamp_(min=1e-3)


class Classifier(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        w = self.module()
        return F.binary_cross_entropy_with_logits(x @ w, y) + 0.5 * (w**2 * self.hpo()).sum()

    def on_inner_loop_start(self):
        with torch.no_grad():
            self.module.values.zero_()


def main(type="cg", iters=60, unroll_steps=20, **solver):
    w, decay = ParameterVector(6, 0.0), ParameterVector(6, 0.1)
    hpo = HPO("hpo", Config(), decay, torch.optim.Adam(decay.parameters(), lr=0.05), None, data(1))
    classifier = Classifier(
        "classifier",
        Config(type=type, unroll_steps=unroll_steps, **solver),
        w,
        torch.optim.SGD(w.parameters(), lr=1.0),
        None,
        data(0),
    )
    engine = Engine(
        [hpo, classifier],
        EngineConfig(train_iters=iters, valid_step=10**6),
        {"u2l": {hpo: [classifier]}, "l2u": {classifier: [hpo]}},
    )
    engine.run()
    return {"classifier": w, "hpo": decay, "engine": engine}


if __name__ == "__main__":
    main()
