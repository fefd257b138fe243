"""Runs a lowered graph many times, each time on what it returned before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mlopt.backends.base import Changing, Compiled


@dataclasses.dataclass(frozen=True)
class StepsOutcome:
    """What came of several calls.

    Attributes:
        num_steps: How many were made; fewer than asked for if there is an error.
        fed: Present values, one per pair of ``feedback``.
        outputs: What the last one returned; None if there was none.
        kept: The outputs that were to be kept, of all calls: [num_steps] if they are tensors of one element, None if of
            more; a Python number is the same in all calls.
        error: What ended the loop early; also `KeyboardInterrupt`.
    """

    num_steps: int
    fed: list[torch.Tensor]
    outputs: Sequence[Any] | None
    kept: Sequence[Any]
    error: BaseException | None


def run_steps(
    call: Compiled,
    arguments: Sequence[Any],
    changing: Changing,
    batches: Sequence[Sequence[torch.Tensor]],
    order: Sequence[int],
    numbers: torch.Tensor,
) -> StepsOutcome:
    """Call a graph once per entry of `order`: in one native loop if it is a package, else by a loop in Python.

    Nothing is written; an error or Ctrl-C leaves the values after the last whole call.

    Args:
        call: The graph.
        arguments: Its arguments in the first call.
        changing: Which of them change.
        batches: The distinct batches, all of the sizes of the first.
        order: Which batch each call takes.
        numbers: [calls, H] float64: the numbers of each call.
    """
    native = call.native_steps(arguments, changing)
    if native is None:
        return _run_in_python(call, arguments, changing, batches, order, numbers)
    steps, results = native
    result = steps.run(batches, order, numbers)
    error: BaseException | None = None
    try:
        result.raise_error()
    except BaseException as raised:  # KeyboardInterrupt, too: the caller stores the steps made, then raises it
        error = raised
    if not result.num_steps:
        return StepsOutcome(0, result.fed, None, (), error)
    outputs = results(arguments, result.computed)
    kept = [
        every if every is not None else _stacked([last] * result.num_steps)
        for every, last in zip(result.kept, outputs, strict=False)
    ]
    return StepsOutcome(result.num_steps, result.fed, outputs, kept, error)


def _run_in_python(
    call: Compiled,
    arguments: Sequence[Any],
    changing: Changing,
    batches: Sequence[Sequence[torch.Tensor]],
    order: Sequence[int],
    numbers: torch.Tensor,
) -> StepsOutcome:
    present, outputs, count = list(arguments), None, 0
    kept: list[Sequence[Any]] = []
    error: BaseException | None = None
    try:
        for step, number in enumerate(order):
            given = list(present)
            for position, tensor in zip(changing.batch, batches[number], strict=True):
                given[position] = tensor
            for position, value in zip(changing.numbers, numbers[step], strict=True):
                given[position] = value
            results = call(*given)
            for output, position in changing.feedback:
                given[position] = results[output]
            kept.append(results[: changing.num_kept])
            present, outputs, count = given, results, count + 1
    except BaseException as raised:
        error = raised
    every = [_stacked(values[:count]) for values in zip(*kept, strict=True)]
    return StepsOutcome(count, [present[i] for _, i in changing.feedback], outputs, every, error)


def _stacked(values: Sequence[Any]) -> Any:
    if all(isinstance(x, torch.Tensor) and x.numel() == 1 for x in values):
        return torch.stack([x.detach().reshape(()) for x in values])
    return None if isinstance(values[-1], torch.Tensor) else values[-1]
