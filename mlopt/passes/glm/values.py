"""What is known of a value that depends on the vector v [N] of a product."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx


class NoMatchError(Exception):
    """The graph is not of the structure looked for; the message says why, for ``logger.debug``."""


@dataclasses.dataclass(frozen=True)
class Flat:
    """A value shaped like parameters, each element of which is one of three things, or a sum of the last two.

    Zero; a multiple of one element of v; an element of ``X^T D`` or of a column sum of D.

    Attributes:
        params: int64 like the value: which element of v, or -1.
        sums: int64 like the value: which element, as numbered by `Exits`, or -1.
        rows: Whether it is broadcast along the rows: `params` is then [C], and the value [n, C] or [n].
    """

    params: torch.Tensor
    sums: torch.Tensor
    rows: bool = False

    @property
    def is_params(self) -> bool:
        """Whether nothing but elements of v is in it."""
        return bool((self.sums < 0).all())


@dataclasses.dataclass(frozen=True)
class Rows:
    """A value whose part i along the axis `dim` depends on v through row i of ``U = X W + b`` alone, linearly.

    Attributes:
        dim: The axis of the rows.
        entry: Which U it reads by elements, if it reads just one.
        aligned: Whether its element [i, c] reads only element [i, c] of that U (and `row_sums`).
        row_sums: The sums over the classes, of values that read U by elements, that it reads.
    """

    dim: int
    entry: int | None = None
    aligned: bool = True
    row_sums: frozenset[fx.Node] = frozenset()


@dataclasses.dataclass
class Entry:
    """One U: the node that has it, how it lies there, and where its parameters lie in v."""

    node: fx.Node
    transposed: bool
    weights: torch.Tensor  # [C, D], positions in v
    bias: torch.Tensor | None = None  # [C]


@dataclasses.dataclass
class Exits:
    """The D of ``X^T D`` and of its column sums, and how the elements of these are numbered.

    Element (c, d) of D number k has the number ``(first[k] + c) * (num_features + 1) + d``; its column sum is the
    feature after the last.
    """

    num_features: int
    nodes: list[fx.Node] = dataclasses.field(default_factory=list)
    transposed: list[bool] = dataclasses.field(default_factory=list)
    first: list[int] = dataclasses.field(default_factory=list)
    num_columns: int = 0
    found: list[fx.Node] = dataclasses.field(default_factory=list)  # the nodes that have X^T D or column sums

    def number(self, node: fx.Node, transposed: bool, columns: int) -> torch.Tensor:
        """Return the numbers [C, D + 1] of a D, which is `node` or, if transposed, its transpose."""
        if node not in self.nodes:
            self.nodes.append(node)
            self.transposed.append(transposed)
            self.first.append(self.num_columns)
            self.num_columns += columns
        k = self.nodes.index(node)
        if self.transposed[k] != transposed:
            raise NoMatchError(f"{node} is read both ways round")
        width = self.num_features + 1
        return torch.arange(self.first[k] * width, (self.first[k] + columns) * width).view(columns, width)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Return a node's sizes, free ones as SymInt."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise NoMatchError(f"{node} is no tensor")
    return tuple(value.shape)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for all sizes of the batch; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return not isinstance(a, int) and not isinstance(b, int) and str(a) == str(b)


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """`same` for all sizes."""
    return len(a) == len(b) and all(same(m, n) for m, n in zip(a, b, strict=True))


def static_shape(node: fx.Node) -> tuple[int, ...]:
    """Return sizes none of which is free."""
    shape = shape_of(node)
    if not all(isinstance(n, int) for n in shape):
        raise NoMatchError(f"{node} has a free size")
    return shape
