"""`StepWatch`: everything a `training_step` may do that a graph would do once, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from mlopt.capture.attributes import AttributeRecorder, ReadAttribute, recording_attributes
from mlopt.capture.backward import BackwardWatcher, watching_backward
from mlopt.capture.containers import ContainerWatcher, watching_containers
from mlopt.capture.loose import LooseParameters
from mlopt.capture.output import OutputListener, listening
from mlopt.capture.places import variables_of
from mlopt.errors import CaptureError
from mlopt.problem import Problem


class StepWatch:
    """A context to run a `training_step` in, while the modules hold stand-ins for their parameters.

    Args:
        problem: Whose `training_step`.
        problems: All of the graph; their modules hold their own parameters still.
    """

    def __init__(self, problem: Problem, problems: Sequence[Problem]) -> None:
        self._problem = problem
        self._problems = list(problems)
        self._loose = LooseParameters(problems)
        self._exit = contextlib.ExitStack()
        self._listener: OutputListener
        self._backward: BackwardWatcher
        self._containers: ContainerWatcher
        self._recorder: AttributeRecorder

    def __enter__(self) -> StepWatch:
        """Begin to look."""
        enter = self._exit.enter_context
        self._listener = enter(listening())
        self._backward = enter(watching_backward())
        variables = variables_of(self._problem)
        self._containers = enter(watching_containers(variables.places, self._problems))
        self._recorder = enter(recording_attributes())
        self._recorder.note_variables(variables)
        enter(self._loose)
        return self

    def __exit__(self, *error: Any) -> None:
        """Put back what was changed."""
        self._exit.close()

    def attributes(self) -> tuple[ReadAttribute, ...]:
        """Return the plain Python values that were read."""
        return self._recorder.unchanged()

    def refuse(self) -> None:
        """Say what a graph could not do.

        Raises:
            CaptureError: There was something.
        """
        for reason in (self._output(), self._writes(), self._live(), self._parameters()):
            if reason is not None:
                raise CaptureError(f"problem {self._problem.name!r}: its training_step {reason}")
        if self._backward.found is not None:
            raise own_backward_error(self._problem, self._backward.found)

    def _output(self) -> str | None:
        line = self._listener.line
        return None if line is None else f"prints or logs, and a captured one runs only once\n  at {line}"

    def _writes(self) -> str | None:
        if self._containers.changed is None:
            return None
        return (
            f"writes into {self._containers.changed}, and a captured one would do so only once; return what is to be "
            "kept as metrics: they come with plan.step()"
        )

    def _live(self) -> str | None:
        if self._recorder.read_live is None:
            return None
        owner, name = self._recorder.read_live
        advice = "call it in get_batch" if name == "env" else "hold what changes in a buffer of the module"
        return f"reads the `{name}` of problem {owner.name!r}, and a captured one would act on it only once; {advice}"

    def _parameters(self) -> str | None:
        if self._loose.switched is not None:
            return (
                f"sets `requires_grad` of a parameter, which leaves no trace in a graph\n  {self._loose.switched}\n"
                "  Write x.detach() or torch.no_grad() where no gradient is to pass."
            )
        if self._loose.found is None:
            return None
        return (
            f"reads, not through its module, the parameter {self._loose.found}\n"
            "  A list of parameters that was made before has no place in a graph: read self.module.weight, "
            "self.module.parameters() or self.trained_parameters()."
        )


def own_backward_error(problem: Problem, what: str) -> CaptureError:
    """Return the error for a loss whose backward is not the derivative of its forward."""
    return CaptureError(
        f"problem {problem.name!r}: its training_step uses {what}\n"
        "  A captured graph has the derivative of the forward and would not run it. Written with plain tensor "
        "operations (x + (x.round() - x).detach(), say, for a straight-through rounding) it can be captured."
    )
