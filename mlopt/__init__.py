"""mlopt: a compiler for multilevel optimization on PyTorch.

Write each problem with a `training_step`, put the problems in a `Graph`, `compile` it, step the `Plan`.
"""

from mlopt import errors, linalg
from mlopt.compile import compile  # noqa: A004 - the name users know from torch.compile
from mlopt.engine import (
    AbstractLogger,
    Callback,
    Checkpoints,
    CSVLogger,
    EarlyStopping,
    Engine,
    JSONLLogger,
    TensorBoardLogger,
    WandbLogger,
)
from mlopt.graph import Graph
from mlopt.hypergradient import (
    CG,
    SAMA,
    AbstractEstimator,
    Dense,
    FiniteDifference,
    Identity,
    Neumann,
    Nystrom,
    Unroll,
)
from mlopt.ops import build_config
from mlopt.problem import Problem
from mlopt.runtime import NonFiniteGuard, Plan
from mlopt.runtime.saving.read import load

__version__ = "0.1.0"

__all__ = [
    "CG",
    "SAMA",
    "AbstractEstimator",
    "AbstractLogger",
    "CSVLogger",
    "Callback",
    "Checkpoints",
    "Dense",
    "EarlyStopping",
    "Engine",
    "FiniteDifference",
    "Graph",
    "Identity",
    "JSONLLogger",
    "Neumann",
    "NonFiniteGuard",
    "Nystrom",
    "Plan",
    "Problem",
    "TensorBoardLogger",
    "Unroll",
    "WandbLogger",
    "build_config",
    "compile",
    "errors",
    "linalg",
    "load",
]
