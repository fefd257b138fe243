"""Erase additions of zeros and multiplications by ones.

Differentiating twice leaves many: the second derivative of a ReLU adds a tensor of zeros, that of ``x ** 2`` multiplies
by ``x ** 0``. Where they are kept between the primal and the tangent half they also take memory, as much as an
activation each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_FILLED = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
}
_FILLED_WITH = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}  # position of the value
_SAME_ELEMENTS = {
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.expand.default,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten._unsafe_view.default,
}
_ADD = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}
_MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
_COMMUTE = {aten.add.Tensor, aten.mul.Tensor}


def remove_neutral_operands_pass(module: fx.GraphModule) -> fx.GraphModule:
    """Erase ``x + 0``, ``x - 0``, ``x * 1`` and ``x / 1``, where 0 and 1 are numbers or tensors that are full of them.

    The result is bit for bit the same but for the sign of a zero. A product with zeros stays: it tells NaN.
    """
    constants: dict[fx.Node, float] = {}
    erased = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        source = _kept_operand(node, constants)
        if source is not None:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            erased += 1
            continue
        value = _constant_of(node, constants)
        if value is not None:
            constants[node] = value
    if erased:
        module.graph.lint()
        module.recompile()
    return module


def _constant_of(node: fx.Node, constants: dict[fx.Node, float]) -> float | None:
    """Return the number that a tensor is full of, if it is 0 or 1."""
    value: Any = None
    if node.target in _FILLED:
        value = _FILLED[node.target]
    elif node.target in _FILLED_WITH:
        value = node.args[_FILLED_WITH[node.target]]
    elif node.target in _SAME_ELEMENTS:
        return constants.get(node.args[0])
    elif node.target is aten.pow.Tensor_Scalar and _number(node.args[1], constants) == 0:
        value = 1  # of NaN, too
    return value if isinstance(value, bool | int | float) and value in (0, 1) else None


def _kept_operand(node: fx.Node, constants: dict[fx.Node, float]) -> fx.Node | None:
    """Return the operand that a call returns unchanged."""
    if node.target in _ADD:
        neutral = 0
    elif node.target in _MULTIPLY:
        neutral = 1
    else:
        return None
    if set(node.kwargs) - {"alpha"}:
        return None
    a, b, *_ = node.args  # a third is the alpha of add.Scalar: of no matter where b is 0
    if isinstance(a, fx.Node) and _number(b, constants) == neutral and _is_like(node, a):
        return a
    if node.target in _COMMUTE and not node.kwargs and isinstance(b, fx.Node):
        return b if _number(a, constants) == neutral and _is_like(node, b) else None
    return None


def _number(value: Any, constants: dict[fx.Node, float]) -> float | None:
    if isinstance(value, fx.Node):
        return constants.get(value)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is_like(node: fx.Node, source: fx.Node) -> bool:
    """Whether a tensor has the sizes, strides, dtype and device of another."""
    x, y = node.meta.get("val"), source.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if x.dtype != y.dtype or x.device != y.device or x.layout != torch.strided or y.layout != torch.strided:
        return False
    pairs = ((x.shape, y.shape), (x.stride(), y.stride()))
    return all(list(map(_expression, a)) == list(map(_expression, b)) for a, b in pairs)


def _expression(size: Any) -> Any:
    """Return what can be compared without adding a guard on a free size."""
    return size.node.expr if isinstance(size, torch.SymInt) else size
