"""Products of small matrices by the kernel of family `matmul`, where that is faster.

A network with a few dozen units multiplies matrices for which the call of BLAS takes several times what the arithmetic
does, and its products are most of what a Hessian-vector product costs. Which is faster is measured once per product and
machine, by the calls that a package would make, and remembered beside the packages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import os
from typing import Any

import torch
from torch import fx

from mlopt import ops
from mlopt.backends.inductor.cache import DiskCache, machine
from mlopt.backends.inductor.spec import GraphSpec
from mlopt.ops.matmul import MAX_DIM, MAX_PRODUCTS
from mlopt.passes import size_hint

aten = torch.ops.aten

# Raised when choices of an older mlopt must not be used any more: the kernel has changed.
_FORMAT = 1
_TARGET = "op:mlopt.small_mm.default"
_FARTHEST = 4096  # strides above are all alike to a measurement: every element is in a page of its own


def lower_small_products(module: fx.GraphModule, cache: DiskCache) -> tuple[fx.GraphModule, int]:
    """Replace ``A B`` and ``A B + b`` by the op `small_mm` where it is faster on this machine.

    Args:
        module: A functional graph with the values of its nodes in ``meta``.
        cache: Where choices are kept.

    Returns:
        A copy, and how many products were replaced; the graph itself, if none.
    """
    if not ops.available() or os.environ.get("MLOPT_KERNELS") == "0":
        return module, 0
    products = {node: _product(node) for node in module.graph.nodes}
    found = [node for node, product in products.items() if product is not None and product.is_faster(cache)]
    if not found:
        return module, 0
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node in (copies[n] for n in found):
        *bias, left, right = node.args
        with graph.inserting_before(node):
            product = graph.call_function(torch.ops.mlopt.small_mm.default, (left, right, *bias))
        product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    return fx.GraphModule(module, graph), len(found)


def c_shims(spec: GraphSpec) -> dict[str, Any]:
    """Return the settings of Inductor by which a package calls the kernel, if the graph has any.

    Without them it would go through an interpreter of calls, which takes longer than a small product.
    """
    if all(node.target != _TARGET for node in spec.nodes):
        return {}
    declaration = (
        "AOTITorchError aoti_torch_cpu_small_mm(AtenTensorHandle a, AtenTensorHandle b, AtenTensorHandle* bias, "
        "AtenTensorHandle* ret0)"
    )
    return {"aot_inductor.custom_ops_to_c_shims": {torch.ops.mlopt.small_mm.default: [declaration]}}


@dataclasses.dataclass(frozen=True)
class _Operand:
    """Sizes and strides of a matrix or a bias, as they were in the example."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def make(self, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(self.sizes, self.strides, strict=True))
        return torch.randn(extent, dtype=dtype, generator=generator).as_strided(self.sizes, self.strides)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What a measurement depends on besides the machine."""

    left: _Operand
    right: _Operand
    added: _Operand | None  # by torch in the same call, and
    with_bias: bool  # by the kernel, too; else it is left to the loops that follow
    dtype: torch.dtype

    def is_faster(self, cache: DiskCache) -> bool:
        """Whether the kernel is faster than torch, as remembered or measured now."""
        parts = (self, torch.get_num_threads(), machine(), _FORMAT)
        key = "small-" + hashlib.sha256(str(parts).encode()).hexdigest()
        known = cache.get_choice(key)
        if known is not None:
            return known[0] == "kernel"
        extension: Any = importlib.import_module("mlopt._C")
        generator = torch.Generator().manual_seed(0)
        left, right = (x.make(self.dtype, generator) for x in (self.left, self.right))
        added = None if self.added is None else self.added.make(self.dtype, generator)
        kernel, by_torch = extension.small_mm_times(left, right, added, self.with_bias)
        faster = bool(kernel < by_torch)
        figures = f"a product: {kernel * 1e6:.1f} us kernel, {by_torch * 1e6:.1f} us torch"
        cache.put_choice(key, "kernel" if faster else "torch", figures)
        return faster


def _product(node: fx.Node) -> _Product | None:
    """Read a product that the kernel can make."""
    if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:  # those of addmm are factors
        return None
    *bias, left, right = (_value(x) for x in node.args)
    values = [left, right, *bias]
    if any(v is None or v.device.type != "cpu" or v.dtype != values[0].dtype for v in values):
        return None
    if left.dtype not in (torch.float32, torch.float64):
        return None
    if bias and not (bias[0].ndim == 1 and _same(bias[0].shape[0], right.shape[1])):
        return None
    a, b = _operand(left), _operand(right)
    dims = (*a.sizes, b.sizes[1])
    if not 0 < min(dims) <= max(dims) <= MAX_DIM or math.prod(dims) > MAX_PRODUCTS:
        return None
    added = bias[0] if bias else _added(node)
    return _Product(a, b, None if added is None else _operand(added), bool(bias), left.dtype)


def _added(product: fx.Node) -> Any:
    """Return the matrix that Inductor would have torch add in the same call, which copies it first."""
    users = list(product.users)
    if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
        return None
    others = [_value(x) for x in users[0].args if x is not product]
    like = _value(product)
    if len(others) != 1 or others[0] is None or others[0].dtype != like.dtype or others[0].ndim != 2:
        return None
    return others[0] if all(map(_same, others[0].shape, like.shape)) else None


def _value(node: Any) -> Any:
    """Return the tensor that a node stands for, or None."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _operand(value: torch.Tensor) -> _Operand:
    strides = (min(size_hint(s), _FARTHEST) for s in value.stride())
    return _Operand(tuple(size_hint(n) for n in value.shape), tuple(strides))


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal wherever the graph is used; asks nothing of the graph."""
    return a == b if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)
