"""iMAML with an environment that gives the tasks: the inner problem starts from the outer one at every task."""

import torch
import torch.nn.functional as F
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.envs import Env
from betty.problems import ImplicitProblem
from torch import nn


class Sinusoids(Env):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.reset()

    def reset(self):
        self.amplitude, self.phase = 1 + torch.rand(2, generator=self.generator)

    def step(self, size=10):
        x = 4 * torch.rand(size, 1, generator=self.generator) - 2
        return x, self.amplitude * torch.sin(x + self.phase)


def make_net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


class Outer(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        return F.mse_loss(self.inner(x), y)

    def get_batch(self):
        batch = self.env.step()
        self.env.reset()
        return batch


class Inner(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        distance = 0.0
        for p, q in zip(self.parameters(), self.outer.parameters()):
            distance = distance + (p - q).pow(2).sum()
        return F.mse_loss(self.module(x), y) + 0.5 * distance

    def on_inner_loop_start(self):
        self.module.load_state_dict(self.outer.module.state_dict())

    def get_batch(self):
        return self.env.step()


def main(iters=12, **solver):
    solver = solver or {"type": "neumann", "neumann_iterations": 2, "neumann_alpha": 0.1}
    outer_net, inner_net = make_net(), make_net()
    outer = Outer("outer", Config(), outer_net, torch.optim.Adam(outer_net.parameters(), lr=1e-2))
    inner = Inner("inner", Config(unroll_steps=3, **solver), inner_net, torch.optim.SGD(inner_net.parameters(), lr=0.1))
    engine = Engine(
        problems=[outer, inner],
        config=EngineConfig(train_iters=iters, valid_step=10**6),
        dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        env=Sinusoids(),
    )
    engine.run()
    return {"inner": inner_net, "outer": outer_net, "engine": engine}


if __name__ == "__main__":
    main()
