"""How each operation acts on what is known of its arguments; an operation without a rule ends the search.

Every rule is for an operation that is linear in the arguments that depend on v, so the whole is linear in v. Operands
that do not depend on v may be anything: they are the same for every v.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mlopt.passes.glm.values import (
    Entry,
    Exits,
    Flat,
    NoMatchError,
    Rows,
    same,
    same_shape,
    shape_of,
    static_shape,
)
from mlopt.precision import wide_dtype

aten = torch.ops.aten

MAX_COLUMNS = 32  # kGlmMaxClasses of csrc/glm/glm.h

_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_LAYOUT = _VIEWS | {
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.clone.default,
}
# Elementwise, linear in the first argument, zero where it is zero.
_SCALED = {
    aten.neg.default,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.sigmoid_backward.default,
    aten.tanh_backward.default,
    aten.threshold_backward.default,
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.elu_backward.default,
    aten.hardtanh_backward.default,
    aten.leaky_relu_backward.default,
    aten.hardswish_backward.default,
    aten.hardsigmoid_backward.default,
    aten.softplus_backward.default,
    aten.log_sigmoid_backward.default,
}


class Analysis:
    """Follows the vector through a graph.

    Args:
        vector: The placeholder of v.
    """

    def __init__(self, vector: fx.Node) -> None:
        size = static_shape(vector)
        index = torch.arange(size[0])
        self.known: dict[fx.Node, Any] = {vector: Flat(index, torch.full_like(index, -1))}
        self.dtype = vector.meta["val"].dtype
        self.x: fx.Node | None = None
        self.entries: list[Entry] = []
        self.exits: Exits | None = None

    def visit(self, node: fx.Node) -> None:
        """Find out what is known of a node whose arguments have been visited.

        Raises:
            NoMatchError: Nothing is.
        """
        if not any(n in self.known for n in node.all_input_nodes):
            return
        rule = _RULES.get(node.target)
        if rule is None:
            raise NoMatchError(f"{node.target} has no rule")
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype != self.dtype:
            raise NoMatchError(f"{node} is of another dtype than the vector")
        self.known[node] = rule(self, node)

    def operands(self, node: fx.Node) -> list[tuple[Any, Any]]:
        """Return the arguments of a node with what is known of them (None: independent of v)."""
        return [(a, self.known.get(a) if isinstance(a, fx.Node) else None) for a in node.args]

    def set_x(self, node: Any, *, transposed: bool) -> bool:
        """Whether a node is X (or its transpose, or X of a half type widened); the first one met becomes X."""
        if not isinstance(node, fx.Node) or node in self.known:
            return False
        while node.op != "placeholder":
            if node.target in (aten.t.default, aten.transpose.int, aten.permute.default) and _swaps_last(node):
                transposed = not transposed
            elif not is_widened(node) and not _removes_first(node):
                return False
            node = node.args[0]
        if transposed:
            return False
        if self.x is None:
            shape = shape_of(node)
            one = len(shape) == 2 or (len(shape) == 3 and same(shape[0], 1))
            if not one or not isinstance(shape[-1], int) or wide_dtype(node.meta["val"].dtype) != self.dtype:
                return False
            self.x, self.exits = node, Exits(shape[-1])
        return self.x is node

    @property
    def num_rows(self) -> Any:
        """The number of rows of X."""
        assert self.x is not None
        return shape_of(self.x)[-2]

    def enter(self, node: fx.Node, weights: torch.Tensor, *, transposed: bool) -> Rows:
        """Note a product X W; `weights` are the positions [C, D]."""
        if len(weights) > MAX_COLUMNS or (weights < 0).any():
            raise NoMatchError(f"{node} is a product with too many columns, or with parameters partly missing")
        self.entries.append(Entry(node, transposed, weights))
        return Rows(1 if transposed else 0, len(self.entries) - 1)

    def canonical(self, node: fx.Node) -> fx.Node:
        """Return the node that has the values of a row value before it was laid out otherwise."""
        while node.target in _LAYOUT:
            source = node.args[0]
            before, after = (_longer_axes(n, self.known[n].dim) for n in (source, node))
            turned = node.target is aten.t.default
            if not turned and not same_shape(before, after):
                break
            node = source
        return node

    def leave(self, node: fx.Node, source: fx.Node, *, transposed: bool, sums: bool) -> Flat:
        """Note ``X^T D`` [D, C], its transpose, or the column sums of D, where `source` has D."""
        assert self.exits is not None
        base = self.canonical(source)
        shape, dim = shape_of(base), self.known[base].dim
        columns = 1
        for n in (*shape[:dim], *shape[dim + 1 :]):
            if not isinstance(n, int) or n * columns > MAX_COLUMNS:
                raise NoMatchError(f"{base} has too many columns")
            columns *= n
        if any(n != 1 for n in shape[:dim]) and any(n != 1 for n in shape[dim + 1 :]):
            raise NoMatchError(f"{base} has columns on both sides of its rows")
        numbers = self.exits.number(base, any(n != 1 for n in shape[:dim]), columns)
        self.exits.found.append(node)
        wanted = static_shape(node)
        numbers = numbers[:, -1] if sums else numbers[:, :-1] if transposed else numbers[:, :-1].T
        if len(wanted) == 2 and not sums and tuple(numbers.shape) != wanted:
            raise NoMatchError(f"{node} is not laid out as expected")
        numbers = numbers.reshape(wanted)
        return Flat(torch.full(wanted, -1), numbers)


def _removes_first(node: fx.Node) -> bool:
    """Whether a node is a batch of one matrix, as that matrix."""
    return node.target is aten.squeeze.dim and node.args[1] == 0 and len(shape_of(node)) == 2


def is_widened(node: fx.Node) -> bool:
    """Whether a node is a tensor of a half type as float32, and otherwise the same."""
    if node.target is not aten._to_copy.default or set(node.kwargs) != {"dtype"}:
        return False
    before = node.args[0].meta["val"].dtype
    return before != wide_dtype(before) == node.kwargs["dtype"]


def _layout(a: Analysis, node: fx.Node) -> Any:
    known = a.known.get(node.args[0])
    if isinstance(known, Rows):
        return _layout_of_rows(node, known)
    if not isinstance(known, Flat) or known.rows:
        raise NoMatchError(f"{node} moves something else than parameters")
    static_shape(node)
    if node.all_input_nodes != [node.args[0]]:
        raise NoMatchError(f"{node} has free sizes")
    target = aten.reshape.default if node.target in _VIEWS else node.target
    args = node.args[1:]
    return dataclasses.replace(known, params=target(known.params, *args), sums=target(known.sums, *args))


def _layout_of_rows(node: fx.Node, rows: Rows) -> Rows:
    before, after, dim = shape_of(node.args[0]), shape_of(node), rows.dim
    target = node.target
    at = node.args[1] if len(node.args) > 1 else 0
    if target is aten.t.default:
        new = len(before) - 1 - dim
    elif target is aten.transpose.int:
        i, j = (d % len(before) for d in node.args[1:3])
        new = j if dim == i else i if dim == j else dim
    elif target is aten.permute.default:
        new = [d % len(before) for d in at].index(dim)
    elif target is aten.clone.default:
        new = dim
    elif target is aten.unsqueeze.default:
        new = dim + (at % len(after) <= dim)
    elif target is aten.squeeze.dim:
        if at % len(before) == dim:
            raise NoMatchError(f"{node} may remove the axis of the rows")
        new = dim - (at % len(before) < dim) if len(after) < len(before) else dim
    elif target in (aten.slice.Tensor, aten.select.int):
        if at % len(before) == dim:
            raise NoMatchError(f"{node} takes some of the rows")
        new = dim - (at % len(before) < dim and target is aten.select.int)
    else:
        new = _viewed(node, before, after, dim)
    kept = target is aten.t.default or same_shape(_longer_axes(node.args[0], dim), _longer_axes(node, new))
    return dataclasses.replace(rows, dim=new, aligned=rows.aligned and (kept or rows.entry is None))


def _viewed(node: fx.Node, before: Sequence[Any], after: Sequence[Any], dim: int) -> int:
    """Where a view puts the axis of the rows, if it does not cut across it."""
    if len(after) > dim and same_shape(before[: dim + 1], after[: dim + 1]):
        return dim
    longer = [[k for k, n in enumerate(shape) if not same(n, 1)] for shape in (before, after)]
    sizes = [tuple(shape[k] for k in axes) for shape, axes in zip((before, after), longer, strict=True)]
    if dim in longer[0] and same_shape(*sizes):  # only axes of size 1 come and go
        return longer[1][longer[0].index(dim)]
    raise NoMatchError(f"{node} does not keep the rows apart")


def _longer_axes(node: fx.Node, rows: int) -> tuple[Any, ...]:
    """The axes of a row value in order, without those of size 1; that of the rows is marked, the others are sizes."""
    return tuple("rows" if k == rows else n for k, n in enumerate(shape_of(node)) if k == rows or not same(n, 1))


def _swaps_last(node: fx.Node) -> bool:
    """Whether a transpose of a matrix, or of one with axes before it, swaps the last two axes and nothing else."""
    count = len(shape_of(node))
    if node.target is aten.t.default:
        return count == 2
    if node.target is aten.transpose.int:
        return {d % count for d in node.args[1:3]} == {count - 2, count - 1}
    return [d % count for d in node.args[1]] == [*range(count - 2), count - 1, count - 2]


def _expand(a: Analysis, node: fx.Node) -> Any:
    known = a.known.get(node.args[0])
    before, after = shape_of(node.args[0]), shape_of(node)
    if same_shape(before, after):
        return known
    if isinstance(known, Rows):
        dim = known.dim + len(after) - len(before)
        if not same(before[known.dim], after[dim]):
            raise NoMatchError(f"{node} repeats the rows")
        return dataclasses.replace(known, dim=dim, aligned=known.aligned and known.entry is None)
    if not isinstance(known, Flat) or known.rows or not known.is_params or len(after) not in (1, 2):
        raise NoMatchError(f"{node} repeats something else than a bias")
    columns = after[1] if len(after) == 2 else 1
    if known.params.numel() != columns or (len(after) == 2 and before and before[-1] != columns):
        raise NoMatchError(f"{node} repeats something else than a bias")
    return Flat(known.params.reshape(-1), known.sums.reshape(-1), rows=True)


def _elementwise(a: Analysis, node: fx.Node) -> Any:
    """A value that depends on v, times or over one that does not."""
    first, second = (*a.operands(node), (None, None))[:2]
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        if (first[1] is None) == (second[1] is None) or (node.target is aten.div.Tensor and first[1] is None):
            raise NoMatchError(f"{node} is not linear")
        if len(node.args) > 2 or node.kwargs:
            raise NoMatchError(f"{node} rounds")
    elif any(known is not None for _, known in a.operands(node)[1:]) or first[1] is None:
        raise NoMatchError(f"{node} is not linear")
    operand, known = first if first[1] is not None else second
    if isinstance(known, Rows):
        return _broadcast(node, [(operand, known)])
    if not isinstance(known, Flat) or known.rows or not known.is_params:
        raise NoMatchError(f"{node} scales something else than parameters")
    if not same_shape(shape_of(operand), shape_of(node)):
        raise NoMatchError(f"{node} repeats parameters")
    return known


def _broadcast(node: fx.Node, operands: Sequence[tuple[fx.Node, Rows]]) -> Rows:
    """What an elementwise operation makes of row values, broadcast against each other and anything else."""
    after = shape_of(node)
    dims, rows = set(), operands[0][1]
    aligned = True
    for operand, known in operands:
        before = shape_of(operand)
        dim = known.dim + len(after) - len(before)
        if not same(before[known.dim], after[dim]):
            raise NoMatchError(f"{node} repeats the rows")
        dims.add(dim)
        aligned = aligned and known.aligned and (known.entry is None or same_shape(before, after))
    if len(dims) != 1:
        raise NoMatchError(f"{node} brings different rows together")
    entries = {known.entry for _, known in operands if known.entry is not None}
    if len(entries) > 1:
        aligned = False
    sums = frozenset(s for _, known in operands for s in known.row_sums)
    return dataclasses.replace(rows, dim=dims.pop(), entry=min(entries, default=None), aligned=aligned, row_sums=sums)


def _add(a: Analysis, node: fx.Node) -> Any:
    (left, known_left), (right, known_right) = a.operands(node)[:2]
    if known_left is None or known_right is None:
        raise NoMatchError(f"{node} adds something that does not depend on the vector")
    if isinstance(known_left, Rows) and isinstance(known_right, Rows):
        return _broadcast(node, [(left, known_left), (right, known_right)])
    plain = node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs
    if isinstance(known_left, Flat) and isinstance(known_right, Flat):
        return _merge(node, known_left, known_right, plain=plain)
    if isinstance(known_left, Flat):
        left, known_left, right, known_right = right, known_right, left, known_left
    if not plain or not isinstance(known_left, Rows) or not isinstance(known_right, Flat):
        raise NoMatchError(f"{node} is no sum of X W and a bias")
    return _add_bias(a, node, left, right)


def _add_bias(a: Analysis, node: fx.Node, product: fx.Node, bias: fx.Node) -> Rows:
    """``X W + b``: the U of this entry is the sum from here on."""
    known = a.known[bias]
    entry = next((e for e in a.entries if e.node is product), None)
    if entry is None or entry.bias is not None or entry.transposed or len(product.users) != 1:
        raise NoMatchError(f"{node} adds parameters to something else than X W")
    shape = shape_of(product)
    columns = shape[1] if len(shape) == 2 else 1
    if not known.rows:  # broadcast by the sum itself
        before = shape_of(bias)
        if len(before) > len(shape) or (len(before) == len(shape) and not same(before[0], 1)):
            raise NoMatchError(f"{node} adds parameters by rows")
    if not same_shape(shape, shape_of(node)) or known.params.numel() != columns or not known.is_params:
        raise NoMatchError(f"{node} adds something else than a bias")
    if (known.params < 0).any():
        raise NoMatchError(f"{node} adds a bias that is partly missing")
    entry.node, entry.bias = node, known.params.reshape(-1)
    return Rows(0, a.entries.index(entry))


def _merge(node: fx.Node, a: Flat, b: Flat, *, plain: bool) -> Flat:
    if a.rows or b.rows or a.params.shape != b.params.shape:
        raise NoMatchError(f"{node} adds parameters of different shapes")
    if ((a.params >= 0) & (b.params >= 0) & (a.params != b.params)).any():
        raise NoMatchError(f"{node} adds different parameters")
    if ((a.sums >= 0) & (b.sums >= 0)).any():
        raise NoMatchError(f"{node} adds two products X^T D")
    if not plain and not (a.is_params and b.is_params):
        raise NoMatchError(f"{node} scales X^T D")
    return Flat(torch.maximum(a.params, b.params), torch.maximum(a.sums, b.sums))


def _mm(a: Analysis, node: fx.Node) -> Any:
    (left, known_left), (right, known_right) = a.operands(node)[:2]
    if (known_left is None) == (known_right is None):
        raise NoMatchError(f"{node} is not linear")
    if isinstance(known_right, Flat) and known_right.is_params and not known_right.rows:
        if a.set_x(left, transposed=False):  # X W
            weights = known_right.params.reshape(known_right.params.shape[0], -1).T
            return a.enter(node, weights, transposed=False)
    elif isinstance(known_left, Flat) and known_left.is_params and not known_left.rows and len(shape_of(left)) == 2:
        if a.set_x(right, transposed=True):  # W^T X^T
            return a.enter(node, known_left.params, transposed=True)
    elif isinstance(known_right, Rows):
        if known_right.dim == 0:  # X^T D
            if a.set_x(left, transposed=True):
                return a.leave(node, right, transposed=False, sums=False)
        elif known_left is None:  # A D^T
            return dataclasses.replace(known_right, aligned=known_right.aligned and known_right.entry is None)
    elif isinstance(known_left, Rows):
        if known_left.dim == 1:  # D^T X
            if a.set_x(right, transposed=False):
                return a.leave(node, left, transposed=True, sums=False)
        elif len(shape_of(left)) == 2:  # D A
            return dataclasses.replace(known_left, aligned=known_left.aligned and known_left.entry is None)
    raise NoMatchError(f"{node} is no product with X")


def _addmm(a: Analysis, node: fx.Node) -> Any:
    (_, known_bias), (left, known_left), (_, known) = a.operands(node)[:3]
    fits = (
        not node.kwargs
        and isinstance(known_bias, Flat)
        and isinstance(known, Flat)
        and known_left is None
        and known.is_params
        and known_bias.is_params
        and not known.rows
        and known_bias.params.numel() == known.params.shape[1]
        and a.set_x(left, transposed=False)
    )
    if not fits or (known_bias.params < 0).any():
        raise NoMatchError(f"{node} is no X W + b")
    rows = a.enter(node, known.params.T, transposed=False)
    a.entries[-1].bias = known_bias.params.reshape(-1)
    return rows


def _sum(a: Analysis, node: fx.Node) -> Any:
    source = node.args[0]
    known = a.known.get(source)
    if not isinstance(known, Rows) or node.kwargs:
        raise NoMatchError(f"{node} sums something else than row values")
    shape = shape_of(source)
    given = node.args[1] if len(node.args) > 1 else None
    dims = {d % len(shape) for d in given} if given else set(range(len(shape)))
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    if known.dim in dims:
        others = dims - {known.dim}
        if len(shape) > 2 or any(not same(shape[d], 1) for d in others) or not a.exits:
            raise NoMatchError(f"{node} sums over rows and more")
        return a.leave(node, source, transposed=known.dim == 1, sums=True)
    dim = known.dim if keep else known.dim - sum(d < known.dim for d in dims)
    if known.entry is None:
        return dataclasses.replace(known, dim=dim)
    if known.aligned and not known.row_sums:
        return Rows(dim, None, row_sums=frozenset([node]))
    return dataclasses.replace(known, dim=dim, aligned=False)


def _gather(a: Analysis, node: fx.Node) -> Rows:
    known, dim = a.known.get(node.args[0]), node.args[1]
    before = shape_of(node.args[0])
    if not isinstance(known, Rows) or node.args[2] in a.known or dim % len(before) == known.dim:
        raise NoMatchError(f"{node} picks rows")
    if not same(before[known.dim], shape_of(node)[known.dim]):
        raise NoMatchError(f"{node} takes some of the rows")
    return dataclasses.replace(known, aligned=known.aligned and known.entry is None)


def _split(a: Analysis, node: fx.Node) -> list[Flat]:
    known = a.known.get(node.args[0])
    if not isinstance(known, Flat) or known.rows:
        raise NoMatchError(f"{node} splits something else than parameters")
    args = node.args[1:]
    return [Flat(p, s) for p, s in zip(node.target(known.params, *args), node.target(known.sums, *args), strict=True)]


def _getitem(a: Analysis, node: fx.Node) -> Any:
    parts = a.known.get(node.args[0])
    if not isinstance(parts, list):
        raise NoMatchError(f"{node} takes a part of something unknown")
    return parts[node.args[1]]


def _cat(a: Analysis, node: fx.Node) -> Flat:
    parts = []
    for part in node.args[0]:
        known = a.known.get(part)
        if known is None:  # the product is linear in v, so this is zero
            none = torch.full(static_shape(part), -1)
            known = Flat(none, none)
        if not isinstance(known, Flat) or known.rows:
            raise NoMatchError(f"{node} joins something else than parameters")
        parts.append(known)
    args = node.args[1:]
    return Flat(torch.cat([p.params for p in parts], *args), torch.cat([p.sums for p in parts], *args))


_RULES: dict[Any, Callable[[Analysis, fx.Node], Any]] = {
    **dict.fromkeys(_SCALED | {aten.mul.Tensor, aten.div.Tensor}, _elementwise),
    **dict.fromkeys(_LAYOUT, _layout),
    aten.expand.default: _expand,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.mm.default: _mm,
    aten.mv.default: _mm,
    aten.addmm.default: _addmm,
    aten.sum.dim_IntList: _sum,
    aten.sum.default: _sum,
    aten.gather.default: _gather,
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split,
    operator.getitem: _getitem,
    aten.cat.default: _cat,
}
