"""One solver per file. A solver sees an operator and a right-hand side."""

from mlopt.linalg.solvers.cg import cg
from mlopt.linalg.solvers.dense import dense
from mlopt.linalg.solvers.neumann import neumann
from mlopt.linalg.solvers.nystrom import NystromApproximation, nystrom, nystrom_approximation
from mlopt.linalg.solvers.preconditioned_cg import preconditioned_cg

__all__ = [
    "NystromApproximation",
    "cg",
    "dense",
    "neumann",
    "nystrom",
    "nystrom_approximation",
    "preconditioned_cg",
]
