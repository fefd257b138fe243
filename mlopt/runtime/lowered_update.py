"""What stands in for ``optimizer.step()``: a lowered graph with an optimizer's update in it.

The user's objects stay the truth: every call reads the live parameters, optimizer state and group settings, and writes
the new values back into the same tensors. Gradients are never made as tensors of their own, so ``.grad`` of the trained
parameters is None afterwards (a gradient of some earlier step would be worse). `Plan.keep_gradients` asks for the other
way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from mlopt.autodiff import TotalUpdateGraph
from mlopt.backends import Compiled
from mlopt.capture import OptimizerWatch, UpdateGraph, UpdateRole, UpdateValue
from mlopt.runtime.shield import shield

logger = logging.getLogger(__name__)


class LoweredUpdate:
    """The common part of `CompiledStep` and `CompiledUpdate`.

    Args:
        update: The captured update.
        call: The lowered graph.

    Attributes:
        given_up: Why it is not used any more, or "".
    """

    def __init__(self, update: UpdateGraph, call: Compiled) -> None:
        self.call = call
        self.given_up = ""
        self._update = update
        self._watch: OptimizerWatch | None = None  # from the last `accepts` that said yes
        self._targets: list[torch.Tensor | None] | None = None  # as long as the watch sees no change
        self._state: dict[int, torch.Tensor] = {}  # likewise, by the id of an input: hashing one takes longer
        self._numbers: dict[int, tuple[float, torch.Tensor]] = {}  # the last value of an input, and its tensor
        self._settings: list[torch.Tensor] | None = None  # as long as all of them are the same objects

    def is_used(self) -> bool:
        """Whether it is machine code; a graph that runs by torch calls gains nothing over ``optimizer.step()``."""
        return not self.given_up and self.call.lowering.backend != "eager"

    def accepts(self) -> bool:
        """Whether it is the step that the live optimizer would make now; cheap where nothing was changed."""
        if self._watch is not None:
            if self._watch.is_identical():
                return True
            self._settings = None  # numbers may have changed
            if self._watch.is_unchanged():
                return True
        self._settings = self._targets = None
        self._state.clear()
        accepted = self._update.is_free() and self._update.accepts()
        self._watch = self._update.watch() if accepted else None
        return accepted

    def give_up(self, reason: str) -> None:
        """Use it no more."""
        logger.warning("a compiled step of problem %r is not used any more: %s", self._update.problem, reason)
        self.given_up = reason

    def _live(self, x: UpdateValue) -> torch.Tensor:
        """Return the present value of an input; tensors of the state are looked up once per `accepts`."""
        if x.role is not UpdateRole.STATE or x.number is not None:
            return self._update.live(x)
        found = self._state.get(id(x))
        if found is None:
            found = self._state[id(x)] = self._update.live(x)
        return found

    def _setting(self, x: UpdateValue, update: UpdateGraph) -> torch.Tensor:
        if x.role is not UpdateRole.HYPERPARAMETER or x.number is None:
            return self._live(x) if update is self._update else update.live(x)
        value = update.number(x)
        known = self._numbers.get(id(x))
        if known is None or known[0] != value:
            known = self._numbers[id(x)] = value, update.live(x)
        return known[1]

    def settings_now(self, inputs: Sequence[UpdateValue]) -> list[torch.Tensor]:
        """Return the present values of the inputs of the graph that are state and numbers.

        Args:
            inputs: These inputs; the same in every call.
        """
        found = self._settings
        if found is None:
            found = [self._setting(x, self._update) for x in inputs]
            if self._watch is not None:
                self._settings = found
        return found

    def targets(self) -> list[torch.Tensor | None]:
        """Return what new values are written into: see `UpdateGraph.targets`."""
        if self._targets is None:
            self._targets = self._update.targets()
        return self._targets

    def unchanged(self) -> Callable[[], bool]:
        """Return what tells whether `accepts`, `settings_now` and `targets` would answer as they did last."""
        settings, targets = self._settings, self._targets

        def is_unchanged() -> bool:
            known = settings is not None and self.is_used() and self.accepts()
            return known and self._settings is settings and self._targets is targets

        return is_unchanged

    def written(self) -> None:
        """Do what is left to do where somebody else has written the new values into `targets`."""
        self._update.store_constants()
        self._forget_gradients()

    def _commit(self, results: Sequence[torch.Tensor], also: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()) -> None:
        targets = self.targets()
        shield.held = True
        self._update.commit(results, also, targets)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for parameter in self._update.parameters.values():
            parameter.grad = None


class CompiledUpdate(LoweredUpdate):
    """Makes the updates of a problem above others by a lowered `TotalUpdateGraph`.

    Args:
        graph: The graph.
        call: What it was lowered to.
    """

    def __init__(self, graph: TotalUpdateGraph, call: Compiled) -> None:
        super().__init__(graph.update, call)
        self.graph = graph

    def compute(
        self,
        own: Sequence[torch.Tensor | None],
        indirect: torch.Tensor,
        update: UpdateGraph,
        values: Mapping[str, torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        """Run the graph once and write nothing.

        Args:
            own: The direct gradients in layout order.
            indirect: The indirect gradient as a vector.
            update: The update with the optimizer whose state and settings are taken.
            values: The parameters by name.
        """
        graph = self.graph
        return self.call(
            *[values[name] for name in graph.parameters],
            *[own[i] for i in graph.direct],
            indirect,
            *[self._setting(x, update) for x in graph.settings],
        )

    def run(self, own: Sequence[torch.Tensor | None], indirect: torch.Tensor) -> None:
        """Make a step and write the new values into the live tensors.

        Raises:
            RuntimeError: The graph cannot be run with these tensors; nothing was written.
        """
        self._commit(self.compute(own, indirect, self._update, self._update.parameters))

    def given(self) -> list[torch.Tensor]:
        """Return the live parameters that are arguments of the graph, and the settings."""
        graph, live = self.graph, self._update.parameters
        return [
            *[live[name] for name in graph.parameters],
            *self.settings_now(graph.settings),
        ]
