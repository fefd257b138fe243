"""Where the numbers of a run go: one small abstract class, and one file for each place."""

from mlopt.engine.loggers.base import AbstractLogger
from mlopt.engine.loggers.csv import CSVLogger
from mlopt.engine.loggers.jsonl import JSONLLogger
from mlopt.engine.loggers.tensorboard import TensorBoardLogger
from mlopt.engine.loggers.wandb import WandbLogger

__all__ = ["AbstractLogger", "CSVLogger", "JSONLLogger", "TensorBoardLogger", "WandbLogger"]
