"""One solver per file. A solver sees an operator and a right-hand side."""

from mlopt.linalg.solvers.cg import cg
from mlopt.linalg.solvers.neumann import neumann

__all__ = ["cg", "neumann"]
