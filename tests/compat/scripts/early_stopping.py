"""Early stopping, a custom optimizer step without an optimizer, a loss that returns metrics, and train_step()."""

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import nn


class Fit(ImplicitProblem):
    def training_step(self, batch):
        x, y = batch
        loss = (self.module(x).squeeze(1) - y).square().mean()
        return {"loss": loss, "errors": {"rmse": loss.sqrt().item()}}

    def custom_optimizer_step(self):
        with torch.no_grad():
            for p in self.trainable_parameters():
                p -= 0.1 * p.grad


class FitEngine(Engine):
    def validation(self):
        self.num_validations = getattr(self, "num_validations", 0) + 1
        return {"loss": max(0.5, 1.0 - 0.1 * self.num_validations)}


def main(iters=1000):
    torch.manual_seed(0)
    x = torch.randn(16, 3)
    fit = Fit("fit", Config(log_step=10), nn.Linear(3, 1), None, None, [(x, x.sum(1))])
    config = EngineConfig(train_iters=iters, valid_step=5, early_stopping=True, early_stopping_tolerance=3)
    engine = FitEngine(problems=[fit], config=config, dependencies={"u2l": {}, "l2u": {}})
    engine.train_step()
    engine.run()
    return {"fit": fit.module, "engine": engine}


if __name__ == "__main__":
    main()
