"""mlopt in PyTorch Lightning: a module with manual optimization whose ``training_step`` is a step of the plan.

    python examples/lightning_loop.py        # needs lightning

Lightning counts, logs, validates and checkpoints; the plan makes the steps, with its own loaders. What goes into a
checkpoint of Lightning's is ``plan.state_dict()``.
"""

from __future__ import annotations

import digits
import torch
from reweighting import accuracy, make_program
from torch import nn

import mlopt

try:
    from lightning.pytorch import LightningModule, Trainer
except ImportError:  # the module below is then an ordinary one, which any loop can call
    LightningModule, Trainer = nn.Module, None


class Reweighting(LightningModule):
    """Runs a plan as a module with manual optimization."""

    def __init__(self, plan: mlopt.Plan, test: digits.Data) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.plan, self.test = plan, test
        # Registered, so that Lightning sees the parameters; they are the problems' own.
        self.modules_of_problems = nn.ModuleDict({n: p.module for n, p in plan.graph.problems.items()})

    def training_step(self, batch, batch_idx):
        """Make a step of the plan; `batch` only counts."""
        for name, result in self.plan.step().items():
            self.log(f"{name}/loss", result["loss"])

    def validation_step(self, batch, batch_idx):
        """Log the test accuracy."""
        self.log("accuracy", accuracy(self.modules_of_problems["classifier"], self.test))

    def configure_optimizers(self):
        """Return none: the problems have theirs."""
        return []

    def on_save_checkpoint(self, checkpoint):
        """Add the plan's state."""
        checkpoint["plan"] = self.plan.state_dict()

    def on_load_checkpoint(self, checkpoint):
        """Go on from there."""
        self.plan.load_state_dict(checkpoint["plan"])


def make(seed: int = 0) -> Reweighting:
    """Return the module."""
    torch.set_num_threads(1)
    data = digits.load(seed)
    graph = make_program(data, seed, mlopt.CG(max_steps=10, rtol=1e-3, damping=1.0))
    return Reweighting(mlopt.compile(graph, backend="eager"), data.test)


if __name__ == "__main__":
    if Trainer is None:
        raise SystemExit("this example needs Lightning: pip install lightning")
    counting = torch.utils.data.DataLoader(range(1000))
    Trainer(max_epochs=2, accelerator="cpu").fit(make(), counting, torch.utils.data.DataLoader(range(1)))
