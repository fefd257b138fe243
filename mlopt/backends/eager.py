"""The eager backend: the FX graph's own generated Python, one torch call per node. Always works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mlopt.backends.base import AbstractBackend, Compiled


class EagerBackend(AbstractBackend):
    """Runs graphs as the Python code that FX generates, which also frees each value after its last use."""

    name = "eager"

    def lower(self, module: fx.GraphModule) -> Compiled:
        """Return the graph's forward under ``no_grad``."""
        forward = module.forward

        def run(*tensors: torch.Tensor) -> Sequence[Any]:
            with torch.no_grad():
                return forward(*tensors)

        return run
