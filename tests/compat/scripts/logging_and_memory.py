"""Logging and memory: log_step, gradient accumulation and clipping, a scheduler, configure_* methods."""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import nn


def batches(seed, count=8):
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        x = torch.randn(6, 4, generator=g)
        found.append((x, (x.sum(1) > 0).long()))
    return found


class Outer(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.inner(x), y)

    def configure_train_data_loader(self):
        return batches(1)

    def configure_module(self):
        torch.manual_seed(2)
        return Decay()

    def configure_optimizer(self):
        return torch.optim.SGD(self.module.parameters(), lr=0.1)


class Decay(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_decay = nn.Parameter(torch.tensor([-3.0, -2.0]))

    def forward(self):
        return self.log_decay.exp()


class Inner(ImplicitProblem):
    num_epochs = 0

    def training_step(self, batch):
        x, y = batch
        loss = F.cross_entropy(self.module(x), y)
        decay = self.outer()
        penalty = decay[0] * self.module[0].weight.square().sum() + decay[1] * self.module[2].weight.square().sum()
        return loss + penalty

    def configure_module(self):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def configure_optimizer(self):
        return torch.optim.SGD(self.module.parameters(), lr=0.1)

    def configure_scheduler(self):
        return torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=4, gamma=0.5)

    def on_epoch_end(self):
        Inner.num_epochs += 1


def main(gradient_accumulation=1, iters=12, logger_type="none", **solver):
    solver = solver or {"type": "neumann", "neumann_iterations": 3, "neumann_alpha": 0.1}
    Inner.num_epochs = 0
    outer = Outer("outer", Config(log_step=2))
    config = Config(
        unroll_steps=2,
        gradient_accumulation=gradient_accumulation,
        gradient_clipping=0.5,
        log_step=2,
        log_local_step=True,
        **solver,
    )
    inner = Inner("inner", config, train_data_loader=batches(0))
    engine = Engine(
        problems=[outer, inner],
        config=EngineConfig(train_iters=iters, valid_step=100, logger_type=logger_type),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
    )
    engine.run()
    return {"inner": inner.module, "outer": outer.module, "engine": engine, "inner problem": inner}


if __name__ == "__main__":
    main()
