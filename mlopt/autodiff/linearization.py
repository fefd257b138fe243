"""Second-order products of one loss g at one point: ``H v`` and the mixed products ``(d2g/dr dtheta)^T q``.

Both are the vector-Jacobian product of the gradient ``dg/dtheta`` (reverse over reverse), so one trace gives both, and
the graph of the gradient with them. The rest of the trace is cut by use-def into

- a *primal* graph, everything that does not depend on the vector: forward and backward of g, run once per state;
- a *tangent* graph per product, everything that does: run once per vector, on the residuals that the primal handed
  over (or on fewer of them, see `recompute.py`).

An iterative solver that re-ran the whole product would pay for the primal half in every iteration.

Forward over reverse (dual numbers through the gradient) gives the same products. It was built and measured beside this,
and is not kept, because it was never faster: with AOTInductor on one core a product of a perceptron takes as long and
its primal half 1.28 times as long; by torch calls a product takes 1.8 times as long, that of a 2-layer transformer 1.07
times; residuals are 1.04 to 1.2 times as large; and it needs a derivative in forward mode of every operation, which
recurrent and custom ones lack. Choosing per graph would double the time to trace for a choice that is always the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mlopt.autodiff.gauss_newton import CutLoss, second_order_products
from mlopt.autodiff.gradient import GradientGraph, first_order, gradient_graph_of, prepare, read_parameters
from mlopt.autodiff.join import placeholders_of, results_of
from mlopt.autodiff.layout import FlatLayout
from mlopt.autodiff.loss_scale import unit_length, unscaled
from mlopt.autodiff.recompute import SplitPolicy, choose_residuals, count_recomputed, total_bytes
from mlopt.autodiff.rows import over_rows
from mlopt.autodiff.split import dependents, residuals_of
from mlopt.autodiff.trace import Outputs, TracedGraph, trace
from mlopt.capture.record import InputRole, LossGraph
from mlopt.passes import extract, run_default_passes
from mlopt.passes.glm import find_glm, is_widened

# Operations whose derivative is made of others where it is differentiated again: their plain gradient is faster and has
# a trace of its own.
_OTHER_GRADIENT = {torch.ops.aten.group_norm, torch.ops.aten.native_group_norm, torch.ops.aten.cumprod}

# Where kernels read an X of a half type as it is; elsewhere they widen it first, and so may the loss.
_READS_HALVES = {"cuda"}


@dataclasses.dataclass
class LinearizationGraphs:
    """The halves of the second-order products of one loss.

    Attributes:
        traced: The whole product before the cut; its `guard` tells for which shapes the halves hold.
        primal: ``(loss inputs) -> residuals``.
        hvp: ``(residuals, v [N]) -> (H v [N],)`` (or G v, if so asked), or None if not asked for.
        hvps: ``(residuals, rows [K, N]) -> (H v of each row [K, N],)``, or None.
        mixed: ``(residuals, q [N]) -> (one flat vector [N_r] per target)``, or None if there is no target.
        targets: The problems that `mixed` returns products for, in output order.
        num_residuals: How many values the primal half hands over.
        residual_bytes: The memory they hold beyond the inputs, at the sizes of the example.
        num_recomputed: How many operations of the primal half the tangent halves make again.
    """

    traced: TracedGraph
    primal: fx.GraphModule
    hvp: fx.GraphModule | None
    hvps: fx.GraphModule | None
    mixed: fx.GraphModule | None
    targets: tuple[str, ...]
    num_residuals: int
    residual_bytes: int
    num_recomputed: int


def linearization_graphs(
    loss: LossGraph,
    inputs: Sequence[torch.Tensor],
    layouts: Mapping[str, FlatLayout],
    *,
    hvp: bool,
    targets: Sequence[str],
    curvature: str = "hessian",
    hvps_at_once: int = 0,
    split: SplitPolicy = SplitPolicy(),  # noqa: B008 - it is immutable
) -> LinearizationGraphs:
    """Build the second-order products of a loss.

    With theta the own parameters, r those of a problem the loss reads, and v a vector [N] like theta:
    ``H v = d/dtheta <dg/dtheta, v>`` and ``mixed_r v = d/dr <dg/dtheta, v>``. Parameters that the gradient does not
    depend on (a bias in a linear loss, an unused layer) contribute zeros.

    Args:
        loss: The captured loss g.
        inputs: Example tensors in the order of ``loss.inputs``.
        layouts: Flat layouts of all problems by name.
        hvp: Whether `H v` is wanted.
        targets: The problems r whose mixed products are wanted.
        curvature: ``"hessian"``, or ``"ggn"`` to have generalized Gauss-Newton products in place of `H v`; mixed
            products are exact with both. See `mlopt.autodiff.gauss_newton`.
        hvps_at_once: K, for the graph of K products at once; 0 for none. There is none either where a kernel may take
            over, or an operation cannot be batched.
        split: What the halves prefer: fewer residuals, or fewer operations.

    Returns:
        The graphs, already through the default passes.

    Raises:
        LossError: ``curvature="ggn"``, and the loss has no convex loss function of network outputs.
    """
    if hvp and curvature == "ggn":
        traced = _trace_gauss_newton(loss, inputs, layouts, targets)
        return _cut(traced, split, hvp=hvp, hvps_at_once=hvps_at_once, targets=tuple(targets))
    options: dict[str, Any] = {"hvp": hvp, "targets": targets, "hvps_at_once": hvps_at_once, "split": split}
    return gradient_and_linearization_graphs(loss, inputs, layouts, (), **options)[1]


def shares_gradient(loss: LossGraph) -> bool:
    """Whether the gradient of a loss is computed by the same operations where it is differentiated again."""
    return not any(getattr(n.target, "overloadpacket", None) in _OTHER_GRADIENT for n in loss.module.graph.nodes)


def gradient_and_linearization_graphs(
    loss: LossGraph,
    inputs: Sequence[torch.Tensor],
    layouts: Mapping[str, FlatLayout],
    cotangents: Sequence[str],
    *,
    hvp: bool,
    targets: Sequence[str],
    hvps_at_once: int = 0,
    split: SplitPolicy = SplitPolicy(),  # noqa: B008 - it is immutable
) -> tuple[GradientGraph, LinearizationGraphs]:
    """Build the graphs of `mlopt.autodiff.gradient.gradient_graph` and `linearization_graphs` from one trace.

    Half of the trace of the products is the gradient, and tracing is most of the time that compilation takes before
    machine code. Arguments are those of the two functions; the products are those of the Hessian. Unless the
    loss `shares_gradient`, the graph of the gradient is right, but slower than one of its own.
    """
    own_layout = layouts[loss.problem]
    layouts_out = ([own_layout] if hvp else []) + [layouts[name] for name in targets]

    def compute(tensors: list[torch.Tensor]) -> Outputs:
        *tensors, flat = tensors
        flat, norm = unit_length(loss, flat)
        values, own = prepare(loss, tensors, own_layout)
        reads = [read_parameters(loss, values, layouts[name]) for name in targets]
        first = first_order(loss, values, own, layouts, cotangents, create_graph=True)
        # A gradient that is missing or constant has no second derivative; autograd would raise, zero is right.
        pairs = zip(first.scaled, own_layout.split(flat), strict=True)
        curved = [(g, v) for g, v in pairs if g is not None and g.requires_grad]
        groups = ([own] if hvp else []) + reads
        wanted = [t for group in groups for t in group if t is not None]
        if curved and wanted:
            products = iter(
                torch.autograd.grad([g for g, _ in curved], wanted, [v for _, v in curved], allow_unused=True)
            )
        else:
            products = iter([None] * len(wanted))
        flattened = [
            layout.flatten([None if t is None else next(products) for t in group])
            for layout, group in zip(layouts_out, groups, strict=True)
        ]
        return [*first.outputs, *_restored(loss, values, flattened, norm)]

    joint = _trace(compute, loss, inputs, own_layout)
    outputs = results_of(joint.module)
    num_first = len(outputs) - len(layouts_out)
    *placeholders, vector = placeholders_of(joint.module)
    first = extract(joint.module, placeholders, outputs[:num_first], keep_random=True)
    gradient = gradient_graph_of(TracedGraph(first, joint.guard), loss, layouts, cotangents)
    products = extract(joint.module, [*placeholders, vector], outputs[num_first:], keep_random=True)
    traced = TracedGraph(products, joint.guard)
    return gradient, _cut(traced, split, hvp=hvp, hvps_at_once=hvps_at_once, targets=tuple(targets))


def _trace_gauss_newton(
    loss: LossGraph, inputs: Sequence[torch.Tensor], layouts: Mapping[str, FlatLayout], targets: Sequence[str]
) -> TracedGraph:
    own_layout = layouts[loss.problem]

    def compute(tensors: list[torch.Tensor]) -> Outputs:
        *tensors, flat = tensors
        flat, norm = unit_length(loss, flat)
        values, own = prepare(loss, tensors, own_layout)
        reads = [read_parameters(loss, values, layouts[name]) for name in targets]
        pairs = [(t, v) for t, v in zip(own, own_layout.split(flat), strict=True) if t is not None]
        present = [t for group in reads for t in group if t is not None]
        products, mixed = second_order_products(
            CutLoss(loss, values), [t for t, _ in pairs], [v for _, v in pairs], present
        )
        remaining = iter([*products, *mixed])
        flattened = [
            layout.flatten([None if t is None else next(remaining) for t in group])
            for layout, group in zip([own_layout, *(layouts[name] for name in targets)], [own, *reads], strict=True)
        ]
        return _restored(loss, values, flattened, norm)

    return _trace(compute, loss, inputs, own_layout)


def _trace(
    function: Callable[[list[torch.Tensor]], Outputs],
    loss: LossGraph,
    inputs: Sequence[torch.Tensor],
    own_layout: FlatLayout,
) -> TracedGraph:
    """Trace a function of the loss's inputs and a vector [N]."""
    example = torch.empty(own_layout.size, dtype=own_layout.dtype, device=own_layout.device)
    dynamic_dims = [*loss.dynamic_dims, frozenset[int]()]
    traced = trace(function, [*inputs, example], dynamic_dims, loss.positions(InputRole.BATCH))
    run_default_passes(traced.module)
    return traced


