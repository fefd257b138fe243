"""Batches: any nesting of containers, taken apart into tensors and everything else.

A captured graph has tensors for inputs. The container structure and the plain Python values of a batch (labels as
strings, flags) are constants of the capture: a batch that differs in them has another `BatchSpec` and is captured anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mlopt.errors import DataError

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """Structure of a batch without its tensors: hashable, so that it can key a cache.

    Attributes:
        tree: The container structure.
        constants: Plain Python leaves, as (position, type, value); positions not listed are tensors. The type is
            part of it because ``True == 1 == 1.0``.
    """

    tree: pytree.TreeSpec
    constants: tuple[tuple[int, type, Any], ...]

    def __hash__(self) -> int:
        """Hash the printed structure (a `TreeSpec` itself is not hashable in every torch release)."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((str(self.tree), self.constants))  # printing takes as long as a small solve

    def unflatten(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Rebuild the batch around `tensors`, given in leaf order."""
        constants = {i: value for i, _, value in self.constants}
        remaining = iter(tensors)
        count = len(tensors) + len(constants)
        leaves = [constants[i] if i in constants else next(remaining) for i in range(count)]
        return pytree.tree_unflatten(leaves, self.tree)


def flatten_batch(problem: str, batch: Any, device: torch.device) -> tuple[list[torch.Tensor], BatchSpec]:
    """Take a batch apart.

    Args:
        problem: Name of the problem, for messages.
        batch: Any nesting of dicts, lists, tuples, named tuples and dataclasses of tensors and plain Python values.
        device: Where tensors are moved to.

    Returns:
        The tensors in leaf order, and the structure.

    Raises:
        DataError: A leaf is neither a tensor nor a plain Python value.
    """
    leaves, tree = pytree.tree_flatten(batch)
    if any(dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) for leaf in leaves):
        _register_dataclasses(leaves)
        leaves, tree = pytree.tree_flatten(batch)
    tensors: list[torch.Tensor] = []
    constants: list[tuple[int, type, Any]] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            # Nobody waits for a copy to the host before it is read.
            tensors.append(leaf if leaf.device == device else leaf.to(device, non_blocking=device.type != "cpu"))
        elif isinstance(leaf, _PLAIN):
            constants.append((i, type(leaf), leaf))
        else:
            raise DataError(
                f"problem {problem!r}: its batch holds a {type(leaf).__module__}.{type(leaf).__qualname__}, expected "
                "tensors and plain Python values in dicts, lists, tuples or dataclasses; convert it in the loader "
                "(collate_fn) or register the class with torch.utils._pytree.register_pytree_node"
            )
    return tensors, BatchSpec(tree, tuple(constants))


def _register_dataclasses(leaves: Sequence[Any]) -> None:
    classes: set[Any] = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf)}
    for cls in classes:
        names = [f.name for f in dataclasses.fields(cls)]

        def take_apart(value: Any, names: list[str] = names) -> tuple[list[Any], None]:
            return [getattr(value, n) for n in names], None

        def put_together(children: Any, _: None, cls: Any = cls, names: list[str] = names) -> Any:
            value: Any = object.__new__(cls)  # __init__ may compute; a batch is rebuilt, not made anew
            for n, child in zip(names, children, strict=True):
                object.__setattr__(value, n, child)
            return value

        pytree.register_pytree_node(cls, take_apart, put_together)
