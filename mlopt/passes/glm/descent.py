"""`find_descent`: the structure of an optimizer step on a loss that reads its parameters through ``X W + b``.

A step is then, for as long as the batch and everything else stay what they are,

    g = X^T D, D = scales * mean(X W + b) - targets      (and the column sums of D, for b)
    new state = an affine function of state and g, element by element

with mean the identity (least squares), the sigmoid (logistic regression) or the softmax of a row: the gradient of an
exponential family in its natural parameter, with any sample weights, masks and soft targets in the two tables. The
state is the parameters and, with momentum, a velocity: SGD in all its forms, with quadratic regularizers and proximal
terms.

There is no list of losses or optimizers. The graph shows what may depend on what: every path from the state to the new
state goes through one product ``X W``, the products with X^T, or operations between parameters. Both pieces in between
are built from a list of operations without kinks or cases: polynomials, and for the sigmoid and the softmax analytic
functions. They are compared with the formulas above at states drawn at random, of several sizes, in float64; what else
they read (the variables of the problem above) is drawn at random, too, as far as it is real numbers. That is evidence,
not a proof: what is added to a gradient and stays below a 1e-9 part of it at all those sizes is not seen. The tables
are read off the graph by evaluating it where mean is 0 or 1; and whenever they are computed again, both pieces are
compared with them at one more state.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mlopt.passes.glm.fits import GlmFitKind
from mlopt.passes.glm.simplify import simplified
from mlopt.passes.glm.step_model import StepModel
from mlopt.passes.glm.values import NoMatchError, static_shape

logger = logging.getLogger(__name__)

aten = torch.ops.aten

# Of comparisons that are made in the dtype of the step.
_CHECK_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-9}


@dataclasses.dataclass(frozen=True)
class GlmDescentStructure:
    """A step of a problem as descent on a linear model.

    Attributes:
        kind: What mean is.
        positions: int64 [C, D], or [C, D + 1] with a bias: where each weight, and the bias of its column, lies in the
            vector [N] of all parameters one after the other.
        bias: Whether there is one.
        size: N.
        states: Which results of the step's feedback are the parameters and, if there are any, their velocities.
        dtype: Of all of it.
    """

    kind: GlmFitKind
    positions: torch.Tensor
    bias: bool
    size: int
    states: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    _model: StepModel

    def tables(self, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Compute what the steps from these inputs have in common, by operations that can be traced.

        Args:
            inputs: Of the step.

        Returns:
            X [n, D], scales [n, C], targets [n, C]; the coefficients [states, states + 2, N]: of 1, of each state and
            of g, those of the parameters being of their increment, as ``1 - lr * decay`` would lose digits; and a bool:
            whether the step is what these say, at one state more.
        """
        model = self._model
        scales, targets = model.tables(self.kind, inputs, self.dtype)
        coefficients = model.coefficients(inputs)
        tolerance = _CHECK_TOLERANCE[self.dtype]
        u = _scattered((model.num_rows, model.num_columns), scales)
        holds = [model.fits(self.kind, inputs, u * size, scales, targets, tolerance) for size in self.kind.check_sizes]
        state = _scattered((len(self.states), self.size), coefficients)
        sums = _scattered(tuple(self.positions.shape), coefficients)
        holds.append(model.is_affine(inputs, coefficients, state, sums, tolerance))
        return model.matrix(inputs), scales, targets, coefficients.to(self.dtype), torch.stack(holds).all()


def _scattered(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Return numbers between -2 and 2 without a pattern, by operations that can be traced."""
    count = torch.arange(int(torch.Size(shape).numel()), dtype=like.dtype, device=like.device)
    return (count * 12.9898).sin().mul(2).view(shape)


def find_descent(
    module: fx.GraphModule,
    feedback: Sequence[tuple[int, int]],
    states: Sequence[Sequence[int]],
    examples: Sequence[Any],
) -> GlmDescentStructure | None:
    """Look at the graph of a step.

    Args:
        module: ``(inputs) -> outputs``, functional, with the values of its nodes in ``meta``.
        feedback: (output, input) pairs: what a step returns and the next one takes.
        states: Positions in `feedback`: the parameters and, if there are any, their velocities, in the same order.
        examples: Inputs to compare at.

    Returns:
        Its structure, or None where that was not found.
    """
    try:
        return _find(_with_plain_mse(_without_like(simplified(module))), feedback, states, examples)
    except NoMatchError as reason:
        logger.debug("no descent on a linear model: %s", reason)
        return None


def _find(
    module: fx.GraphModule,
    feedback: Sequence[tuple[int, int]],
    states: Sequence[Sequence[int]],
    examples: Sequence[Any],
) -> GlmDescentStructure:
    if len(states) not in (1, 2) or sorted(k for state in states for k in state) != list(range(len(feedback))):
        raise NoMatchError("the step changes something else than parameters and velocities")
    model = StepModel(module, feedback, states)
    kinds = set(GlmFitKind)
    for inputs in _drawn(examples, model):
        model.check_coefficients(inputs)
        kinds = {kind for kind in kinds if model.has_kind(kind, inputs)}
    if len(kinds) != 1:
        raise NoMatchError("its gradient is that of no known mean")
    return GlmDescentStructure(
        kind=kinds.pop(),
        positions=model.positions,
        bias=model.positions.shape[1] > model.num_features,
        size=model.size,
        states=tuple(map(tuple, states)),
        dtype=model.dtype,
        _model=model,
    )


def _drawn(examples: Sequence[Any], model: StepModel) -> list[list[Any]]:
    """Return the examples, and others with other real numbers, where the step is not NaN."""
    generator = torch.Generator().manual_seed(0)

    def moved(k: int, t: Any, noise: float) -> Any:
        if k not in model.varying or not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        draws = torch.randn((2, *t.shape), generator=generator, dtype=torch.float64).to(t.device, t.dtype)
        return t * (1 + 0.2 * draws[0]) + noise * draws[1]

    for noise in (0.1, 0.0):  # weights that must stay positive are only scaled
        inputs = [[moved(k, t, noise) for k, t in enumerate(examples)] for _ in range(2)]
        if all(model.is_finite(given) for given in inputs):
            return [list(examples), *inputs]
    raise NoMatchError("it is not finite for other inputs")


_LIKE = {aten.ones_like.default: 1, aten.zeros_like.default: 0}


def _without_like(module: fx.GraphModule) -> fx.GraphModule:
    """Make constants that take no more than the shape of a value independent of it; in place."""
    for node in list(module.graph.nodes):
        if node.target in _LIKE and not any(k not in ("pin_memory", "memory_format") for k in node.kwargs):
            value = node.meta["val"]
            with module.graph.inserting_before(node):
                constant = module.graph.call_function(
                    aten.full.default,
                    (list(static_shape(node)), _LIKE[node.target]),
                    {"dtype": value.dtype, "device": value.device},
                )
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
            module.graph.erase_node(node)
    return module


def _with_plain_mse(module: fx.GraphModule) -> fx.GraphModule:
    """Write `mse_loss_backward` as products; in place. It may refuse constants of another dtype beside float64 rows."""
    for node in list(module.graph.nodes):
        if node.target is aten.mse_loss_backward.default:
            grad, prediction, target, reduction = node.args
            size = 2 / torch.Size(static_shape(prediction)).numel() if reduction == 1 else 2.0
            with module.graph.inserting_before(node):
                product = module.graph.call_function(aten.sub.Tensor, (prediction, target))
                product.meta = dict(node.meta)
                for factor in (size, grad):
                    product = module.graph.call_function(aten.mul.Tensor, (product, factor))
                    product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    return module
