"""From the problem graph and the estimators to an `ExecutionPlan`: what runs, in which order, what is shared.

Plans hold names and numbers only, no tensors; the runtime executes them and decides nothing.
"""

from mlopt.planner.instructions import (
    Gradient,
    Instruction,
    Linearize,
    MixedProduct,
    ReverseSteps,
    Solve,
    Update,
)
from mlopt.planner.plan import ExecutionPlan, ProblemPlan, ProductNeeds, plan_program

__all__ = [
    "ExecutionPlan",
    "Gradient",
    "Instruction",
    "Linearize",
    "MixedProduct",
    "ProblemPlan",
    "ProductNeeds",
    "ReverseSteps",
    "Solve",
    "Update",
    "plan_program",
]
