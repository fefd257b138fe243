"""Notices parameters that a `training_step` reaches past their modules, or switches on and off.

While a loss is captured, the modules hold stand-ins for their parameters. A list that was made before (``params =
list(net.parameters())``, a list that a module keeps of its own parameters, the groups of an optimizer) still has the
parameters themselves: constants for the capture, whose gradient would be lost in silence. Comparing with plain autograd
does not always show it: the penalty that reads them may be small. A switched ``requires_grad`` leaves no trace in a
graph either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mlopt.capture.lines import users_line
from mlopt.problem import Problem

_REQUIRES_GRAD: Any = torch.Tensor.requires_grad


class LooseParameters(TorchFunctionMode):
    """Tells of operations on parameters that are not stand-ins, inside of the context.

    Args:
        problems: Whose parameters; their modules hold them still.

    Attributes:
        found: The first parameter that is read past its module, and the line; None if there is none.
        switched: The line that first sets some ``requires_grad``; None if there is none.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__()
        self.found: str | None = None
        self.switched: str | None = None
        self._names = {id(t): f"{p.name}.{name}" for p in problems for name, t in p.module.named_parameters()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; sizes, dtypes and the like may be asked for."""
        kwargs = kwargs or {}
        if self.switched is None and _switches(func, args):
            self.switched = users_line(__file__)
        result = func(*args, **kwargs)
        if self.found is None and any(isinstance(x, torch.Tensor) for x in tree_leaves(result)):
            names = [self._names[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self._names]
            if names:
                self.found = f"{names[0]}\n  {users_line(__file__)}"
        return result


def _switches(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether an operation sets ``requires_grad`` of a parameter to another value."""
    is_setter = getattr(func, "__name__", "") == "__set__" and getattr(func, "__self__", None) is _REQUIRES_GRAD
    if not (is_setter or func is torch.Tensor.requires_grad_) or not isinstance(args[0], torch.nn.Parameter):
        return False
    return bool(args[0].requires_grad != (args[1] if len(args) > 1 else True))
