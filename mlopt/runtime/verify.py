"""Check compiled derivatives against plain autograd on one batch.

Products are compared rather than hypergradients: a solver multiplies a difference by the condition number of H, so a
hypergradient would need a loose tolerance, while every product agrees to rounding, and a wrong one is named.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mlopt.autodiff import FlatLayout
from mlopt.capture.output import silenced
from mlopt.planner import ProductNeeds
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import AbstractDerivatives
from mlopt.runtime.rng import frozen_random_state, get_random_state

# Largest relative difference ||a - b|| / ||b|| that two correct evaluations may show: the sums are ordered differently.
# Each is well above what ResNet-size losses show (float32: about 1e-5) and well below any mistake in a formula.
_TOLERANCES = {
    torch.float64: 1e-8,
    torch.float32: 2e-3,
    torch.float16: 1e-1,
    torch.bfloat16: 1e-1,
}


def find_disagreement(
    compiled: AbstractDerivatives,
    reference: AbstractDerivatives,
    batch: Batch,
    layout: FlatLayout,
    own: torch.Tensor,
    needs: ProductNeeds,
) -> str | None:
    """Compare all derivatives that the program uses, at the live parameters.

    Both sides draw the same random numbers; no state is changed.

    Args:
        compiled: Derivatives under test.
        reference: Derivatives to trust.
        batch: The batch to compare on.
        layout: Layout of the problem's parameters.
        own: The problem's parameters [N].
        needs: What to compare.

    Returns:
        None if they agree, else one line that names the derivative and the difference.
    """
    tolerance = max(_TOLERANCES.get(d, 1e-8) for d in layout.dtypes)
    floor = 100 * max(torch.finfo(d).eps for d in layout.dtypes)  # of a product that is zero but for rounding
    state = get_random_state(layout.device)
    with frozen_random_state(state):
        got = dict(_evaluate(compiled, batch, layout, own, needs))
    with frozen_random_state(state), silenced():
        expected = dict(_evaluate(reference, batch, layout, own, needs))
    for name in expected | got:
        # A buffer that only one side reports was left alone by the other.
        a = got.get(name, name)
        b = expected.get(name, name)
        assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor), f"only one side has {name}"
        a, b = a.double(), b.double()
        scale, difference = b.norm(), (a - b).norm()
        if not torch.isfinite(scale):
            continue  # a loss that is not finite at the start is reported by the first step
        if not difference <= tolerance * scale + floor:
            relative = float(difference / scale) if scale > 0 else float("inf")
            label = name if isinstance(name, str) else "buffer written by the loss"
            return (
                f"{label}: relative difference {relative:.2e}, tolerance {tolerance:.0e} "
                f"(norms {float(a.norm()):.4e} and {float(scale):.4e})"
            )
    return None


def _evaluate(
    derivatives: AbstractDerivatives,
    batch: Batch,
    layout: FlatLayout,
    own: torch.Tensor,
    needs: ProductNeeds,
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
    vector = torch.randn(layout.size, generator=generator, dtype=torch.float64).to(layout.dtype).to(layout.device)
    if needs.hvp or needs.mixed:
        with frozen_random_state(state):
            linearization = derivatives.linearize(batch)
        if needs.hvp:
            yield "Hessian-vector product", linearization.hvp(vector)
        if needs.mixed:
            for name, value in linearization.mixed(vector).items():
                yield f"mixed product with {name!r}", value
    if needs.read_gradients:
        with frozen_random_state(state):
            for name, value in derivatives.read_gradient(batch, own).items():
                yield f"gradient with respect to {name!r}", value
