"""The generalized Gauss-Newton product by plain autograd: the reference for `mlopt.autodiff.gauss_newton`.

Nothing is shared with the graph version, neither how the network outputs z are found (here: calls of loss functions are
intercepted, and hand-written ones are looked for in autograd's own graph) nor the formula. From

    H = G + sum_k c_k d2 z_k/dtheta2,    c = dl/dz

follows ``G v = d/dtheta <dg/dtheta - (dz/dtheta)^T c, v>`` with c held constant: a Hessian product of the loss minus
one of the network outputs' linear part. Twice the price of a Hessian product, but two lines of algebra.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mlopt.errors import LossError

# Name of a loss function -> how many of its first arguments are network outputs.
_NAMED = {
    "binary_cross_entropy": 1,
    "binary_cross_entropy_with_logits": 1,
    "cross_entropy": 1,
    "hinge_embedding_loss": 1,
    "huber_loss": 2,
    "l1_loss": 2,
    "mse_loss": 2,
    "multi_margin_loss": 1,
    "multilabel_margin_loss": 1,
    "poisson_nll_loss": 1,
    "smooth_l1_loss": 2,
    "soft_margin_loss": 1,
}
_ARGUMENTS = ("input", "target")

# Names of autograd nodes, without "Backward" and what follows.
_CONVEX = {"Abs", "Exp", "LinalgVectorNorm", "Logsumexp", "Norm", "Softplus"}
_CONCAVE = {"LogSigmoid", "LogSoftmax"}
_ELEMENTWISE = {
    *("Add", "Alias", "Clone", "Div", "Expand", "Mul", "Neg", "Permute", "ReshapeAlias", "Rsub", "Squeeze", "Sub", "T"),
    *("ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View"),
}
_MIXING = {
    *("Cat", "Cumsum", "Diagonal", "Dot", "Flip", "Gather", "Index", "IndexSelect", "MaskedFill", "MaskedSelect"),
    *("Mean", "Select", "Slice", "Split", "SplitWithSizes", "Stack", "Sum", "Unbind", "Where"),
}
_SELECTING = {"Bmm", "Mm", "Mv", "NllLoss", "NllLoss2D", "Sort", "Topk"}  # affine, but not looked through for penalties
_AFFINE = _ELEMENTWISE | _MIXING | _SELECTING
_PRODUCTS = {"Bmm", "Dot", "Mm", "Mul", "Mv"}
_SQUARE_ROOTS = {"LinalgVectorNorm", "Norm"}

_Edge = tuple[Node, int]


def _tensors(tree: object) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a loss function: its name, the node of its result, the edges of its network outputs."""

    name: str
    node: Node
    edges: tuple[_Edge, ...]


