"""mlopt."""

from __future__ import annotations

import mlopt
from benchmarks.methods.base import FINITE_DIFFERENCE_STEP, TorchRunner
from benchmarks.problems import Instance


def estimator(instance: Instance, case: str) -> mlopt.AbstractEstimator:
    if case == "neumann":
        return mlopt.Neumann(num_terms=instance.solver_steps + 1, scale=instance.neumann_scale)
    if case == "finite-difference":
        return mlopt.FiniteDifference(step=FINITE_DIFFERENCE_STEP, exact=False)
    curvature = "ggn" if case == "cg-ggn" else "hessian"
    return mlopt.CG(max_steps=instance.solver_steps, rtol=0.0, damping=0.0, warm_start=False, curvature=curvature)


class Compiled(TorchRunner):
    """A compiled plan.

    Args:
        instance: The problem.
        case: The estimator.
        backend: What runs the graphs.
    """

    def __init__(self, instance: Instance, case: str, backend: str) -> None:
        super().__init__(instance)

        class Lower(mlopt.Problem):
            def training_step(self, batch):
                return instance.lower_loss(self.module, self.upper.module, batch)

        class Upper(mlopt.Problem):
            def training_step(self, batch):
                return instance.upper_loss(self.lower.module, self.module, batch)

        lower_optimizer, upper_optimizer = self.optimizers()
        lower = Lower(
            "lower",
            module=instance.lower,
            optimizer=lower_optimizer,
            data=instance.lower_data,
            hypergradient=estimator(instance, case),
            unroll_steps=instance.unroll_steps,
        )
        upper = Upper("upper", module=instance.upper, optimizer=upper_optimizer, data=instance.upper_data)
        self.plan = mlopt.compile(mlopt.Graph([lower, upper]), backend=backend, progress=False)

    def outer(self) -> None:
        self.plan.run(self.instance.unroll_steps)
