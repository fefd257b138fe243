"""A training loop of your own around ``plan.step()``: no `mlopt.Engine`.

    python examples/own_loop.py

The program is that of `reweighting.py`: a classifier on digits of which 40 % have a wrong label, and the network that
weights its samples.
"""

from __future__ import annotations

import argparse

import digits
import torch
from reweighting import accuracy, make_program

import mlopt


def main() -> None:
    """Train, save and restore half-way, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    data = digits.load(0)
    graph = make_program(data, 0, mlopt.CG(max_steps=10, rtol=1e-3, damping=1.0, warm_start=True))
    plan = mlopt.compile(graph, backend="eager")
    for step in range(1, steps + 1):
        results = plan.step()  # every lowest problem steps once, those above when they are due
        if step % (steps // 5) == 0:
            losses = ", ".join(f"{name} {float(result['loss']):.3f}" for name, result in results.items())
            print(f"step {step}: {losses}")
        if step == steps // 2:
            state = plan.state_dict()  # plain data for torch.save; what going on bit for bit needs is in it
            plan.load_state_dict(state)
    gradient = torch.cat([g.reshape(-1) for g in plan.hypergradient("reweight").values()])  # nothing is stepped
    print(f"norm of the hypergradient now: {float(gradient.norm()):.1e}")
    print(f"test accuracy: {100 * accuracy(graph.problems['classifier'].module, data.test):.1f} %")


if __name__ == "__main__":
    main()
