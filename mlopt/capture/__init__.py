"""From a user's `training_step` to a `LossGraph`.

Owns capture (torch.export), the clean-up of the captured graph and the batch protocol. It differentiates nothing and
decides nothing about levels: which problem reads which parameters is recorded as a fact (`LossGraph.reads`), and
`mlopt.graph` draws the conclusions.
"""

from mlopt.capture.attributes import ReadAttribute
from mlopt.capture.batch import BatchSpec, flatten_batch
from mlopt.capture.export import capture_loss
from mlopt.capture.record import GraphInput, InputRole, LossGraph

__all__ = ["BatchSpec", "GraphInput", "InputRole", "LossGraph", "ReadAttribute", "capture_loss", "flatten_batch"]
