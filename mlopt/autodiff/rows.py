"""The graph of a product, for several vectors at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mlopt.passes import run_default_passes

logger = logging.getLogger(__name__)


def over_rows(half: fx.GraphModule, num_rows: int) -> fx.GraphModule | None:
    """Batch a tangent half by ``torch.func.vmap``.

    Args:
        half: ``(residuals, v [N]) -> (H v [N],)``; it may hold for several sizes of the batch.
        num_rows: K.

    Returns:
        ``(residuals, rows [K, N]) -> (H v of each row [K, N],)``, for the sizes of the example that `half` was traced
        with and no others (the batched forms of convolutions fix them; see `fits`); None if some operation has no
        batched form.
    """
    # A fake mode of its own: what tracing assumes of sizes must not become known to the graphs traced before.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        examples = [_concrete(n.meta["val"]) for n in _placeholders(half)]

    def compute(*values: Any) -> Sequence[torch.Tensor]:
        return (torch.func.vmap(lambda v: half(*values[:-1], v)[0])(values[-1]),)

    try:
        with mode, torch.no_grad():
            rows = examples[-1].expand(num_rows, *examples[-1].shape).clone()
            module = make_fx(compute)(*examples[:-1], rows)
    except Exception:  # vmap raises what it likes; one product at a time is always right
        logger.debug("a product cannot be batched as a graph", exc_info=True)
        return None
    for node, example in zip(_placeholders(module), [*examples[:-1], rows], strict=True):
        node.meta.setdefault("val", example)
    return run_default_passes(module)


def fits(module: fx.GraphModule, residuals: Sequence[Any]) -> bool:
    """Whether a graph that `over_rows` returned holds for these residuals."""
    expected = [n.meta["val"] for n in _placeholders(module)][:-1]
    return all(
        found.shape == value.shape if isinstance(value, torch.Tensor) else found == value
        for value, found in zip(expected, residuals, strict=True)
    )


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _concrete(value: Any) -> Any:
    """Return a value of the example's sizes; what is in it does not matter."""
    if isinstance(value, torch.Tensor):
        sizes, strides = ([_concrete(n) for n in numbers] for numbers in (value.size(), value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
    return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value
