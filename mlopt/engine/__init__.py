"""The training run around a plan: steps, time, progress, history, loggers, validation, checkpoints, callbacks.

It sees public names only; start in `engine.py`. Every other file here is one thing that a run may have.
"""

from mlopt.engine.callback import Callback
from mlopt.engine.checkpoints import Checkpoints
from mlopt.engine.engine import Engine
from mlopt.engine.loggers import AbstractLogger, CSVLogger, JSONLLogger, TensorBoardLogger, WandbLogger
from mlopt.engine.stopping import EarlyStopping

__all__ = [
    "AbstractLogger",
    "CSVLogger",
    "Callback",
    "Checkpoints",
    "EarlyStopping",
    "Engine",
    "JSONLLogger",
    "TensorBoardLogger",
    "WandbLogger",
]
