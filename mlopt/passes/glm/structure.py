"""`find_glm`: the structure of a product, and the parts of its graph that its curvature is computed by."""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mlopt.passes.extract import extract
from mlopt.passes.glm.rules import MAX_COLUMNS, Analysis
from mlopt.passes.glm.simplify import simplified
from mlopt.passes.glm.values import Entry, Exits, Flat, NoMatchError, Rows

logger = logging.getLogger(__name__)

# Key in the `meta` of a product of T tasks side by side, [T, N] -> [T, N]: the graph of one task, [N] -> [N]. All
# residuals then have the leading axis T.
ONE_TASK = "mlopt.one_task"


class GlmRowKind(enum.Enum):
    """What is known of f, by rows u of U."""

    DIAGONAL = "diagonal"  # a * u
    RANK_ONE = "rank_one"  # a * u + b (g . u)
    BLOCK = "block"  # B u


@dataclasses.dataclass(frozen=True)
class GlmStructure:
    """A product ``v [N] -> P^T (X^T f(X P v)) + diagonal * v``, and how f and the diagonal follow from the residuals.

    Attributes:
        x: Which residual X [n, D] is. It may be of a half type, where the product widens it to float32.
        dtype: Of v, and of all that is computed.
        positions: int64 [C, D], or [C, D + 1] with a bias: where the parameters of each column lie in v; -1 for the
            bias of a column that has none.
        bias: Whether there are biases.
        size: N.
        kind: What is known of f.
        has_diagonal: Whether there is a part that is diagonal in the parameters (a separable regularizer).
        tasks: Whether there are T such products side by side. All this is then about one of them.
    """

    x: int
    dtype: torch.dtype
    positions: torch.Tensor
    bias: bool
    size: int
    kind: GlmRowKind
    has_diagonal: bool
    tasks: bool
    _entries: tuple[Entry, ...]
    _middle: fx.GraphModule  # (residuals, one U per entry) -> one D per exit
    _order: torch.Tensor  # [C]: column of D that goes with each column of U
    _split: tuple[fx.GraphModule, fx.GraphModule] | None  # rank one: (residuals, U) -> (g * u, S); (.., U, S) -> D
    _exits_transposed: tuple[bool, ...]
    _diagonal: fx.GraphModule | None  # (residuals, v, X^T D and column sums) -> Hv
    _exit_shapes: tuple[tuple[int, ...], ...]

    @property
    def num_columns(self) -> int:
        """C."""
        return len(self.positions)

    @property
    def num_features(self) -> int:
        """D."""
        return self.positions.shape[1] - self.bias

    def curvature(self, residuals: Sequence[Any]) -> torch.Tensor:
        """Evaluate f: [T?, n, C], [T?, n, 3, C] or [T?, n, C, C], for `kind`.

        The middle of the graph, between X V and X^T D, is run on ones or, for blocks, on every unit vector.

        Args:
            residuals: What the primal half of the graph hands over.
        """
        return self._over_tasks(self._curvature, residuals)

    def diagonal(self, residuals: Sequence[Any]) -> torch.Tensor | None:
        """Evaluate the diagonal [T?, N], or return None where there is none."""
        return None if self._diagonal is None else self._over_tasks(self._diagonal_of_one, residuals)

    def _over_tasks(self, function: Callable[[Sequence[Any]], torch.Tensor], residuals: Sequence[Any]) -> torch.Tensor:
        if not self.tasks:
            return function(residuals)
        return torch.func.vmap(lambda *parts: function(parts))(*residuals)

    def matrix(self, residuals: Sequence[Any]) -> torch.Tensor:
        """Return X [T?, n, D]."""
        x: torch.Tensor = residuals[self.x]
        return x.squeeze(-3) if x.ndim > 2 + self.tasks else x

    def _curvature(self, residuals: Sequence[Any]) -> torch.Tensor:
        x = self._matrix_of_one(residuals)
        if self.kind is GlmRowKind.DIAGONAL:
            return self._run_middle(residuals, self._ones_like_rows(x)).contiguous()
        if self.kind is GlmRowKind.RANK_ONE:
            return self._rank_one(residuals, self._ones_like_rows(x))
        units = torch.eye(self.num_columns, dtype=self.dtype, device=x.device)
        return torch.stack([self._run_middle(residuals, e.expand(x.shape[0], -1)) for e in units], dim=-1)

    def _ones_like_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_ones(x.shape[0], self.num_columns, dtype=self.dtype)

    def _matrix_of_one(self, residuals: Sequence[Any]) -> torch.Tensor:
        x: torch.Tensor = residuals[self.x]
        return x.squeeze(0) if x.ndim == 3 else x

    def _diagonal_of_one(self, residuals: Sequence[Any]) -> torch.Tensor:
        assert self._diagonal is not None
        x = residuals[self.x]
        nothing = [x.new_zeros(shape, dtype=self.dtype) for shape in self._exit_shapes]
        result: torch.Tensor = self._diagonal(*residuals, x.new_ones(self.size, dtype=self.dtype), *nothing)[0]
        return result

    def _rank_one(self, residuals: Sequence[Any], ones: torch.Tensor) -> torch.Tensor:
        assert self._split is not None
        before, after = self._split
        (entry,), (turned,) = self._entries, self._exits_transposed
        u = _laid_out(ones, entry)
        weighted, total = before(*residuals, u)
        (a,) = after(*residuals, u, torch.zeros_like(total))
        (b,) = after(*residuals, torch.zeros_like(u), torch.ones_like(total))
        parts = [_as_rows(a, ones, turned), _as_rows(b, ones, turned), _as_rows(weighted, ones, entry.transposed)]
        return torch.stack(parts, dim=-2)

    def _run_middle(self, residuals: Sequence[Any], u: torch.Tensor) -> torch.Tensor:
        """Return D [n, C] of U [n, C], its columns in the order of those of U."""
        parts, first = [], 0
        for entry in self._entries:
            parts.append(_laid_out(u[:, first : first + len(entry.weights)], entry))
            first += len(entry.weights)
        results = self._middle(*residuals, *parts)
        rows = [_as_rows(d, u, turned) for d, turned in zip(results, self._exits_transposed, strict=True)]
        d = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return d if torch.equal(self._order, torch.arange(len(self._order))) else d[:, self._order.to(d.device)]


