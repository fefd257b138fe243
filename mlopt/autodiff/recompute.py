"""What the primal half of a product hands over to its tangent half: a minimum cut, with recomputation.

Whatever the tangent half needs of the primal one is read again in every product, and is kept for as long as the solve
lasts. Instead of keeping a value the tangent half can compute it from others, and where that is element by element, a
compiler fuses it into the operations that read it, so that it costs nothing but what *it* reads. Which values to keep
so that the fewest bytes pass between the halves is a minimum cut of the primal graph: from what must be kept (inputs
and results of costly operations) to what the tangent half reads, the capacity of a node being its bytes (as in the
partitioner of AOTAutograd; He and Yu 2023, "Transcending runtime-memory tradeoffs in checkpointing by being fusion
aware", MLSys).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence

import networkx as nx
import torch
from torch import fx

from mlopt.autodiff.split import dependents, residuals_of
from mlopt.passes import draws_random, size_hint

_ATEN = torch.ops.aten

_CREATIONS = {
    _ATEN.full.default,
    _ATEN.full_like.default,
    _ATEN.zeros.default,
    _ATEN.zeros_like.default,
    _ATEN.ones.default,
    _ATEN.ones_like.default,
    _ATEN.scalar_tensor.default,
    _ATEN.arange.start_step,
    _ATEN.new_zeros.default,
    _ATEN.new_ones.default,
    _ATEN.new_full.default,
}
_POINTWISE = {  # without the tag
    _ATEN._to_copy.default,
    _ATEN.clone.default,
    _ATEN.where.self,
    _ATEN.threshold_backward.default,
    _ATEN.constant_pad_nd.default,
}
# On CPUs one of these costs more than reading a number.
_COSTLY = {
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sigmoid", "log_sigmoid", "softplus", "logit"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
    *("erf", "erfc", "erfinv", "lgamma", "digamma", "gelu", "elu", "celu", "selu", "silu", "mish"),
}

# Less than that fits in caches and is read faster than it is computed: measured with AOTInductor on one AVX-512 core,
# a product of a conv net with 18 MiB of residuals becomes 12 % slower, of a transformer with 14 MiB 20 %. ResNet-32
# keeps 230 in place of 808 MiB, and its product takes as long as before.
_WORTH_IT = 2**25


class Recompute(enum.IntEnum):
    """What the tangent half may compute again; every level includes those before it."""

    NOTHING = 0
    POINTWISE = 1  # cheap arithmetic element by element, and views: free where they are fused
    REDUCTIONS = 2  # exponentials and the like, sums, pooling, softmax, gathers
    PRODUCTS = 3  # everything but random numbers: convolutions and matrix products, too


@dataclasses.dataclass(frozen=True)
class SplitPolicy:
    """How a product is split into halves.

    Attributes:
        allowed: What the tangent half may compute again; of all such choices the one with the fewest bytes is taken, if
            that is much less than with no recomputation at all.
        budget: The most bytes to keep; more is computed again than `allowed` as far as that takes: first what costs
            less, then convolutions and matrix products, no more of them than needed. Random numbers are kept anyway.
    """

    allowed: Recompute = Recompute.NOTHING
    budget: int | None = None


def choose_residuals(outputs: Sequence[fx.Node], tangent: set[fx.Node], policy: SplitPolicy) -> list[fx.Node]:
    """Return the primal nodes to hand over, in graph order.

    Args:
        outputs: What the tangent half returns.
        tangent: The nodes that depend on its vector.
        policy: What to prefer.
    """
    allowed, budget = policy.allowed, policy.budget
    plain = chosen = residuals_of(outputs, tangent)
    products = [n for n in outputs[0].graph.nodes if n not in tangent and not _may_recompute(n, Recompute.REDUCTIONS)]

    def cut(level: Recompute, num_products: int = 0) -> list[fx.Node]:
        again = set(products[:num_products])
        return _minimum_cut(plain, lambda n: n in again or _may_recompute(n, level))

    if allowed is not Recompute.NOTHING:
        chosen = cut(allowed)
        if total_bytes(plain) - total_bytes(chosen) < _WORTH_IT:
            chosen = plain
    if budget is None:
        return chosen
    for level in Recompute:
        if total_bytes(chosen) <= budget:
            return chosen
        if level > allowed:
            chosen = cut(min(level, Recompute.REDUCTIONS), len(products) if level is Recompute.PRODUCTS else 0)
    # The first products of the graph, in its order: each of them is computed from the inputs through those before.
    low, high = 0, len(products)
    while low < high:
        middle = (low + high) // 2
        if total_bytes(cut(Recompute.REDUCTIONS, middle)) <= budget:
            high = middle
        else:
            low = middle + 1
    return cut(Recompute.REDUCTIONS, low)


def _minimum_cut(needed: Sequence[fx.Node], may_recompute: Callable[[fx.Node], bool]) -> list[fx.Node]:
    flow = nx.DiGraph()
    # Seen from the tangent half: of all minimum cuts the one next to it, which computes the least again.
    for node in needed:
        flow.add_edge("tangent", (node, "out"))
    stack, seen = list(needed), set(needed)
    while stack:
        node = stack.pop()
        capacity = num_bytes(node)
        flow.add_edge((node, "out"), (node, "in"), **({} if capacity is None else {"capacity": max(capacity, 1)}))
        if node.op == "placeholder" or not may_recompute(node):
            flow.add_edge((node, "in"), "primal")
            continue
        for source in node.all_input_nodes:
            flow.add_edge((node, "in"), (source, "out"))
            if source not in seen and source.op != "get_attr":
                seen.add(source)
                stack.append(source)
    if "primal" not in flow:
        return needed
    _, (near, _) = nx.minimum_cut(flow, "tangent", "primal", flow_func=nx.algorithms.flow.boykov_kolmogorov)
    kept = {node for node in seen if (node, "out") in near and (node, "in") not in near}
    return [n for n in needed[0].graph.nodes if n in kept]


def total_bytes(residuals: Sequence[fx.Node]) -> int:
    """Return the memory that residuals hold beyond the inputs, views of one tensor counted once."""
    held = {_base(n): num_bytes(_base(n)) or 0 for n in residuals}
    return sum(size for node, size in held.items() if node.op not in ("placeholder", "get_attr"))


def count_recomputed(half: fx.GraphModule) -> int:
    """Return how many operations of a tangent half do not depend on the vector, its last input; views are none."""
    *_, vector = (n for n in half.graph.nodes if n.op == "placeholder")
    tangent = dependents(vector)
    return sum(n.op == "call_function" and n not in tangent and not _is_view(n.target) for n in half.graph.nodes)


def num_bytes(node: fx.Node) -> int | None:
    """Return the bytes of a node's value, at the sizes of the example; None if it is no tensor or number."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        count = 1
        for size in value.shape:
            count *= size_hint(size)
        return count * value.element_size()
    return 8 if isinstance(value, int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool) else None


def _may_recompute(node: fx.Node, allowed: Recompute) -> bool:
    target = node.target
    if draws_random(node) or allowed is Recompute.NOTHING:
        return False
    if allowed is Recompute.PRODUCTS or not isinstance(target, torch._ops.OpOverload):
        return True
    if allowed is Recompute.POINTWISE and _name(target).removesuffix("_backward") in _COSTLY:
        return False
    if torch.Tag.pointwise in target.tags or target in _POINTWISE or target in _CREATIONS or _is_view(target):
        return True
    return allowed is Recompute.REDUCTIONS and target.namespace == "aten" and not _is_product(target)


def _is_product(target: torch._ops.OpOverload) -> bool:
    name = _name(target)
    return name in _PRODUCTS or "conv" in name or "linalg" in name or "attention" in name


_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "matmul", "linear", "einsum"}


def _name(target: torch._ops.OpOverload) -> str:
    return target._schema.name.split("::")[1]


def _is_view(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target is _ATEN._unsafe_view.default)


def _base(node: fx.Node) -> fx.Node:
    while _is_view(node.target):
        node = node.all_input_nodes[0]
    return node
