"""Find the loss functions in a captured graph, and the network outputs that they are functions of.

A generalized Gauss-Newton product needs the loss as ``g = l(z(theta), theta)`` with l convex in z. Nothing declares z,
so it is read off the graph, in two ways:

- *named* loss functions (`aten.cross_entropy_loss`, `aten.mse_loss`, ...) anywhere in the graph: z is their first
  input, or both where the function is one of their difference;
- losses *written by hand*: a convex function (a square, logsumexp, ...), or a concave one with a minus sign (a
  log-softmax under `nll_loss` or times a target, a log-sigmoid), whose result reaches the loss through affine
  operations only. The sign is followed through negations, differences and factors that are plain numbers; other
  factors (weights, masks, targets) are taken to be non-negative.

From the input of such a function z is looked for upward through element-wise affine operations and changes of shape, so
that ``logsumexp(z / 2) - z[y] / 2`` is one function of one z. No cut is made where z is computed from the parameters
alone (a penalty), nor where it is an affine function of them (its Gauss-Newton product is its Hessian product): these
terms have exact products.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import fx

from mlopt.autodiff.split import dependents
from mlopt.capture.normalize import alias_bases, depends_on, written_arguments
from mlopt.capture.record import InputRole, LossGraph
from mlopt.errors import LossError

#: Named loss functions -> how many of their first arguments z consists of.
NAMED_LOSSES = {
    "binary_cross_entropy": 1,
    "binary_cross_entropy_with_logits": 1,
    "cross_entropy_loss": 1,
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

_CONVEX = {"abs", "exp", "linalg_vector_norm", "logsumexp", "norm", "softplus", "square"}
_CONCAVE = {"log_sigmoid", "log_softmax", "_log_softmax"}

# Element-wise affine functions of one operand, and changes of shape.
_SHAPES = {
    *("alias", "clone", "contiguous", "expand", "expand_as", "flatten", "movedim", "permute", "ravel", "reshape"),
    *("squeeze", "swapaxes", "t", "to", "_to_copy", "transpose", "type_as", "unflatten", "_unsafe_view", "unsqueeze"),
    *("numpy_T", "view", "view_as"),
}
_ELEMENTWISE = {"add", "broadcast_tensors", "div", "mul", "neg", "rsub", "sub", "true_divide", *_SHAPES}
# Affine functions that mix elements.
_AFFINE = {
    *("cat", "chunk", "concat", "concatenate", "cumsum", "diagonal", "dot", "einsum", "flip", "gather", "hstack"),
    *("index", "index_select", "masked_fill", "masked_select", "matmul", "mean", "mv", "narrow", "nll_loss"),
    *("nll_loss2d", "nll_loss_nd", "kl_div", "select", "slice", "sort", "split", "split_with_sizes", "stack", "sum"),
    *("sum_to_size", "take_along_dim", "topk", "unbind", "vstack", "where", *_ELEMENTWISE),
}
_PRODUCTS = {"dot", "einsum", "matmul", "mul", "mv"}  # affine if one operand depends on the parameters
_FIRST_ONLY = {"div", "kl_div", "nll_loss", "nll_loss2d", "nll_loss_nd", "true_divide"}  # affine in the first operand
_FLIPPING = {"kl_div", "neg", "nll_loss", "nll_loss2d", "nll_loss_nd"}


def network_outputs(loss: LossGraph) -> list[fx.Node]:
    """Return the nodes z of a loss graph, in graph order.

    Raises:
        LossError: No loss function was found, or those found are functions of the parameters alone.
    """
    return _Finder(loss).find()


class _Finder:
    def __init__(self, loss: LossGraph) -> None:
        self.problem = loss.problem
        self.graph = loss.module.graph
        self.placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        self.own = set(loss.positions(InputRole.OWN))
        self.from_parameters = _computed_from_parameters(loss)
        self.depends = functools.lru_cache(maxsize=None)(self._depends)

    def find(self) -> list[fx.Node]:
        root = next(n for n in self.graph.nodes if n.op == "output").args[0][0]
        functions = self._functions(root)
        cuts = {z for f, arguments in functions.items() for a in arguments for z in [self._upward(a, f)]}
        curved = {z for z in cuts if z not in self.from_parameters and not self._is_affine(z)}
        if not curved:
            found = ", ".join(dict.fromkeys(_name(f) for f in functions))
            raise LossError(
                f"problem {self.problem!r}: curvature='ggn' needs a convex loss function of network outputs in the "
                "loss, and "
                + (f"those found ({found}) are functions of the parameters alone" if found else "none was found")
                + f". Looked for: {', '.join(sorted(NAMED_LOSSES))}, nll_loss and kl_div of a log_softmax, and sums of "
                "squares, logsumexp, -log_softmax, -log_sigmoid, softplus, exp, abs and norms written by hand. Use one "
                "of them, or curvature='hessian'"
            )
        self._check_cuts(curved)
        return [n for n in self.graph.nodes if n in curved]

    def _depends(self, node: fx.Node) -> bool:
        """Whether a node has a derivative with respect to an own parameter."""
        return bool(depends_on(node, self.placeholders) & self.own)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the inputs that depend on the own parameters, one that is used twice two times."""
        found: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), found.append)
        return [n for n in found if self.depends(n)]

    def _functions(self, root: fx.Node) -> dict[fx.Node, list[fx.Node]]:
        """Return the loss functions, and the arguments of each that z is looked for in."""
        named = [n for n in self.graph.nodes if _name(n) in NAMED_LOSSES and self.depends(n)]
        found = {}
        for node in (named[i] for i in sorted(depends_on(root, named))):
            arguments = [a for a in node.args[: NAMED_LOSSES[_name(node)]] if isinstance(a, fx.Node)]
            found[node] = [a for a in arguments if self.depends(a)]
        seen, stack = set(), [(root, 1)]
        while stack:
            node, sign = stack.pop()
            if (node, sign) in seen or node in found or not self.depends(node):
                continue
            seen.add((node, sign))
            if (_is_convex(node) and sign > 0) or (_name(node) in _CONCAVE and sign < 0):
                found[node] = self._operands(node)[:1]
            elif self._is_affine_here(node, _AFFINE):
                stack += [(n, sign * _sign(node, n)) for n in self._operands(node)]
        return found

    def _is_affine_here(self, node: fx.Node, allowed: set[str]) -> bool:
        """Whether a node is an affine function of those of its inputs that depend on the parameters."""
        name, operands = _name(node), self._operands(node)
        if name == "getitem":
            return _name(node.args[0]) in allowed and (_name(node.args[0]) not in ("sort", "topk") or node.args[1] == 0)
        if name not in allowed:
            return False
        if name in _PRODUCTS:
            return len(operands) == 1
        if name in _FIRST_ONLY:
            return operands == [node.args[0]]
        return True

    def _upward(self, node: fx.Node, function: fx.Node) -> fx.Node:
        """Return z, starting from an argument of a loss function."""
        while True:
            operands = self._operands(node)
            if _name(node) == "getitem" and _name(node.args[0]) == "broadcast_tensors":
                node = node.args[0].args[0][node.args[1]]
            elif (
                (len(operands) == 1 and self._is_affine_here(node, _ELEMENTWISE))
                or (_name(function) == "binary_cross_entropy" and _name(node) == "sigmoid")
                # the square of a norm is a sum of squares
                or (_name(function) in ("mul", "pow", "square") and _name(node) in ("linalg_vector_norm", "norm"))
            ):
                (node,) = operands
            else:
                return node

    def _is_affine(self, root: fx.Node) -> bool:
        """Whether a node is an affine function of the own parameters (linear layers are not looked into)."""
        seen, stack = set(), [root]
        while stack:
            node = stack.pop()
            if node in seen or not self.depends(node):
                continue
            seen.add(node)
            if node.op == "placeholder":
                continue
            if not self._is_affine_here(node, _AFFINE - {"matmul", "mv", "einsum", "sort", "topk", "kl_div"}):
                return False
            stack += node.all_input_nodes
        return True

    def _check_cuts(self, cuts: set[fx.Node]) -> None:
        """Refuse cuts that a run of the graph could not make."""
        depth = 0
        for node in self.graph.nodes:
            kind = getattr(node.target, "__name__", "")
            depth += kind.endswith("_increment_nesting") - kind.endswith("_decrement_nesting")
            if node in cuts and depth:
                raise LossError(
                    f"problem {self.problem!r}: curvature='ggn' cannot be used with network outputs that are computed "
                    "inside torch.func.vmap or another torch.func transform; call the loss function outside of it, or "
                    "use curvature='hessian'"
                )
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        bases = alias_bases(self.graph)
        for cut in cuts:
            after = dependents(
                cut
            )  # these see a copy of the value at the cut; other aliases see what it was taken from
            aliases = [n for n in self.graph.nodes if bases[n] is bases[cut]]
            for writer in self.graph.nodes:
                if order[writer] <= order[cut] or bases[cut] not in {bases[a] for a in written_arguments(writer)}:
                    continue
                readers = {user for n in aliases if n not in after for user in n.users} - {cut}
                if writer not in after or any(order[reader] > order[writer] for reader in readers):
                    raise LossError(
                        f"problem {self.problem!r}: curvature='ggn' cannot follow the in-place {_name(writer)}_, which "
                        f"writes to network outputs ({cut}) that are also read elsewhere; write it out of place, or "
                        "use curvature='hessian'"
                    )