def find_glm(module: fx.GraphModule) -> GlmStructure | None:
    """Look at the graph ``(residuals, v [N]) -> (H v [N],)`` of a product.

    Args:
        module: The graph; of T tasks side by side, if it has `ONE_TASK` in its ``meta``.

    Returns:
        Its structure, or None where it was not proved to have it.
    """
    product = module.meta.get(ONE_TASK, module)
    if not _is_product(product):
        return None
    try:
        return _find(product, tasks=product is not module)
    except NoMatchError as reason:
        logger.debug("no GLM: %s", reason)
        return None


def _is_product(module: fx.GraphModule) -> bool:
    outputs = next(n for n in module.graph.nodes if n.op == "output").args[0]
    inputs = [n.meta.get("val") for n in module.graph.nodes if n.op == "placeholder"]
    if len(outputs) != 1 or not inputs or not isinstance(outputs[0], fx.Node):
        return False
    vector, result = inputs[-1], outputs[0].meta.get("val")
    return (
        isinstance(vector, torch.Tensor)
        and isinstance(result, torch.Tensor)
        and vector.ndim == 1
        and isinstance(vector.shape[0], int)
        and vector.is_floating_point()
        and tuple(result.shape) == tuple(vector.shape)
    )


def _find(module: fx.GraphModule, *, tasks: bool) -> GlmStructure:
    module = simplified(module)
    *residuals, vector = [n for n in module.graph.nodes if n.op == "placeholder"]
    (output,) = next(n for n in module.graph.nodes if n.op == "output").args[0]
    analysis = Analysis(vector)
    for node in module.graph.nodes:
        if node.op != "output":
            analysis.visit(node)
    exits, entries = analysis.exits, analysis.entries
    if exits is None or not exits.nodes:
        raise NoMatchError("no product with X was found")
    positions, order, bias = _positions(entries, exits, analysis.known.get(output), vector.meta["val"].shape[0])
    kind, split = _row_kind(module, residuals, analysis, order)
    assert analysis.x is not None
    has_diagonal = bool((analysis.known[output].params >= 0).any())
    return GlmStructure(
        x=residuals.index(analysis.x),
        dtype=analysis.dtype,
        positions=positions,
        bias=bias,
        size=vector.meta["val"].shape[0],
        kind=kind,
        has_diagonal=has_diagonal,
        tasks=tasks,
        _entries=tuple(entries),
        _middle=extract(module, [*residuals, *(e.node for e in entries)], exits.nodes),
        _order=order,
        _split=split,
        _exits_transposed=tuple(exits.transposed),
        _diagonal=extract(module, [*residuals, vector, *exits.found], [output]) if has_diagonal else None,
        _exit_shapes=tuple(tuple(n.meta["val"].shape) for n in exits.found),
    )


