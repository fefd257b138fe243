"""Generalized Gauss-Newton products, in place of Hessian products.

Write the loss as ``g(theta) = l(z(theta), theta)`` with z the network outputs (`loss_functions.py` says which values
these are) and J = dz/dtheta. The Hessian is

    H = [J; I]^T (d2 l / d(z, theta)^2) [J; I]  +  sum_k (dl/dz_k) d2 z_k/dtheta2

and the generalized Gauss-Newton matrix G is its first part (Schraudolph 2002, "Fast curvature matrix-vector products";
Martens 2020, arXiv 1412.1193, section 8). z counts as an independent input of l. Where l is convex in z, and theta
reaches it no other way, G is positive semi-definite, whatever the network. Terms in which theta reaches the loss past z
(weight decay) keep their exact second derivative. Mixed products stay exact: they use the whole loss.

One evaluation of the loss gives everything. When it comes to a node of z, the value is kept and a new leaf goes on in
its place, so the loss that comes out is l as a function of the leaves and theta. Then, with u a dummy,

    J v = d/du <J^T u, v>     (twice reverse; not all operations have a forward derivative)
    h   = d/d(z, theta) <dl/d(z, theta), (J v, v)>
    G v = J^T h_z + h_theta.

J^T u is linear in u, so nothing of it but its derivative stays in the graph. An output may be computed from another one
(deep supervision); J^T then goes through the leaves, last ones first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mlopt.autodiff.loss_functions import network_outputs
from mlopt.autodiff.loss_scale import scaled
from mlopt.capture.record import LossGraph
from mlopt.precision import autocast

_Tensors = Sequence[torch.Tensor]


class CutLoss:
    """A loss evaluated as ``l(leaves, theta)``, together with the pullback of its network outputs.

    Args:
        loss: The captured loss.
        values: What to call it with, as made by `mlopt.autodiff.gradient.prepare`.

    Attributes:
        value: The loss, 0-d; with a loss scale, times that.
        outputs: The network outputs z, as functions of the parameters and of the leaves of outputs before them.
        leaves: The leaves that went on in their place.

    Raises:
        LossError: The graph has no network outputs.
    """

    def __init__(self, loss: LossGraph, values: _Tensors) -> None:
        nodes = network_outputs(loss)
        interpreter = _CuttingInterpreter(loss.module, nodes)
        with autocast(loss.precision, values[0].device):
            result = interpreter.run(*values)
        self.value: torch.Tensor = scaled(loss, values, result[0])
        self.outputs = [interpreter.outputs[n] for n in nodes]
        self.leaves = [interpreter.leaves[n] for n in nodes]
        self._groups = _groups(nodes)

    def pullback(self, cotangents: Sequence[torch.Tensor | None], inputs: _Tensors) -> list[torch.Tensor | None]:
        """Return ``(dz/dinputs)^T u``, differentiable; None for what z does not depend on."""
        pending = list(cotangents)
        result: list[torch.Tensor | None] = [None] * len(inputs)
        for i, group in enumerate(self._groups):
            earlier = [k for g in self._groups[i + 1 :] for k in g]
            targets = [*inputs, *(self.leaves[k] for k in earlier)]
            outputs = [(self.outputs[k], pending[k]) for k in group]
            parts = grad(outputs, targets)
            result = [_add(a, b) for a, b in zip(result, parts, strict=False)]
            for k, part in zip(earlier, parts[len(inputs) :], strict=True):
                pending[k] = _add(pending[k], part)
        return result


def second_order_products(
    cut: CutLoss, own: _Tensors, vectors: _Tensors, reads: _Tensors
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Return ``G v`` and the exact mixed product ``(d2g/dr dtheta)^T v``.

    Args:
        cut: The loss.
        own: The parameters theta.
        vectors: v, one tensor for each of them.
        reads: The parameters r.

    Returns:
        One tensor, or None for zeros, per parameter of `own`, and per parameter of `reads`.
    """
    leaves, n = cut.leaves, len(cut.leaves)
    first = grad([(cut.value, torch.ones_like(cut.value))], [*leaves, *own])
    by_output, direct = first[:n], first[n:]
    dummies = [torch.zeros_like(z).requires_grad_() for z in cut.outputs]
    tangents = grad(list(zip(cut.pullback(dummies, own), vectors, strict=True)), dummies)
    curved = grad(list(zip(first, [*tangents, *vectors], strict=True)), [*leaves, *own])
    gauss_newton = [_add(a, b) for a, b in zip(cut.pullback(curved[:n], own), curved[n:], strict=True)]
    if not reads:
        return gauss_newton, []
    gradient = [_add(a, b) for a, b in zip(cut.pullback(by_output, own), direct, strict=True)]
    partial = grad(list(zip(gradient, vectors, strict=True)), [*reads, *leaves])
    m = len(reads)
    mixed = [_add(a, b) for a, b in zip(partial[:m], cut.pullback(partial[m:], reads), strict=True)]
    return gauss_newton, mixed


def grad(
    outputs: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]], inputs: _Tensors
) -> list[torch.Tensor | None]:
    """Return the derivative of ``sum <output, cotangent>``, itself differentiable; None stands for zeros."""
    pairs = [(y, u) for y, u in outputs if y is not None and u is not None and y.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [y for y, _ in pairs],
            inputs,
            [u for _, u in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )


class _CuttingInterpreter(fx.Interpreter):
    """Runs a loss graph; hands new leaves on in place of the given nodes."""

    def __init__(self, module: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
        super().__init__(module)
        self.outputs: dict[fx.Node, torch.Tensor] = dict.fromkeys(nodes, torch.empty(0))
        self.leaves: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self.outputs:
            return value
        self.outputs[n] = value
        self.leaves[n] = value.detach().requires_grad_()
        return self.leaves[n].clone()  # the loss may write to it


def _groups(nodes: Sequence[fx.Node]) -> list[list[int]]:
    """Sort positions of nodes into groups, last ones first, so that no node depends on another of its group."""
    position = {node: k for k, node in enumerate(nodes)}
    depth: dict[fx.Node, int] = {}  # number of given nodes on the longest path that ends here
    for node in nodes[0].graph.nodes:
        before = max((depth[n] for n in node.all_input_nodes), default=0)
        depth[node] = before + (node in position)
    depths = sorted({depth[node] for node in nodes}, reverse=True)
    return [[position[node] for node in nodes if depth[node] == d] for d in depths]


def _add(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
