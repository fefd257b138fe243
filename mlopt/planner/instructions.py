"""The instruction set of an `ExecutionPlan`: frozen records that print as one readable line each.

A *slot* is the name of a flat vector at run time: cotangents, solutions and the hypergradient live in slots.
"""

from __future__ import annotations

import dataclasses

from mlopt.hypergradient import AbstractEstimator

# Slot of the hypergradient that a problem's instructions accumulate.
HYPERGRADIENT = "hypergradient"


@dataclasses.dataclass(frozen=True)
class Gradient:
    """Loss, metrics and gradient of a problem's own loss, in one forward and one backward.

    Attributes:
        problem: Whose loss.
        cotangents: (problem read, slot) pairs: the same backward also gives the gradient with respect to these
            problems' parameters.
    """

    problem: str
    cotangents: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """One line."""
        extra = "".join(f", {slot} = dL/d{name}" for name, slot in self.cotangents)
        return (
            f"gradient   loss L of {self.problem}, {HYPERGRADIENT if extra else 'gradient'} = dL/d{self.problem}{extra}"
        )


@dataclasses.dataclass(frozen=True)
class Linearize:
    """Forward and backward of a lower loss at its present point, kept for the products that follow."""

    problem: str

    def __str__(self) -> str:
        """One line."""
        return f"linearize  loss g of {self.problem}, kept for every product below"


@dataclasses.dataclass(frozen=True)
class Solve:
    """Turn the cotangent v of a lower problem into q with ``H q = v`` (as its estimator understands it)."""

    problem: str
    rhs: str
    out: str
    estimator: AbstractEstimator

    def __str__(self) -> str:
        """One line."""
        return f"solve      H {self.out} = {self.rhs} by {self.estimator!r}"


@dataclasses.dataclass(frozen=True)
class MixedProduct:
    """Subtract ``(d2g/dr dtheta)^T q`` from the slots of the problems r that a lower loss reads.

    Attributes:
        problem: The lower problem with loss g and parameters theta.
        vector: Slot of q.
        targets: (problem r, slot) pairs.
        step: None for the exact product, else the step of a central difference.
    """

    problem: str
    vector: str
    targets: tuple[tuple[str, str], ...]
    step: float | None = None

    def __str__(self) -> str:
        """One line."""
        how = "" if self.step is None else f" by a central difference of step {self.step:g}"
        parts = ", ".join(f"{slot} -= (d2g/d{name} d{self.problem})^T {self.vector}" for name, slot in self.targets)
        return f"mixed      {parts}{how}"


@dataclasses.dataclass(frozen=True)
class ReverseSteps:
    """Send a cotangent of a lower problem's parameters back through its last optimizer steps.

    Attributes:
        problem: The lower problem.
        rhs: Slot of the cotangent.
        targets: (problem read, slot) pairs.
        steps: How many steps, at most.
    """

    problem: str
    rhs: str
    targets: tuple[tuple[str, str], ...]
    steps: int

    def __str__(self) -> str:
        """One line."""
        parts = ", ".join(f"{slot} += (d{self.problem}/d{name})^T {self.rhs}" for name, slot in self.targets)
        return f"unroll     {parts} through the last {self.steps} optimizer steps of {self.problem}"


@dataclasses.dataclass(frozen=True)
class Update:
    """Hand the gradient to the problem's own optimizer and step it."""

    problem: str

    def __str__(self) -> str:
        """One line."""
        return f"update     the optimizer of {self.problem} steps"


Instruction = Gradient | Linearize | Solve | MixedProduct | ReverseSteps | Update