def _positions(
    entries: Sequence[Entry], exits: Exits, result: Any, size: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return where parameters lie in v, the order of the columns of D, and whether there are biases.

    H is symmetric: what reads parameter i is what its part of the product comes from. That is checked, not assumed.
    """
    if not isinstance(result, Flat) or result.rows or result.params.shape != (size,):
        raise NoMatchError("the result is not laid out like the vector")
    if not ((result.params == -1) | (result.params == torch.arange(size))).all():
        raise NoMatchError("the result mixes parameters")
    width = exits.num_features + 1
    bias = any(e.bias is not None for e in entries)
    absent = [torch.full((len(e.weights), 1), -1) if e.bias is None else e.bias[:, None] for e in entries]
    read = torch.cat([torch.cat([e.weights, b], 1) for e, b in zip(entries, absent, strict=True)])
    numbers = result.sums[result.sums >= 0]
    if len(numbers.unique()) != len(numbers):
        raise NoMatchError("one element of X^T D is used for two parameters")
    written = torch.full((exits.num_columns * width,), -1)
    written[numbers] = torch.nonzero(result.sums >= 0)[:, 0]
    written = written.view(-1, width)
    present = read[read >= 0]
    if len(present.unique()) != len(present):
        raise NoMatchError("a parameter is read twice")
    if len(read) > MAX_COLUMNS or read.shape != written.shape:
        raise NoMatchError("the columns of U and D do not go together")
    rows = {tuple(row): k for k, row in enumerate(written.tolist())}
    try:
        order = torch.tensor([rows[tuple(row)] for row in read.tolist()])
    except KeyError:
        raise NoMatchError("the parameters that are read are not those that are written") from None
    return (read if bias else read[:, :-1]).contiguous(), order, bias


def _row_kind(
    module: fx.GraphModule, residuals: Sequence[fx.Node], analysis: Analysis, order: torch.Tensor
) -> tuple[GlmRowKind, tuple[fx.GraphModule, fx.GraphModule] | None]:
    assert analysis.exits is not None
    nodes, entries = analysis.exits.nodes, analysis.entries
    if len(order) == 1:
        return GlmRowKind.DIAGONAL, None
    in_order = torch.equal(order, torch.arange(len(order)))
    if len(nodes) == 1 and len(entries) == 1 and in_order:
        (node,), (entry,) = nodes, entries
        known = analysis.known[node]
        assert isinstance(known, Rows)
        if known.aligned and known.entry is not None and not known.row_sums:
            return GlmRowKind.DIAGONAL, None
        if known.aligned and len(known.row_sums) == 1:
            (total,) = known.row_sums
            before = extract(module, [*residuals, entry.node], [total.args[0], total])
            after = extract(module, [*residuals, entry.node, total], [node])
            return GlmRowKind.RANK_ONE, (before, after)
    return GlmRowKind.BLOCK, None


def _laid_out(u: torch.Tensor, entry: Entry) -> torch.Tensor:
    """U [n, C] as the graph has it: [n, C], [C, n] or [n]."""
    if len(entry.node.meta["val"].shape) == 1:
        return u[:, 0]
    return u.T if entry.transposed else u


def _as_rows(value: torch.Tensor, like: torch.Tensor, transposed: bool) -> torch.Tensor:
    """[n, C], [C, n] or [n], with axes of size 1 anywhere, as [n, C]; `like` has as many rows."""
    n = like.shape[0]
    columns = value.numel() // n if n else like.shape[1]
    return value.reshape(columns, n).T if transposed else value.reshape(n, columns)
