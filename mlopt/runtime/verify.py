"""Check compiled derivatives against plain autograd on one batch.

Products are compared rather than hypergradients: a solver multiplies a difference by the condition number of H, so a
hypergradient would need a loose tolerance, while every product agrees to rounding, and a wrong one is named.

How much rounding may do depends on the loss: sums are ordered differently, and a deep network with BatchNorm and kinked
activations multiplies that (ResNet-32 in float32: 1e-3 in the gradient, 3e-3 in a Hessian product). No fixed tolerance
is both wide enough for it and narrow enough for a small loss. So a narrow one is tried first, and where it is exceeded
plain autograd is run again with every parameter and input off by one rounding error: a difference of the size of what
that does is rounding, a much larger one is a mistake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping

import torch

from mlopt.autodiff import FlatLayout
from mlopt.capture.output import silenced
from mlopt.planner import ProductNeeds
from mlopt.precision import PRECISIONS
from mlopt.problem import Problem
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import AbstractDerivatives
from mlopt.runtime.perturb import perturb, perturbed_parameters
from mlopt.runtime.rng import frozen_random_state, get_random_state

logger = logging.getLogger(__name__)

# Largest relative difference ||a - b|| / ||b|| of two evaluations that needs no further look. Well below what a mistake
# in a formula does, and in float64 well above what reordered sums do.
TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 3e-2,
}

# A difference may be so many times as large as what one rounding error per parameter does. On ResNet-32 they are equal;
# a kink that is crossed on one side only makes single products differ by a few times.
_NOISE_RATIO = 10.0

# A loss so badly conditioned that one rounding error per parameter changes a product by this much cannot be checked;
# the difference is then reported.
_MOST_NOISE = 0.05

# The same for what is computed in a half type. Measured on an MLP and a conv net: one rounding error of bf16 per
# parameter moves products by 3 to 7 %, machine code differs from autograd by at most 1 %, and both are equally far from
# float32 (1 to 5 %).
_HALF_NOISE_RATIO = 1.0
_MOST_HALF_NOISE = 0.2

Products = dict[str | torch.Tensor, torch.Tensor]


def tolerance_of(problem: Problem, layout: FlatLayout) -> float:
    """Return the largest relative difference of two evaluations of a problem that needs no further look."""
    return max(TOLERANCES.get(d, 1e-8) for d in _computed_in(problem, layout))


def _computed_in(problem: Problem, layout: FlatLayout) -> set[torch.dtype]:
    return {PRECISIONS[problem.precision]} if problem.precision else {*layout.dtypes}


def find_disagreement(
    compiled: AbstractDerivatives,
    reference: AbstractDerivatives,
    problem: Problem,
    problems: Mapping[str, Problem],
    layout: FlatLayout,
    needs: ProductNeeds,
    batch: Batch,
) -> str | None:
    """Compare all derivatives of one problem that the program uses, at the live parameters, with plain autograd.

    All evaluations draw the same random numbers; no state is changed.

    Args:
        compiled: Derivatives under test.
        reference: Derivatives to trust.
        problem: The problem.
        problems: All problems of the graph.
        layout: Layout of the problem's parameters.
        needs: What to compare.
        batch: The batch to compare on.

    Returns:
        None if they agree, else one line that names the derivative and the difference.
    """
    tolerance = tolerance_of(problem, layout)
    half = bool(_computed_in(problem, layout) & {*PRECISIONS.values()})
    limits = (_HALF_NOISE_RATIO, _MOST_HALF_NOISE) if half else (_NOISE_RATIO, _MOST_NOISE)
    state = get_random_state(layout.device)
    with _loss_scale_kept(problem):
        while True:
            with frozen_random_state(state), silenced():
                expected = _evaluate(reference, problem, batch, layout, needs)
            finite = all(bool(torch.isfinite(value).all()) for value in expected.values())
            # With the scale that an fp16 run starts with products may overflow, and would tell nothing.
            if finite or problem.loss_scale is None or not torch.isfinite(expected["loss"]):
                break
            if not problem.loss_scale.back_off():
                break
        with frozen_random_state(state):
            got = _evaluate(compiled, problem, batch, layout, needs)
        # Rounding alone leaves something of this size of a product that is zero.
        natural = min(1.0, max(float(expected["loss"].abs()), float(expected["gradient"].norm())))
        floor = 10 * max(torch.finfo(d).eps for d in layout.dtypes) * natural
        noisy: list[Products] = []
        for name in expected | got:
            # A buffer that only one side reports was left alone by the other.
            a = got.get(name, name)
            b = expected.get(name, name)
            assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor), f"only one side has {name}"
            scale, difference = float(b.double().norm()), _distance(a, b)
            if not math.isfinite(scale):
                continue  # a loss that is not finite at the start is reported by the first step
            if difference <= tolerance * scale + floor:
                continue
            if not noisy:
                noisy.append(_with_noise(0, reference, problem, problems, layout, needs, batch))
            if _explains(noisy, name, b, difference, limits):
                continue
            if len(noisy) == 1:  # one draw of the noise may be a lucky one
                noisy.append(_with_noise(1, reference, problem, problems, layout, needs, batch))
            if _explains(noisy, name, b, difference, limits):
                continue
            label = name if isinstance(name, str) else "buffer written by the loss"
            relative = difference / scale if scale > 0 else float("inf")
            return (
                f"{label}: relative difference {relative:.2e}, tolerance {tolerance:.0e} "
                f"(norms {float(a.double().norm()):.4e} and {scale:.4e})"
            )
    return None


def _explains(
    noisy: list[Products],
    name: str | torch.Tensor,
    value: torch.Tensor,
    difference: float,
    limits: tuple[float, float],
) -> bool:
    """Whether a difference from `value` is of the size that rounding errors of parameters and inputs cause."""
    noise = max((_distance(products[name], value) for products in noisy if name in products), default=0.0)
    logger.debug("difference %.1e, noise %.1e", difference, noise)
    ratio, most = limits
    return noise <= most * float(value.double().norm()) and difference <= ratio * noise


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm())


def _with_noise(
    seed: int,
    reference: AbstractDerivatives,
    problem: Problem,
    problems: Mapping[str, Problem],
    layout: FlatLayout,
    needs: ProductNeeds,
    batch: Batch,
) -> Products:
    """Return the products by plain autograd at parameters and inputs that are off by one rounding error each."""
    generator = torch.Generator().manual_seed(seed)
    state = get_random_state(layout.device)
    dtype = PRECISIONS[problem.precision] if problem.precision else None
    with perturbed_parameters(problems, generator, dtype), frozen_random_state(state), silenced():
        moved = dataclasses.replace(batch, tensors=perturb(batch.tensors, generator, dtype))
        return _evaluate(reference, problem, moved, layout, needs)


@contextlib.contextmanager
def _loss_scale_kept(problem: Problem) -> Iterator[None]:
    scale = problem.loss_scale
    before = None if scale is None else scale.state_dict()
    try:
        yield
    finally:
        if scale is not None and before is not None:
            scale.load_state_dict(before)


def _evaluate(
    derivatives: AbstractDerivatives, problem: Problem, batch: Batch, layout: FlatLayout, needs: ProductNeeds
) -> Products:
    return dict(_products(derivatives, problem, batch, layout, needs))


def _products(
    derivatives: AbstractDerivatives, problem: Problem, batch: Batch, layout: FlatLayout, needs: ProductNeeds
) -> Iterator[tuple[str | torch.Tensor, torch.Tensor]]:
    """Yield every product under its name; buffers under the live tensor itself."""
    state = get_random_state(layout.device)
    result = derivatives.gradient(batch)
    yield "loss", result.loss
    yield "gradient", layout.flatten(result.own)
    for name, value in result.cotangents.items():
        yield f"cotangent of {name!r}", value
    yield from result.buffers
    generator = torch.Generator().manual_seed(0)
    vector = (
        torch.randn(layout.vector_shape, generator=generator, dtype=torch.float64).to(layout.dtype).to(layout.device)
    )
    if needs.hvp or needs.mixed:
        with frozen_random_state(state):
            linearization = derivatives.linearize(batch)
        if needs.hvp:
            yield (
                f"{'Gauss-Newton' if needs.curvature == 'ggn' else 'Hessian'}-vector product",
                linearization.hvp(vector),
            )
            if needs.hvps_at_once and vector.ndim == 1:
                rows = torch.stack([vector, vector.flip(0)])
                yield "Hessian-vector products at once", linearization.hvps(rows)
        if needs.mixed:
            for name, value in linearization.mixed(vector).items():
                yield f"mixed product with {name!r}", value
    if needs.read_gradients:
        own = layout.flatten([p.detach() for p in problem.trained_parameters().values()])
        with frozen_random_state(state):
            for name, value in derivatives.read_gradient(batch, own).items():
                yield f"gradient with respect to {name!r}", value
