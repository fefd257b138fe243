"""`StepModel`: an optimizer step taken apart at its one ``X W`` and its one ``X^T D``; see `descent.py`."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mlopt.passes.extract import ancestors, extract
from mlopt.passes.glm.fits import FAR, SATURATED, STATE_SIZES, TOLERANCE, GlmFitKind, is_close, mean_of
from mlopt.passes.glm.rules import MAX_COLUMNS
from mlopt.passes.glm.values import NoMatchError, shape_of, static_shape

aten = torch.ops.aten

_LAYOUT = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
}
# Polynomials in their arguments.
_POLYNOMIAL = _LAYOUT | {
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.neg.default,
    aten.div.Scalar,
    aten.addcmul.default,
    aten.lerp.Scalar,
    aten.expand.default,
    aten.pow.Tensor_Scalar,  # see `_is_smooth`
    aten.div.Tensor,  # likewise
}
# Linear in each of what may depend on the state, and so polynomials, too; for rows only.
_MULTILINEAR = {
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.select.int,
    aten.slice.Tensor,
    aten.gather.default,  # by an index that is the same everywhere, like the masks below: see `_STEERING`
    aten.scatter_add.default,
    aten.where.self,
    aten.masked_fill.Scalar,
}
# Analytic functions of what they may depend on here.
_ANALYTIC = (
    _POLYNOMIAL
    | _MULTILINEAR
    | {
        aten.exp.default,
        aten.expm1.default,
        aten.log.default,
        aten.log1p.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.sigmoid_backward.default,
        aten.tanh_backward.default,
        aten._softmax.default,
        aten._log_softmax.default,
        aten.logsumexp.default,
        aten.nll_loss_forward.default,
        aten.nll_loss_backward.default,
        aten.mse_loss.default,
        aten.binary_cross_entropy_with_logits.default,
    }
)
_STEERING: dict[Any, tuple[int, ...]] = {  # arguments that must not depend on the state
    aten.gather.default: (2,),
    aten.scatter_add.default: (2,),
    aten.where.self: (0,),
    aten.masked_fill.Scalar: (1,),
}


class _Part(enum.Enum):
    """What a value that depends on the state is a function of."""

    PARAMETERS = enum.auto()  # of the state, by polynomials
    ROWS = enum.auto()  # of X W + b, by analytic functions
    SUMS = enum.auto()  # of X^T D, the column sums of D and the state, by polynomials
    OTHER = enum.auto()


class StepModel:
    """The pieces of a step.

    Args:
        module: The step.
        feedback: See `find_descent`.
        states: See `find_descent`.

    Attributes:
        dtype: Of the state.
        device: Of X.
        num_rows: n.
        num_columns: C.
        num_features: D.
        positions: See `GlmDescentStructure`, like `size`.
        size: See there.
        varying: Inputs that the pieces between the products read; X itself may be large, and is none of them.

    Raises:
        NoMatchError: The step has other paths from the state to the new state.
    """

    def __init__(
        self, module: fx.GraphModule, feedback: Sequence[tuple[int, int]], states: Sequence[Sequence[int]]
    ) -> None:
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        outputs = next(n for n in module.graph.nodes if n.op == "output").args[0]
        self._module = module
        self._present = [placeholders[feedback[k][1]] for state in states for k in state]
        self._new = [outputs[feedback[k][0]] for state in states for k in state]
        self._num_states = len(states)
        self._own = self._present[: len(states[0])]
        self._shapes = [static_shape(n) for n in self._present]
        self._others = [k for k, n in enumerate(placeholders) if n not in self._present]
        self.dtype = self._own[0].meta["val"].dtype
        if self.dtype not in (torch.float32, torch.float64) or len(self._own) > 2:
            raise NoMatchError("not the parameters of a linear model")
        if any(self._shapes[k] != self._shapes[k % len(self._own)] for k in range(len(self._shapes))):
            raise NoMatchError("velocities are not shaped like their parameters")
        if any(n.meta["val"].dtype != self.dtype for n in self._present):
            raise NoMatchError("the state has several dtypes")
        self._parts: dict[fx.Node, _Part] = dict.fromkeys(self._present, _Part.PARAMETERS)
        self._entries: list[fx.Node] = []
        self._exits: dict[fx.Node, tuple[fx.Node, bool]] = {}  # sum -> its D, and whether that is transposed
        self._bias: fx.Node | None = None  # what the bias is read from
        self._x: fx.Node | None = None
        self._weights: fx.Node | None = None  # [D, C] or [D]
        for node in module.graph.nodes:
            if node.op == "call_function" and any(n in self._parts for n in node.all_input_nodes):
                self._parts[node] = self._part(node)
        self._connect(placeholders)

    # ---- what depends on what ----

    def _part(self, node: fx.Node) -> _Part:
        parts = {self._parts[n] for n in node.all_input_nodes if n in self._parts}
        steering = [node.args[k] for k in _STEERING.get(node.target, ())]
        if _Part.OTHER in parts or any(a in self._parts for a in steering) or not _is_smooth(node, self._parts):
            return _Part.OTHER
        if parts == {_Part.PARAMETERS}:
            if self._enters(node):
                return _Part.ROWS
            return _Part.PARAMETERS if node.target in _POLYNOMIAL else _Part.OTHER
        if parts == {_Part.ROWS}:
            if self._leaves(node):
                return _Part.SUMS
            is_item = getattr(node.target, "__name__", "") == "getitem"
            return _Part.ROWS if node.target in _ANALYTIC or is_item else _Part.OTHER
        if parts == {_Part.ROWS, _Part.PARAMETERS}:
            return _Part.ROWS if self._adds_bias(node) else _Part.OTHER
        if _Part.ROWS not in parts and node.target in _POLYNOMIAL:
            return _Part.SUMS
        return _Part.OTHER

    def _enters(self, node: fx.Node) -> bool:
        """Whether a node is ``X W``, ``X w`` or ``X W + b``; noted if it is."""
        if node.target in (aten.mm.default, aten.mv.default):
            bias, (x, weights) = None, node.args
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, x, weights = node.args
        else:
            return False
        if x in self._parts or self._origin(weights) is None or (bias is not None and self._origin(bias) is None):
            return False
        self._entries.append(node)
        self._x, self._weights, self._bias = x, weights, bias
        return True

    def _adds_bias(self, node: fx.Node) -> bool:
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) > 2 or self._bias is not None:
            return False
        product, bias = node.args
        if product not in self._entries or self._origin(bias) is None or len(product.users) != 1:
            return False
        if shape_of(node) != shape_of(product) or len(shape_of(bias)) > 1:
            return False
        self._entries[self._entries.index(product)] = node
        self._bias = bias
        return True

    def _leaves(self, node: fx.Node) -> bool:
        """Whether a node is ``X^T D``, its transpose, or the column sums of D; noted if it is."""
        target, args = node.target, node.args
        if target is aten.mm.default and args[1] is self._x and args[0] in self._parts:
            self._exits[node] = (args[0], True)
        elif target in (aten.mm.default, aten.mv.default) and args[0] not in self._parts:
            if not self._is_x_transposed(args[0]):
                return False
            self._exits[node] = (args[1], False)
        elif _sums_rows(node):
            self._exits[node] = (args[0], False)
        else:
            return False
        return not node.kwargs

    def _is_x_transposed(self, node: Any) -> bool:
        swaps = node.target is aten.t.default and len(shape_of(node)) == 2
        swaps |= node.target is aten.transpose.int and {d % 2 for d in node.args[1:3]} == {0, 1}
        swaps |= node.target is aten.permute.default and [d % 2 for d in node.args[1]] == [1, 0]
        return swaps and node.args[0] is self._x and len(shape_of(self._x)) == 2

    def _origin(self, node: Any) -> fx.Node | None:
        """Return the parameter that a node is, laid out otherwise."""
        while isinstance(node, fx.Node) and node.target in _LAYOUT:
            node = node.args[0]
        return node if node in self._own else None

    def _connect(self, placeholders: Sequence[fx.Node]) -> None:
        """Check that the new state comes from one X W through one X^T D; cut the graph there."""
        if len(self._entries) != 1 or self._x is None or self._weights is None:
            raise NoMatchError(f"{len(self._entries)} products with the parameters, not one")
        rows, features = static_shape(self._x)
        self.num_features = features
        for node in self._new:
            if self._parts.get(node) not in (_Part.PARAMETERS, _Part.SUMS):
                raise NoMatchError(f"the new value {node} is no polynomial of sums and the state")
        used = ancestors(self._new)
        exits = [n for n in self._exits if n in used]
        sums = [n for n in exits if n.target in (aten.sum.dim_IntList, aten.sum.default)]
        products = [n for n in exits if n not in sums]
        if len(products) != 1 or len(sums) != len(self._own) - 1 or (self._bias is not None) != bool(sums):
            raise NoMatchError("the gradient is not one X^T D and, for a bias, one sum of D")
        weights = self._places(self._weights)
        self.positions = weights.reshape(features, -1).T
        columns = len(self.positions)
        if self._bias is not None:
            bias = self._places(self._bias).reshape(-1)
            if len(bias) != columns or self._origin(self._bias) is self._origin(self._weights):
                raise NoMatchError("not a bias per column")
            self.positions = torch.cat([self.positions, bias[:, None]], 1)
        self.positions = self.positions.contiguous()
        self.size = sum(_numel(n) for n in self._own)
        if columns > MAX_COLUMNS or sorted(self.positions.reshape(-1).tolist()) != list(range(self.size)):
            raise NoMatchError("too many columns, or parameters that are read twice or not at all")
        (product,) = products
        d, self._turned = self._exits[product]
        if self._x.meta["val"].dtype != self.dtype or _numel(product) != columns * features:
            raise NoMatchError("X is of another dtype or size")
        if any(_numel(n) != columns for n in sums):
            raise NoMatchError("the sums are not those of the columns")
        self.num_rows, self.num_columns = rows, columns
        self._product_shape = static_shape(product)
        self._sum_shapes = [static_shape(n) for n in sums]
        self._entry_shape = static_shape(self._entries[0])
        others = [placeholders[k] for k in self._others]
        ds = [d, *(self._exits[n][0] for n in sums)]
        self._middle = extract(self._module, [*others, self._entries[0]], ds)
        self._outer = extract(self._module, [*others, *self._present, product, *sums], self._new)
        self._matrix = extract(self._module, others, [self._x])
        self.device = self._x.meta["val"].device
        read = [zip(self._others, m.graph.nodes, strict=False) for m in (self._middle, self._outer)]
        self.varying = {k for pairs in read for k, node in pairs if node.users}

    def _places(self, node: fx.Node) -> torch.Tensor:
        """Return where the elements of a parameter, laid out otherwise, lie in the vector of all parameters."""
        origin = self._origin(node)
        assert origin is not None
        first = sum(_numel(n) for n in self._own[: self._own.index(origin)])
        index = torch.arange(first, first + _numel(origin)).view(static_shape(origin))
        places: torch.Tensor = extract(self._module, [origin], [node])(index)[0]
        return places

    # ---- the pieces as functions ----

    def matrix(self, inputs: Sequence[Any]) -> torch.Tensor:
        """Return X [n, D]."""
        x: torch.Tensor = self._matrix(*self._given(inputs))[0]
        return x

    def _given(self, inputs: Sequence[Any]) -> list[Any]:
        return [inputs[k] for k in self._others]

    def residuals(self, inputs: Sequence[Any], u: torch.Tensor) -> list[torch.Tensor]:
        """Return D [n, C] of U [n, C], as each exit reads it."""
        results = self._middle(*self._given(inputs), u.reshape(self._entry_shape))
        turned = [self._turned, *(False for _ in self._sum_shapes)]
        return [
            d.reshape(self.num_columns, self.num_rows).T if t else d.reshape(self.num_rows, self.num_columns)
            for d, t in zip(results, turned, strict=True)
        ]

    def is_finite(self, inputs: Sequence[Any]) -> bool:
        """Whether D and the new state are finite."""
        u = torch.ones((self.num_rows, self.num_columns), dtype=self.dtype, device=self.device)
        return all(bool(t.isfinite().all()) for t in [*self.residuals(inputs, u), self.coefficients(inputs)])

    def tables(self, kind: GlmFitKind, inputs: Sequence[Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales and targets, if D is ``scales * mean - targets``: D where the mean is 0, and where it is 1."""
        shape = (self.num_rows, self.num_columns)

        def at(*value: float) -> torch.Tensor:
            full = [torch.full((self.num_rows,), v, dtype=dtype, device=self.device) for v in value]
            return self.residuals(inputs, torch.stack(full, 1).expand(shape))[0]

        if kind is not GlmFitKind.SOFTMAX:
            # A difference of nearby values would lose the digits that large targets take.
            low, high, size = (0.0, FAR, FAR) if kind is GlmFitKind.LINEAR else (-SATURATED, SATURATED, 1.0)
            zero = at(*[low] * self.num_columns)
            return ((at(*[high] * self.num_columns) - zero) / size).contiguous(), zero.neg().contiguous()
        rest = (0.0,) * (self.num_columns - 2)
        first, second = at(SATURATED, 0.0, *rest), at(0.0, SATURATED, *rest)
        zero = torch.cat([second[:, :1], first[:, 1:]], 1)
        return (first[:, :1] - zero[:, :1]).expand(shape).contiguous(), zero.neg().contiguous()

    def coefficients(self, inputs: Sequence[Any]) -> torch.Tensor:
        """Return the coefficients of the new state, [states, states + 2, N] float64; see `GlmDescentStructure`."""
        given, device = self._given(inputs), self.device

        def at(state: int, product: float = 0.0) -> torch.Tensor:
            values = [float(k == state) for k in range(self._num_states) for _ in self._own]
            shapes = [*self._shapes, self._product_shape, *self._sum_shapes]
            values += [product] * (1 + len(self._sum_shapes))
            filled = [torch.full(s, v, dtype=torch.float64, device=device) for s, v in zip(shapes, values, strict=True)]
            return self._increments(filled, self._outer(*given, *filled))

        zero = at(-1)
        moved = [at(k) - zero for k in range(self._num_states)]
        return torch.stack([zero, *moved, at(-1, 1.0) - zero], 1)

    def _increments(self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the new state [states, N], less the old one where it is the parameters."""
        parts = [
            (new - old if k < len(self._own) else new).reshape(-1)
            for k, (old, new) in enumerate(zip(before, after, strict=False))
        ]
        return torch.cat(parts).view(self._num_states, self.size)

    # ---- the formulas, compared with the pieces at random ----

    def is_affine(
        self,
        inputs: Sequence[Any],
        coefficients: torch.Tensor,
        state: torch.Tensor,
        sums: torch.Tensor,
        tolerance: float,
    ) -> torch.Tensor:
        """Whether the new state is what the coefficients say, at a state [states, N] and sums [C, D] or [C, D + 1]."""
        positions = self.positions.to(state.device)
        g = state.new_zeros(self.size).scatter(0, positions.reshape(-1), sums.reshape(-1))
        parts = state.reshape(-1).split([int(torch.Size(s).numel()) for s in self._shapes])
        present = [p.view(s) for p, s in zip(parts, self._shapes, strict=True)]
        product = sums[:, : self.num_features]
        leaving = [(product if self._turned else product.T).contiguous().view(self._product_shape)]
        leaving += [sums[:, -1].contiguous().view(s) for s in self._sum_shapes]
        got = self._increments(present, self._outer(*self._given(inputs), *present, *leaving))
        terms = coefficients * torch.stack([torch.ones_like(g), *state, g])
        return is_close(got, terms.unbind(1), tolerance, 4e-16 * state.abs())  # an increment is a difference

    def fits(
        self,
        kind: GlmFitKind,
        inputs: Sequence[Any],
        u: torch.Tensor,
        scales: torch.Tensor,
        targets: torch.Tensor,
        tolerance: float,
    ) -> torch.Tensor:
        """Whether D at rows U [n, C] is what the tables say, as each exit reads it."""
        terms = [scales * mean_of(kind, u), -targets]
        # Where a mean vanishes, to a part of the size that it may have.
        slack = 0.0 if kind is GlmFitKind.LINEAR else tolerance * scales.abs()
        return torch.stack([is_close(d, terms, tolerance, slack) for d in self.residuals(inputs, u)]).all()

    def check_coefficients(self, inputs: Sequence[Any]) -> None:
        """Compare the new state with the affine function of the old one that `coefficients` says it is."""
        coefficients, generator = self.coefficients(inputs), torch.Generator().manual_seed(0)
        for size in STATE_SIZES:
            shapes = (self._num_states, self.size), tuple(self.positions.shape)
            state, sums = (
                size * torch.randn(s, generator=generator, dtype=torch.float64).to(self.device) for s in shapes
            )
            same = self.is_affine(inputs, coefficients, state, sums, TOLERANCE)
            if coefficients.dtype != torch.float64 or not bool(same):
                raise NoMatchError("the new state is not affine in state and gradient, element by element")

    def has_kind(self, kind: GlmFitKind, inputs: Sequence[Any]) -> bool:
        """Whether D is ``scales * mean - targets`` for this mean, of every row by itself."""
        if kind is GlmFitKind.SOFTMAX and self.num_columns < 2:
            return False
        if kind is GlmFitKind.LINEAR and not self._is_polynomial:
            return False
        given = [
            t.double() if k in self.varying and isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for k, t in enumerate(inputs)
        ]
        scales, targets = self.tables(kind, given, torch.float64)
        generator = torch.Generator().manual_seed(0)
        for size in kind.sizes:
            shape = self.num_rows, self.num_columns
            u = size * 2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device)
            if scales.dtype != torch.float64 or not bool(self.fits(kind, given, u, scales, targets, TOLERANCE)):
                return False
        return True

    @property
    def _is_polynomial(self) -> bool:
        """Whether D is made of X W by polynomials."""
        entry = list(self._middle.graph.nodes)[len(self._others)]
        depends = {entry}
        for node in self._middle.graph.nodes:
            if node.op == "call_function" and depends.intersection(node.all_input_nodes):
                divides = node.target is aten.div.Tensor and node.args[1] in depends
                if divides or node.target not in _POLYNOMIAL | _MULTILINEAR:
                    return False
                depends.add(node)
        return True


def _is_smooth(node: fx.Node, parts: Mapping[fx.Node, _Part]) -> bool:
    """Whether a power is a polynomial, and no quotient one of parameters; the lists have nothing else that is not."""
    if node.target is aten.pow.Tensor_Scalar:
        exponent = node.args[1]
        return isinstance(exponent, int | float) and float(exponent).is_integer() and exponent >= 0
    if node.target is aten.div.Tensor:
        return parts.get(node.args[1]) in (None, _Part.ROWS) and not node.kwargs
    return True


def _sums_rows(node: fx.Node) -> bool:
    """Whether a node is the sum of a matrix or vector over its first axis."""
    if node.target is aten.sum.dim_IntList:
        return list(node.args[1]) == [0] and len(shape_of(node.args[0])) <= 2
    return node.target is aten.sum.default and len(shape_of(node.args[0])) == 1


def _numel(node: fx.Node) -> int:
    return int(torch.Size(static_shape(node)).numel())
