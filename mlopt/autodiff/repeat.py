"""Several steps of a problem on one batch as one graph.

A step of a small problem takes a few microseconds, a third of which is the call of its package; and its loss, whose
logarithms may cost as much as the gradient, is wanted of the last step only. In a graph of k steps nobody reads the
losses, so they are dead code, and what the steps have in common is computed once.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from mlopt.autodiff.join import JoinedGraph, placeholders_of
from mlopt.autodiff.step import StepGraph
from mlopt.passes import run_default_passes


@dataclasses.dataclass
class RepeatedSteps:
    """``(inputs of the step) -> what the last of `times` steps feeds back``.

    Attributes:
        module: The graph; its inputs are those of the step.
        times: How many steps it makes.
        feedback: (output, input) pairs, as in `StepGraph`.
    """

    module: fx.GraphModule
    times: int
    feedback: tuple[tuple[int, int], ...]


def repeated_steps(step: StepGraph, times: int) -> RepeatedSteps:
    """Put a step behind itself.

    Args:
        step: The step; draws no random numbers.
        times: How often.
    """
    joined = JoinedGraph()
    present = joined.inputs(placeholders_of(step.module))
    for _ in range(times):
        results = joined.append(step.module, present)
        present = list(present)
        for output, position in step.feedback:
            present[position] = results[output]
    module = joined.finish([present[position] for _, position in step.feedback])
    feedback = tuple((k, position) for k, (_, position) in enumerate(step.feedback))
    return RepeatedSteps(run_default_passes(module), times, feedback)
