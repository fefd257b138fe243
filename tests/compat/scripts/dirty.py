"""A loss as they are in the wild: it prints, appends, logs and branches on values; batches are dicts with strings."""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import nn

LOSSES, STEPS = [], []
DOMAINS = ["algebra", "geometry"]


def batches(seed):
    g = torch.Generator().manual_seed(seed)
    return [
        {"inputs": torch.randn(4, 3, generator=g), "labels": torch.rand(4, generator=g), "domain": DOMAINS[k % 2]}
        for k in range(4)
    ]


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(len(DOMAINS)))

    def forward(self, domain):
        return F.softplus(self.raw[DOMAINS.index(domain)])


class Upper(ImplicitProblem):
    def training_step(self, batch):
        loss = F.mse_loss(self.lower(batch["inputs"]).squeeze(1), batch["labels"])
        LOSSES.append(loss.item())
        if len(LOSSES) % 5 == 0:
            print("upper loss", LOSSES[-1])
        return loss


class Lower(ImplicitProblem):
    def forward(self, inputs):
        return self.module(inputs).sigmoid()

    def training_step(self, batch):
        score = self.forward(batch["inputs"]).squeeze(1)
        if torch.isnan(score).any():
            print("nan")
        loss = F.mse_loss(score, batch["labels"])
        STEPS.append(1)
        return loss * self.upper(batch["domain"])


def main(iters=12, **solver):
    LOSSES.clear(), STEPS.clear()
    solver = solver or {"type": "neumann", "neumann_iterations": 1, "neumann_alpha": 0.5}
    torch.manual_seed(1)
    net, weights = nn.Linear(3, 1), Weights()
    upper = Upper("upper", Config(retain_graph=True), weights, torch.optim.Adam(weights.parameters(), lr=0.05), None,
                  batches(1))  # fmt: skip
    lower = Lower("lower", Config(unroll_steps=2, **solver), net, torch.optim.AdamW(net.parameters(), lr=0.05), None,
                  batches(0))  # fmt: skip
    engine = Engine(
        problems=[upper, lower],
        config=EngineConfig(train_iters=iters, valid_step=10**6),
        dependencies={"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
    )
    engine.run()
    return {"lower": net, "upper": weights, "engine": engine}


if __name__ == "__main__":
    main()
