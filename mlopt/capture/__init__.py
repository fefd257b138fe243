"""From a user's `training_step` to a `LossGraph`, and from an optimizer's `step` to an `UpdateGraph`.

Owns capture (torch.export for losses, make_fx for optimizer steps), the clean-up of the captured graphs and the batch
protocol. It differentiates nothing and decides nothing about levels: which problem reads which parameters is recorded
as a fact (`LossGraph.reads`), and `mlopt.graph` draws the conclusions.
"""

from mlopt.capture.attributes import ReadAttribute
from mlopt.capture.batch import BatchSpec, flatten_batch
from mlopt.capture.export import capture_loss
from mlopt.capture.optimizer_watch import OptimizerWatch
from mlopt.capture.record import GraphInput, InputRole, LossGraph
from mlopt.capture.update import UpdateGraph, UpdateRole, UpdateValue
from mlopt.capture.update_kinds import capture_update
from mlopt.capture.update_twin import warmed_twin

__all__ = [
    "BatchSpec",
    "GraphInput",
    "InputRole",
    "LossGraph",
    "OptimizerWatch",
    "ReadAttribute",
    "UpdateGraph",
    "UpdateRole",
    "UpdateValue",
    "capture_loss",
    "capture_update",
    "flatten_batch",
    "warmed_twin",
]