def _restored(
    loss: LossGraph, values: list[torch.Tensor], products: list[torch.Tensor], norm: torch.Tensor | None
) -> Outputs:
    return [p if norm is None else unscaled(loss, values, p * norm.to(p.dtype)) for p in products]


def _cut(
    traced: TracedGraph, split: SplitPolicy, *, hvp: bool, hvps_at_once: int, targets: tuple[str, ...]
) -> LinearizationGraphs:
    graph = traced.module.graph
    *inputs, vector = [n for n in graph.nodes if n.op == "placeholder"]
    outputs = next(n for n in graph.nodes if n.op == "output").args[0]
    tangent = dependents(vector)
    residuals = residuals_of(outputs, tangent)
    kernel = find_glm(extract(traced.module, [*residuals, vector], outputs[:1])) if hvp else None
    if kernel is None:
        residuals = choose_residuals(outputs, tangent, split)
    else:  # it reads what it needs once, and finds its structure in the plain split only
        residuals = _with_matrix_as_stored(residuals, kernel.x)
    primal = extract(traced.module, inputs, residuals, keep_random=True)
    halves: dict[str, fx.GraphModule | None] = {}
    num_recomputed = 0
    for name, wanted in (("hvp", outputs[:1] if hvp else ()), ("mixed", outputs[1:] if hvp else outputs)):
        half = halves[name] = extract(traced.module, [*residuals, vector], wanted) if wanted else None
        num_recomputed += 0 if half is None else count_recomputed(half)
    return LinearizationGraphs(
        traced,
        primal,
        halves["hvp"],
        over_rows(halves["hvp"], hvps_at_once)
        if halves["hvp"] is not None and hvps_at_once and kernel is None
        else None,
        halves["mixed"],
        targets,
        len(residuals),
        total_bytes(residuals),
        num_recomputed,
    )


def _with_matrix_as_stored(residuals: list[fx.Node], x: int) -> list[fx.Node]:
    """Hand X over as the halves that it is stored as, where the kernel reads those: it is bound by the bytes of X."""
    matrix = residuals[x]
    if not is_widened(matrix) or matrix.meta["val"].device.type not in _READS_HALVES:
        return residuals
    wanted = {*residuals, matrix.args[0]} - {matrix}
    return [n for n in matrix.graph.nodes if n in wanted]
