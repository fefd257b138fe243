"""Betty 0.1.1 (arXiv 2207.02849), as its documentation has it used.

``pip install --no-deps betty-ml==0.1.1`` beside the torch you have: its requirements name no version that exists today,
and the package itself runs with torch 2.
"""

from __future__ import annotations

import contextlib
import logging
import os

from benchmarks.methods.base import TorchRunner, UnavailableError
from benchmarks.problems import Instance


class Betty(TorchRunner):
    """An `Engine` of two `ImplicitProblem`."""

    def __init__(self, instance: Instance, case: str) -> None:
        super().__init__(instance)
        try:
            from betty.configs import Config, EngineConfig
            from betty.engine import Engine
            from betty.problems import ImplicitProblem
        except ImportError as error:
            raise UnavailableError(f"not installed ({error})") from None
        if case == "cg-ggn":
            case = "cg"  # it has no other curvature; the comparison is of one outer iteration
        # Its directions of conjugate gradients are updated with an old residual: as much work, another result. Its
        # finite difference does not return to the parameters it started from.
        self.exact = case == "neumann"

        class Lower(ImplicitProblem):
            def training_step(self, batch):
                return instance.lower_loss(self.module, self.upper.module, batch)

        class Upper(ImplicitProblem):
            def training_step(self, batch):
                return instance.upper_loss(self.lower.module, self.module, batch)

        solver = {
            "cg": {"type": "cg", "cg_iterations": instance.solver_steps, "cg_alpha": 1.0},
            "neumann": {
                "type": "neumann",
                "neumann_iterations": instance.solver_steps,
                "neumann_alpha": instance.neumann_scale,
            },
            "finite-difference": {"type": "darts"},
        }[case]
        lower_optimizer, upper_optimizer = self.optimizers()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            logging.disable(logging.INFO)
            lower = Lower(
                "lower",
                Config(**solver, unroll_steps=instance.unroll_steps, allow_unused=True),
                instance.lower,
                lower_optimizer,
                None,
                instance.lower_data,
                str(instance.device),
            )
            upper = Upper(
                "upper",
                Config(allow_unused=True),
                instance.upper,
                upper_optimizer,
                None,
                instance.upper_data,
                str(instance.device),
            )
            self.engine = Engine(
                [upper, lower],
                EngineConfig(train_iters=1, valid_step=10**9),
                {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}},
            )
            logging.disable(logging.NOTSET)
        self.engine.train()

    def outer(self) -> None:
        for _ in range(self.instance.unroll_steps):
            self.engine.global_step += 1
            self.engine.train_step()
