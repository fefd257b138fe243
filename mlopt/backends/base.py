"""The contract of a backend."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

# Tensors, and None or integers where the graph returns those.
Compiled = Callable[..., Sequence[Any]]


class AbstractBackend(abc.ABC):
    """Lowers graphs."""

    name: str

    @abc.abstractmethod
    def lower(self, module: fx.GraphModule) -> Compiled:
        """Turn a functional graph into a callable ``f(*tensors) -> tuple`` that never builds an autograd graph."""
