"""`Callback`: the user's code in an `Engine` run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlopt.runtime.plan import StepResult

if TYPE_CHECKING:
    from mlopt.engine.engine import Engine


class Callback:
    """Hooks into an `Engine` run; override what you need. The engine is given so that hooks can read its state.

    ``engine.stop(reason)`` ends the run after the present step.
    """

    def on_start(self, engine: Engine) -> None:
        """Run before the first step."""

    def on_step_end(self, engine: Engine, results: StepResult) -> None:
        """Run after every global step, with what ``plan.step()`` returned. Steps are then made one at a time."""

    def on_log(self, engine: Engine, values: Mapping[str, float]) -> None:
        """Run when losses and metrics were read: ``"problem.metric"`` -> its mean since they were read before."""

    def on_validation_end(self, engine: Engine, values: Mapping[str, float]) -> None:
        """Run after `validate`, with the numbers that it returned (the means over all ranks), flattened."""

    def on_end(self, engine: Engine) -> None:
        """Run after the last step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data; it is part of ``engine.state_dict()``."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