def _computed_from_parameters(loss: LossGraph) -> set[fx.Node]:
    """Return the nodes that are computed from own parameters and numbers, by no other tensor."""
    own = set(loss.positions(InputRole.OWN))
    found: set[fx.Node] = set()
    position = 0
    for node in loss.module.graph.nodes:
        if node.op == "placeholder":
            if position in own:
                found.add(node)
            position += 1
        elif _name(node) == "lift_fresh_copy":  # a literal tensor
            found.add(node)
        elif node.op == "call_function":
            sizes = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)
            tensors = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), sizes)]
            if all(n in found for n in tensors):
                found.add(node)
    return found


def _name(node: fx.Node) -> str:
    """Return the operation without namespace, overload and mark of an in-place form; "" for what is no operation."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2].removesuffix("_")
    return "getitem" if node.target is operator.getitem else ""


def _is_square(node: fx.Node) -> bool:
    """Whether a node is x * x, or x . x of vectors."""
    if _name(node) not in ("mul", "dot", "matmul") or node.args[0] is not node.args[1]:
        return False
    return _name(node) == "mul" or node.meta["val"].ndim == 0


def _is_convex(node: fx.Node) -> bool:
    if _name(node) == "pow":
        return node.args[1] in (2, 4)
    return _name(node) in _CONVEX or _is_square(node)


def _sign(node: fx.Node, operand: fx.Node) -> int:
    """Return the sign with which an affine operation passes an operand on; unknown factors count as positive."""
    name = _name(node)
    if name in _FLIPPING:
        return -1
    if name == "sub":
        return -1 if operand is node.args[1] else 1
    if name == "rsub":
        return -1 if operand is node.args[0] else 1
    if name in ("mul", "div", "true_divide"):
        factors = [a for a in node.args[:2] if isinstance(a, int | float)]
        return -1 if any(a < 0 for a in factors) else 1
    return 1
