"""Linear operators and the solvers that act on them.

Two small contracts. An operator says how a matrix acts on a vector; a solver sees an operator and a right-hand side,
never a loss or a problem. Usable on their own::

    solution = mlopt.linalg.cg(operator, b, max_steps=50, rtol=1e-8)
"""

from mlopt.linalg.lanczos import extreme_eigenvalues
from mlopt.linalg.native import native_callback
from mlopt.linalg.operator import (
    ROWS_AT_ONCE,
    AbstractLinearOperator,
    BlockOperator,
    DampedOperator,
    DiagonalOperator,
    FunctionOperator,
    MatrixOperator,
)
from mlopt.linalg.solution import Outcome, Solution
from mlopt.linalg.solvers import (
    NystromApproximation,
    cg,
    dense,
    neumann,
    nystrom,
    nystrom_approximation,
    preconditioned_cg,
)

__all__ = [
    "ROWS_AT_ONCE",
    "AbstractLinearOperator",
    "BlockOperator",
    "DampedOperator",
    "DiagonalOperator",
    "FunctionOperator",
    "MatrixOperator",
    "NystromApproximation",
    "Outcome",
    "Solution",
    "cg",
    "dense",
    "extreme_eigenvalues",
    "native_callback",
    "neumann",
    "nystrom",
    "nystrom_approximation",
    "preconditioned_cg",
]