class LossFunctionRecorder(TorchFunctionMode):
    """Notes the calls of named loss functions while it is active, and what is computed from parameters alone.

    Args:
        own: The parameters theta.

    Attributes:
        calls: The calls.
        penalties: By id, the tensors that are computed from `own` and numbers, by no other tensor.
    """

    def __init__(self, own: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.penalties = {id(p): p for p in own}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function; note it if it is a loss function."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        count = _NAMED.get(name, 0)
        if count and isinstance(result, torch.Tensor) and result.grad_fn is not None:
            given = [*args[:count], *(kwargs[key] for key in _ARGUMENTS[len(args) : count] if key in kwargs)]
            edges = [get_gradient_edge(t) for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
            self.calls.append(_Call(name, result.grad_fn, tuple((e.node, e.output_nr) for e in edges)))
        self._note_origin(name, _tensors((args, kwargs)), _tensors(result))
        return result

    def _note_origin(self, name: str, arguments: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        if all(id(t) in self.penalties for t in arguments):
            self.penalties.update({id(t): t for t in results})
            return
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        for tensor in [*results, *(arguments[:1] if in_place else ())]:
            self.penalties.pop(id(tensor), None)


def curvature_gradient(
    problem: str,
    loss: torch.Tensor,
    recorder: LossFunctionRecorder,
    own: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Return what to differentiate for Gauss-Newton products: ``dg/dtheta - (dz/dtheta)^T c``, c held constant.

    Args:
        problem: Name of the problem.
        loss: The loss g.
        recorder: What was noted while it was computed.
        own: The parameters theta.
        gradients: dg/dtheta, differentiable.

    Raises:
        LossError: No network outputs were found.
    """
    edges = [GradientEdge(*edge) for edge in _Finder(loss, recorder, own).find()]
    if not edges:
        raise LossError(
            f"problem {problem!r}: curvature='ggn' needs a convex loss function of network outputs in the loss, and "
            "none was found; use one of torch.nn.functional called in training_step, or curvature='hessian'"
        )
    first = _partial(loss, edges)
    parts = torch.autograd.grad(edges, own, first, create_graph=True, allow_unused=True)
    return [g if g is None or part is None else g - part for g, part in zip(gradients, parts, strict=True)]


def _partial(loss: torch.Tensor, edges: Sequence[GradientEdge]) -> list[torch.Tensor]:
    """Return c, the derivatives by each output with the others held fixed; `edges` in the order of computation.

    Autograd gives total ones: an output that another one is computed from acts through that one as well.
    """
    found: list[torch.Tensor] = list(torch.autograd.grad(loss, edges, retain_graph=True))
    for k in reversed(range(len(edges) - 1)):
        later = torch.autograd.grad(edges[k + 1 :], edges[k], found[k + 1 :], retain_graph=True, allow_unused=True)[0]
        if later is not None:
            found[k] = found[k] - later
    return found


class _Finder:
    """Looks for network outputs in an autograd graph, by the rules of `mlopt.autodiff.loss_functions`."""

    def __init__(self, loss: torch.Tensor, recorder: LossFunctionRecorder, own: Sequence[torch.Tensor]) -> None:
        assert loss.grad_fn is not None
        self.root = loss.grad_fn
        self.calls = recorder.calls
        self.own = {id(p) for p in own}
        self.order = _topological(self.root)
        self.depends: set[Node] = set()
        for node in self.order:
            variable = getattr(node, "variable", None)
            if id(variable) in self.own or any(n in self.depends for n, _ in node.next_functions):
                self.depends.add(node)
        self.penalties: set[Node] = set()
        for tensor in recorder.penalties.values():
            if tensor.grad_fn is not None and tensor.grad_fn in self.depends:
                self.penalties.update(_topological(tensor.grad_fn))

    def find(self) -> list[_Edge]:
        """Return the edges of z in the order of computation."""
        position = {node: i for i, node in enumerate(self.order)}
        starts = [(edge, call.name) for call in self.calls if call.node in self.depends for edge in call.edges]
        found = {
            self._upward(edge, name) for edge, name in [*starts, *self._written_by_hand()] if edge[0] in self.depends
        }
        return sorted(
            (e for e in found if e[0] not in self.penalties and not self._is_affine(e[0])),
            key=lambda e: (position[e[0]], e[1]),
        )

    def _operands(self, node: Node) -> list[_Edge]:
        return [(n, i) for n, i in node.next_functions if n in self.depends]

    def _written_by_hand(self) -> Iterator[tuple[_Edge, str]]:
        called = {call.node for call in self.calls}
        seen, stack = set(), [(self.root, 1)]
        while stack:
            node, sign = stack.pop()
            if (node, sign) in seen or node not in self.depends or node in called:
                continue
            seen.add((node, sign))
            if (_is_convex(node) and sign > 0) or (_name(node) in _CONCAVE and sign < 0):
                yield self._operands(node)[0], "square" if _is_square(node) else _name(node)
            elif self._is_affine_here(node, _AFFINE):
                for i, (n, _) in enumerate(node.next_functions):
                    if n in self.depends:
                        stack.append((n, sign * _sign(node, i)))

    def _is_affine_here(self, node: Node, allowed: set[str]) -> bool:
        name, operands = _name(node), self._operands(node)
        if name not in allowed:
            return False
        if name in _PRODUCTS:
            return len(operands) == 1
        return name != "Div" or operands == [node.next_functions[0]]

    def _upward(self, edge: _Edge, function: str) -> _Edge:
        while True:
            node = edge[0]
            operands = self._operands(node)
            if (
                (len(operands) == 1 and self._is_affine_here(node, _ELEMENTWISE))
                or (function == "binary_cross_entropy" and _name(node) == "Sigmoid")
                or (function == "square" and _name(node) in _SQUARE_ROOTS)
            ):
                (edge,) = operands
            else:
                return edge

    def _is_affine(self, root: Node) -> bool:
        seen, stack = set(), [root]
        while stack:
            node = stack.pop()
            if node in seen or node not in self.depends:
                continue
            seen.add(node)
            if not node.next_functions:  # a parameter
                continue
            if not self._is_affine_here(node, _ELEMENTWISE | _MIXING):
                return False
            stack += [n for n, _ in node.next_functions if n is not None]
        return True


def _topological(root: Node) -> list[Node]:
    """Return all nodes of an autograd graph, inputs first."""
    order: list[Node] = []
    done: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in done:
            done.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None and n not in done]
    return order


def _name(node: Node) -> str:
    return re.sub(r"Backward\d*$", "", node.name())


def _is_square(node: Node) -> bool:
    if _name(node) == "Pow":
        return getattr(node, "_saved_exponent", None) in (2, 4)
    edges = node.next_functions
    return _name(node) in ("Dot", "Mul") and len(edges) == 2 and edges[0] == edges[1]


def _is_convex(node: Node) -> bool:
    return _name(node) in _CONVEX or _is_square(node)


def _sign(node: Node, operand: int) -> int:
    name = _name(node)
    if name in ("Neg", "NllLoss", "NllLoss2D"):
        return -1
    if name == "Sub":
        return 1 if operand == 0 else -1
    if name == "Rsub":
        return -1 if operand == 0 else 1
    if name in ("Mul", "Div"):
        for saved in ("_saved_other", "_saved_self"):
            factor = getattr(node, saved, None)
            if isinstance(factor, torch.Tensor) and factor.ndim == 0 and not factor.requires_grad:
                factor = factor.item()
            if isinstance(factor, int | float) and factor < 0:
                return -1
    return 1
