"""Estimators of the best-response derivative, as values: one file each.

`base.py` states the contract; a user adds an estimator by subclassing `AbstractEstimator`, with nothing to register.
"""

from mlopt.hypergradient.base import AbstractEstimator
from mlopt.hypergradient.cg import CG
from mlopt.hypergradient.dense import Dense
from mlopt.hypergradient.finite_difference import FiniteDifference
from mlopt.hypergradient.identity import Identity
from mlopt.hypergradient.neumann import Neumann
from mlopt.hypergradient.nystrom import Nystrom
from mlopt.hypergradient.sama import SAMA
from mlopt.hypergradient.unroll import Unroll

__all__ = [
    "CG",
    "SAMA",
    "AbstractEstimator",
    "Dense",
    "FiniteDifference",
    "Identity",
    "Neumann",
    "Nystrom",
    "Unroll",
]
