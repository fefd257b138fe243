"""Runs a lowered graph many times, each time on what it returned before; or what makes as many steps in its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from mlopt import ops
from mlopt.backends.base import Changing, Compiled, Lowering

# Below, what all steps of a `Descent` have in common costs more than is gained.
FEWEST_STEPS = 4


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


@dataclasses.dataclass(frozen=True)
class Leap:
    """A graph that makes several of the calls at once, where batch and numbers stay the same.

    Attributes:
        call: The graph; its arguments are those of a single call.
        changing: Its feedback into the same arguments, in the same order; batch and numbers as of a single call.
        times: How many calls it makes.
    """

    call: Compiled
    changing: Changing
    times: int


@dataclasses.dataclass(frozen=True)
class NativeDescent:
    """The parts of a `Descent`, for a native program.

    Attributes:
        tables: The graph of what all steps have in common: x, scales, targets, coefficients, and whether they hold.
        steps: ``mlopt._C.GlmSteps``.
        order: For each tensor that the steps change, which pair of the feedback it is.
    """

    tables: Compiled
    steps: Any
    order: Sequence[int]


class Descent(Protocol):
    """Makes many calls of a graph, where batch and numbers stay the same, in a way of its own."""

    @property
    def lowering(self) -> Lowering:
        """What is reported of it."""

    def native(self, num_steps: int, device: torch.device) -> NativeDescent | None:
        """Return its parts, if so many steps on a device are known to be made faster by it."""

    def make(
        self, arguments: Sequence[Any], feedback: Sequence[tuple[int, int]], num_steps: int
    ) -> StepsOutcome | None:
        """Make calls; nothing is written.

        Args:
            arguments: Those of the first call.
            feedback: (output, argument) pairs, as in `Changing`.
            num_steps: How many.

        Returns:
            The new values, without outputs; None where it cannot be.
        """

    def run(
        self,
        arguments: Sequence[Any],
        feedback: Sequence[tuple[int, int]],
        num_steps: int,
        otherwise: Callable[[int], Any],
    ) -> StepsOutcome | None:
        """Do what `make` does, or return None where the calls are better made by the graph.

        Args:
            arguments: As in `make`.
            feedback: As in `make`.
            num_steps: As in `make`.
            otherwise: Makes so many by the graph, to be measured against.
        """


class StepsLoop:
    """Calls a graph many times in a row: in one native loop if it is a package, else by a loop in Python.

    Args:
        call: The graph.
        changing: Which arguments change from call to call.
        leap: What makes several calls at once, as long as others follow.
        descent: What makes all but the last, where it can.
        is_random: Whether the graph draws random numbers.
    """

    def __init__(
        self,
        call: Compiled,
        changing: Changing,
        leap: Leap | None = None,
        *,
        descent: Descent | None = None,
        is_random: bool = False,
    ) -> None:
        self._call = call
        self._changing = changing
        self._leap = leap
        self._descent = descent
        self._is_random = is_random
        # What was made for the last arguments. The next run has most often the same tensors, with new values.
        self._known: tuple[list[Any], tuple[Any, Any, Any]] | None = None

    def run(
        self,
        arguments: Sequence[Any],
        batches: Sequence[Sequence[torch.Tensor]],
        order: Sequence[int],
        numbers: torch.Tensor,
    ) -> StepsOutcome:
        """Call the graph once per entry of `order`.

        Nothing is written; an error or Ctrl-C leaves the values after the last whole call.

        Args:
            arguments: Those of the first call.
            batches: The distinct batches, all of the sizes of the first.
            order: Which batch each call takes.
            numbers: [calls, H] float64: the numbers of each call; a stride of 0 tells that they are always the same.
        """
        steps, results, leap = self._bind(arguments)
        if steps is None:
            return self._run_in_python(arguments, batches, order, numbers)
        times = self._leap.times if self._leap is not None else 1
        recorder, uniform = self._recorder(arguments, numbers), _are_uniform(batches, numbers)

        def run(count: int, fed: Sequence[torch.Tensor]) -> Any:
            rows = numbers if uniform else numbers[-count:]
            return steps.run(batches, order[-count:], rows, leap, times, fed, recorder)

        made = StepsOutcome(0, [], None, (), None)
        if self._descent is not None and uniform:
            first = list(arguments)
            for position, value in zip(self._changing.numbers, numbers[0].unbind(), strict=True):
                first[position] = value
            feedback = self._changing.feedback
            made = self._descent.run(first, feedback, len(order) - 1, lambda count: _whole(run(count, []))) or made
            if made.error is not None:
                return made
        result = run(len(order) - made.num_steps, made.fed)
        num_steps, error = made.num_steps + result.num_steps, error_of(result)
        if not result.computed:
            return StepsOutcome(num_steps, result.fed, None, (), error)
        outputs = results(arguments, result.computed)
        kept = [
            every if every is not None else _stacked([last] * result.num_steps)
            for every, last in zip(result.kept, outputs, strict=False)
        ]
        return StepsOutcome(num_steps, result.fed, outputs, kept, error)

    def _recorder(self, arguments: Sequence[Any], numbers: torch.Tensor) -> Any:
        """Return what records a call, if all of them launch the same: a recording holds numbers of the host, too."""
        devices = {arguments[position].device for _, position in self._changing.feedback}
        constant = numbers.stride(0) == 0 or not self._changing.numbers
        if self._is_random or not constant or len(devices) != 1:
            return None
        return ops.recorder_for(devices.pop())

    def _run_in_python(
        self,
        arguments: Sequence[Any],
        batches: Sequence[Sequence[torch.Tensor]],
        order: Sequence[int],
        numbers: torch.Tensor,
    ) -> StepsOutcome:
        """Do what `Steps::run` of csrc/runtime/steps.cpp does."""
        leap, made = self._leap, 0
        leaps = (len(order) - 1) // leap.times if leap is not None and _are_uniform(batches, numbers) else 0
        if leap is not None and leaps:
            first = _loop_in_python(leap.call, arguments, leap.changing, batches, order[:leaps], numbers[:leaps])
            made = first.num_steps * leap.times
            if first.error is not None:
                return StepsOutcome(made, first.fed, None, (), first.error)
            arguments = list(arguments)
            for (_, position), value in zip(leap.changing.feedback, first.fed, strict=True):
                arguments[position] = value
        last = _loop_in_python(self._call, arguments, self._changing, batches, order[made:], numbers[made:])
        return dataclasses.replace(last, num_steps=made + last.num_steps)

    def _bind(self, arguments: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Return the native loop, what makes results of its outputs, and the loop of leaps; None for what is not."""
        key = list(arguments)
        for position in self._changing.batch:
            key[position] = key[position].shape  # every run brings tensors of its own
        if self._known is not None and all(map(_is_same, key, self._known[0])):
            return self._known[1]
        native = self._call.native_steps(arguments, self._changing)
        leap = self._leap and self._leap.call.native_steps(arguments, self._leap.changing)
        bound = (None, None, None) if native is None else (*native, leap and leap[0])
        self._known = None if native is None else (key, bound)
        return bound


def error_of(result: Any) -> BaseException | None:
    """Return what ended a native loop early; KeyboardInterrupt, too: the caller stores the steps made, then raises."""
    try:
        result.raise_error()
    except BaseException as raised:
        return raised
    return None


def _whole(result: Any) -> Any:
    """Return the result of a native loop if nothing ended it early; raise that otherwise."""
    result.raise_error()
    return result


def _are_uniform(batches: Sequence[Sequence[torch.Tensor]], numbers: torch.Tensor) -> bool:
    """Whether all calls are of one batch and the same numbers."""
    return len(batches) == 1 and numbers.stride(0) == 0


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and bool(a == b))


def _loop_in_python(
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
