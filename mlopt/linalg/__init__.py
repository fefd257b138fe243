"""Linear operators and the solvers that act on them.

Two small contracts. An operator says how a matrix acts on a vector; a solver sees an operator and a right-hand side,
never a loss or a problem. Usable on their own::

    solution = mlopt.linalg.cg(operator, b, max_steps=50, rtol=1e-8)
"""

from mlopt.linalg.native import native_callback
from mlopt.linalg.operator import AbstractLinearOperator, DampedOperator, FunctionOperator, MatrixOperator
from mlopt.linalg.solution import Outcome, Solution
from mlopt.linalg.solvers import cg, neumann

__all__ = [
    "AbstractLinearOperator",
    "DampedOperator",
    "FunctionOperator",
    "MatrixOperator",
    "Outcome",
    "Solution",
    "cg",
    "native_callback",
    "neumann",
]
