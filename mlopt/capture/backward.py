"""Notices backward code of the user's own: custom autograd functions and gradient hooks.

torch.export records what the forward computes; a `backward` that is not its derivative (a straight-through estimator,
a gradient reversal), or a hook that changes a gradient on its way, is lost. Comparing with plain autograd would not
always show it: a hook that clips gradients does nothing as long as they are small. So such a problem becomes an eager
island, whether or not its derivatives are verified.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.modules._functions import BackwardHookFunction

from mlopt.capture.lines import users_line
from mlopt.capture.record import GraphInput, InputRole

_HOOK = "a hook that may change a gradient"


@dataclasses.dataclass
class BackwardWatcher:
    """What was found: a description and the user's line, or None."""

    found: str | None = None

    def note(self, what: str) -> None:
        """Remember the first finding."""
        if self.found is None:
            self.found = f"{what}\n  {users_line(__file__)}"


@contextlib.contextmanager
def watching_backward() -> Iterator[BackwardWatcher]:
    """Tell of custom autograd functions and gradient hooks that run or are registered inside of the context.

    The functions that torch itself is written with are the derivatives of their forward and pass.
    """
    watcher = BackwardWatcher()
    apply = torch.autograd.Function.__dict__["apply"]  # a classmethod, in Python or (from torch 2.15 on) in C
    register_hook = torch.Tensor.register_hook

    def watched_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if cls is BackwardHookFunction:  # how a module runs its full backward hooks
            watcher.note(_HOOK)
        elif cls.__module__.partition(".")[0] != torch.__name__:
            watcher.note(f"the custom autograd function {cls.__name__}")
        return apply.__get__(None, cls)(*args, **kwargs)

    def watched_register_hook(tensor: torch.Tensor, hook: Any) -> Any:
        watcher.note(_HOOK)
        return register_hook(tensor, hook)

    with (
        mock.patch.object(torch.autograd.Function, "apply", classmethod(watched_apply)),
        mock.patch.object(torch.Tensor, "register_hook", watched_register_hook),
    ):
        yield watcher


def hooked_parameters(inputs: Iterable[GraphInput]) -> list[str]:
    """Return the parameters among the inputs of a loss that have gradient hooks, as ``"problem.name"``."""
    return [
        f"{x.problem}.{x.name}"
        for x in inputs
        if x.role in (InputRole.OWN, InputRole.READ) and x.tensor is not None and x.tensor._backward_hooks
    ]
