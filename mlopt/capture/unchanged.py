"""Parameters stay as they are while a loss is evaluated, whatever its code does to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from mlopt.errors import ProblemError
from mlopt.problem import Problem


@contextlib.contextmanager
def unchanged_parameters(name: str, problems: Mapping[str, Problem], *, values: bool = True) -> Iterator[None]:
    """Put parameters back as they were if a loss that is evaluated inside of the context has changed them.

    Args:
        name: Whose loss.
        problems: Whose parameters.
        values: Not only ``requires_grad``. A write through ``.data`` moves no version counter, so they are copied and
            compared.

    Raises:
        ProblemError: It has.
    """
    before = [
        (f"{problem}.{key}", p, p.detach().clone() if values else None, p.requires_grad)
        for problem, each in problems.items()
        for key, p in each.module.named_parameters()
    ]
    changed, what = [], ""
    try:
        yield
    finally:
        with torch.no_grad():
            for key, p, value, trained in before:
                if value is not None and not torch.equal(p.nan_to_num(), value.nan_to_num()):
                    changed.append(key)
                    what = "writes to the parameter"
                    p.copy_(value)
                if p.requires_grad != trained:
                    changed.append(key)
                    what = "leaves another `requires_grad` at the parameter"
                    p.requires_grad_(trained)
    if changed:
        raise ProblemError(
            f"problem {name!r}: its training_step {what} {changed[0]!r}; it is evaluated more often than there are "
            "steps, so it may change nothing. Parameters may be written in param_callback; x.detach() stops a gradient"
        )
