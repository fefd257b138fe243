"""Three levels in a chain, differentiated by finite differences or a Neumann series."""

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import nn


class Vector(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(seed)))

    def forward(self):
        return self.w


BATCH = [(torch.zeros(1),)]


class Top(ImplicitProblem):
    def training_step(self, batch):
        return (self.middle() - 1).square().sum()


class Middle(ImplicitProblem):
    def training_step(self, batch):
        return (self.bottom() - self.module()).square().sum() + 0.5 * (self.module() * self.top()).square().sum()


class Bottom(ImplicitProblem):
    def training_step(self, batch):
        w = self.module()
        return 0.5 * w.square().sum() + 0.1 * w.pow(4).sum() - (w * self.middle().tanh()).sum()


def main(iters=24, **solver):
    solver = solver or {"type": "neumann", "neumann_iterations": 2, "neumann_alpha": 0.2}
    modules = [Vector(k) for k in range(3)]
    problems = [
        cls(
            name,
            Config(unroll_steps=2, retain_graph=True, **solver),
            m,
            torch.optim.SGD(m.parameters(), lr=0.1),
            None,
            BATCH,
        )
        for cls, name, m in zip((Bottom, Middle, Top), ("bottom", "middle", "top"), modules)
    ]
    bottom, middle, top = problems
    engine = Engine(
        problems=problems[::-1],
        config=EngineConfig(train_iters=iters, valid_step=10**6),
        dependencies={"u2l": {top: [middle], middle: [bottom]}, "l2u": {bottom: [middle], middle: [top]}},
    )
    engine.run()
    return {"bottom": modules[0], "middle": modules[1], "top": modules[2], "engine": engine}


if __name__ == "__main__":
    main()
