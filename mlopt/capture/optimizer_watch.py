"""`OptimizerWatch`: whether an optimizer is still as it was, as far as that decides what its next step is.

`UpdateGraph.accepts` answers by building what it compares, which takes longer than a small step. It is asked before
every step, and the answer is nearly always that nothing was touched; that much is told here by looking whether the same
objects are still in the same places.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer


class OptimizerWatch:
    """Remembers the parts of an optimizer. Made by `watch`.

    Args:
        optimizer: The optimizer.
        parameters: Those of its parameters that are updated.
        steering: (number of a group, key) of the numbers that the optimizer's code branches on. Others may change.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], steering: set[tuple[int, str]]
    ) -> None:
        self._optimizer = optimizer
        self._step = vars(optimizer).get("step")
        self._params = [tuple(group["params"]) for group in optimizer.param_groups]
        self._settings = [
            {key: _Setting(value, (number, key) in steering) for key, value in group.items() if key != "params"}
            for number, group in enumerate(optimizer.param_groups)
        ]
        state = optimizer.state
        self._held = [(p, tuple(state.get(p, {}).values())) for p in parameters.values()]
        # A list may be written into; it is compared by value.
        self._mutable = any(type(s.value) is list for settings in self._settings for s in settings.values())
        self._objects: list[Any] = []
        self._remember()

    def _remember(self) -> None:
        self._objects = [*self._all(), self._step]

    def _all(self) -> list[Any]:
        """Everything that is looked at, in order."""
        found: list[Any] = []
        for group in self._optimizer.param_groups:
            found += group.values()
            found += group["params"]
        state = self._optimizer.state
        for p, _ in self._held:
            found += state.get(p, _NOTHING).values()
        return found

    def is_identical(self) -> bool:
        """Whether every setting and every entry of the state is the very object that it was at the last look.

        A fifth of the price of `is_unchanged`, which may still say that nothing was changed where this says no.
        """
        optimizer = self._optimizer
        present = [*self._all(), vars(optimizer).get("step")]
        same = len(present) == len(self._objects) and all(map(operator.is_, present, self._objects))
        return same and not self._mutable and not any(hooks_of(optimizer))

    def is_unchanged(self) -> bool:
        """Whether nothing was changed; False does not say that something was."""
        optimizer = self._optimizer
        groups, state = optimizer.param_groups, optimizer.state
        if (
            any(hooks_of(optimizer))
            or vars(optimizer).get("step") is not self._step
            or len(groups) != len(self._params)
        ):
            return False
        for group, params, settings in zip(groups, self._params, self._settings, strict=True):
            if len(group) != 1 + len(settings) or not _are_same(group["params"], params):
                return False
            for key, setting in settings.items():
                if key not in group or not setting.is_unchanged(group[key]):
                    return False
        if not all(_are_same(state.get(p, {}).values(), values) for p, values in self._held):
            return False
        self._remember()
        return True


def watch(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], steering: set[tuple[int, str]]
) -> OptimizerWatch | None:
    """Return a watch over an optimizer, or None where one would see too little: some setting of it is a tensor."""
    settings = [v for group in optimizer.param_groups for k, v in group.items() if k != "params"]
    if any(isinstance(v, torch.Tensor) for v in settings):
        return None
    return OptimizerWatch(optimizer, parameters, steering)


def hooks_of(optimizer: torch.optim.Optimizer) -> tuple[Mapping[int, Any], ...]:
    """Return the hooks around an optimizer's step, the global ones included."""
    return (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )


_NOTHING: dict[str, Any] = {}


class _Setting:
    """One entry of a param group."""

    __slots__ = ("free", "value")

    def __init__(self, value: Any, steers: bool) -> None:
        self.value = list(value) if type(value) is list else value  # a list may be written into
        self.free = type(value) if type(value) in (float, int) and not steers else None  # an input of the graph

    def is_unchanged(self, value: Any) -> bool:
        if value is self.value or type(value) is self.free:
            return True
        return self.free is None and type(value) is type(self.value) and bool(value == self.value)


def _are_same(present: Any, before: tuple[Any, ...]) -> bool:
    return len(present) == len(before) and all(map(operator.is_, present, before))
