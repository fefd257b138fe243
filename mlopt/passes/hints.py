"""The numbers that stand for free sizes where a choice has to be made."""

from __future__ import annotations

import torch

_UNKNOWN = 8192
"""For a size that depends on the values of tensors (``nonzero``); what Inductor assumes of them too."""


def size_hint(size: int | torch.SymInt) -> int:
    """Return a size as it was in the example; a guess, 8192, for one that is known only when the graph runs."""
    hint = size.node.hint if isinstance(size, torch.SymInt) else size
    return _UNKNOWN if hint is None else int(hint)
