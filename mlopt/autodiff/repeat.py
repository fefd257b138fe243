"""Several steps of a problem on one batch as one graph.

A step of a small problem takes a few microseconds, a third of which is the call of its package; and its loss, whose
logarithms may cost as much as the gradient, is wanted of the last step only. In a graph of k steps nobody reads the
losses, so they are dead code, and what the steps have in common is computed once.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import fx

from mlopt.autodiff.join import JoinedGraph, placeholders_of
from mlopt.autodiff.step import StepGraph
from mlopt.passes import is_random, run_default_passes, size_hint

# More numbers than that take longer to read than a package takes to be called.
_MOST_NUMBERS = 1 << 17
_TIMES = range(4, 13)  # compiling takes longer the more steps there are


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


def num_repeated(step: StepGraph, steps: int) -> int:
    """Return how many steps one graph should make; 0 where such a graph is not worth having.

    It is where steps are so small that their calls count, and draw no random numbers.

    Args:
        step: The step.
        steps: How many are made in a row, without the last one, which is made by itself, for its loss; they should be a
            multiple, or little more.
    """
    if steps < min(_TIMES) or is_random(step.module):
        return 0
    inputs = [n.meta["val"] for n in placeholders_of(step.module)]
    if sum(math.prod(size_hint(n) for n in x.shape) for x in inputs if isinstance(x, torch.Tensor)) > _MOST_NUMBERS:
        return 0
    return min((t for t in _TIMES if t <= steps), key=lambda t: (steps % t, -t))
