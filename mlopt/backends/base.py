"""The contract of a backend."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx

from mlopt.passes import GlmDescentStructure


@dataclasses.dataclass(frozen=True)
class Lowering:
    """What became of one graph, for ``explain()``: the backend that runs it, and a note on why or how fast."""

    backend: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Changing:
    """What changes from one call of a graph to the next.

    Attributes:
        feedback: (output, argument) pairs: what a call returns and the next one takes.
        batch: The arguments that are the tensors of a batch.
        numbers: The arguments that are 0-d float64 numbers.
        num_kept: How many outputs, from the first, are wanted of every call.
    """

    feedback: tuple[tuple[int, int], ...]
    batch: tuple[int, ...]
    numbers: tuple[int, ...]
    num_kept: int = 0


class Compiled(Protocol):
    """A lowered graph ``f(*tensors) -> sequence`` that never builds an autograd graph or writes its inputs.

    It returns tensors, and None or numbers where the graph returns those.
    """

    @property
    def is_kernel(self) -> bool:
        """Whether `native_operator` returns a kernel of its own, rather than a way to call the graph."""

    @property
    def lowering(self) -> Lowering:
        """What became of the graph."""

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """Run the graph."""

    def native_call(self, arguments: Sequence[Any]) -> Any:
        """Return the graph as a part of native programs, or None if it is not native.

        Args:
            arguments: Those of a call; it holds for tensors of the same sizes, and for the same numbers.

        Returns:
            ``mlopt._C.BoundCall``.
        """

    def native_operator(self, arguments: Sequence[Any], hole: int) -> Any:
        """Return the graph, if it has one output, as a native operator in argument `hole`, or None if it is not native.

        Args:
            arguments: What the other arguments are; None at `hole`.
            hole: Position of the vector.
        """

    def native_steps(self, arguments: Sequence[Any], changing: Changing) -> Any:
        """Return the graph as a native loop over its own results, or None if it is not native.

        Args:
            arguments: The arguments of the first call.
            changing: What changes from call to call.

        Returns:
            ``mlopt._C.Steps``, and a function ``(arguments, what the package computed) -> what the graph returns``.
        """


class AbstractBackend(abc.ABC):
    """Lowers graphs."""

    name: str
    compiles = False  # whether graphs become machine code; what pays only then is left out otherwise
    has_kernels = False  # whether `lower_descent` returns anything

    def prepare(  # noqa: B027 - a backend without a slow part has nothing to prepare
        self, modules: Sequence[fx.GraphModule], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Do the slow part of lowering several graphs at once; `lower` then returns quickly for each.

        Args:
            modules: The graphs.
            progress: Called with the number of graphs compiled and to be compiled.
        """

    def compiles_on(self, device: torch.device) -> bool:
        """Whether graphs on a device become machine code."""
        return self.compiles

    def seal(self) -> None:  # noqa: B027 - see above
        """Say that training begins: from now on lowering must be quick, at the price of slower graphs."""

    def copy_cache(self, directory: Path) -> None:  # noqa: B027 - see above
        """Copy what the graphs lowered so far have in a cache on disk into another cache.

        Args:
            directory: The other cache, as ``cache_dir`` of a backend.
        """

    def is_prepared(self, module: fx.GraphModule) -> bool:
        """Whether `lower` returns quickly for this graph."""
        return True

    def lower_descent(
        self, structure: GlmDescentStructure, module: fx.GraphModule, tables: Compiled, num_steps: int
    ) -> Any:
        """Return what makes steps of descent on a linear model (a `mlopt.backends.Descent`), or None.

        Args:
            structure: What is known of the steps.
            module: The graph of what all steps from one point have in common.
            tables: What it was lowered to.
            num_steps: How many steps are usually made in a row.
        """
        return None

    @abc.abstractmethod
    def lower(self, module: fx.GraphModule) -> Compiled:
        """Turn a functional graph into a callable."""
