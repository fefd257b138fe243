"""Print the peak of live tensor bytes while steps are differentiated, for each number of steps given."""

import gc
import sys

import torch
from torch import nn, optim

import mlopt
from mlopt.runtime import unroll


class Lower(mlopt.Problem):
    def training_step(self, batch):
        return (self.module.weight * self.upper.module.weight).square().sum()


class Upper(mlopt.Problem):
    def training_step(self, batch):
        return self.lower.module.weight.square().sum()


def live_bytes():
    seen = {}
    for o in gc.get_objects():
        if type(o) in (torch.Tensor, nn.Parameter):
            storage = o.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def peak(steps):
    nets = [nn.Linear(200, 50, bias=False) for _ in range(2)]
    lower = Lower(
        "lower", module=nets[0], optimizer=optim.Adam(nets[0].parameters()), hypergradient=mlopt.Unroll(steps)
    )
    upper = Upper("upper", module=nets[1], optimizer=optim.SGD(nets[1].parameters(), lr=0.1))
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", progress=False)
    gc.collect()
    base = live_bytes()
    for _ in range(steps):
        plan._executor.step("lower")
    gc.collect()
    found = [0]
    original = unroll.Reversal._reverse

    def watched(self, record, state, *rest):
        found[0] = max(found[0], live_bytes())
        return original(self, record, state, *rest)

    unroll.Reversal._reverse = watched
    try:
        plan.hypergradient("upper")
    finally:
        unroll.Reversal._reverse = original
    return found[0] - base


if __name__ == "__main__":
    for count in sys.argv[1:]:
        print(peak(int(count)))
