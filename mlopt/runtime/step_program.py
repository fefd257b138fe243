"""`StepProgram`: steps of one problem that are made and written in one call: by a kernel, and the last by its graph."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from mlopt import ops
from mlopt.backends import Compiled, NativeDescent
from mlopt.runtime.programs import UnsuitableError, bound_call
from mlopt.runtime.shield import shield


class StepProgram:
    """Makes a number of steps and writes the new values, for tensors of fixed sizes.

    Args:
        call: The graph of one step.
        feedback: (output, argument) pairs of the graph.
        targets: For each of these, the live tensor that the last value is written into.
        num_results: How many outputs, from the first, are results.
        arguments: Those of the first step, now.
        descent: What makes all steps but the last, and how many; None to make one step.

    Raises:
        UnsuitableError: It cannot be: a graph is not native, or a result is no tensor.
    """

    def __init__(
        self,
        call: Compiled,
        feedback: Sequence[tuple[int, int]],
        targets: Sequence[torch.Tensor | None],
        num_results: int,
        arguments: Sequence[torch.Tensor],
        descent: tuple[NativeDescent, int] | None,
    ) -> None:
        self._targets = list(targets)
        self._program = importlib.import_module("mlopt._C").Program(len(arguments))
        registers = list(range(len(arguments)))
        if descent is not None:
            native, count = descent
            tables = self._call(native.tables, arguments, registers)
            positions = [feedback[k][1] for k in native.order]
            made = self._program.add_descent(native.steps, tables, [registers[p] for p in positions], count)
            for position, register in zip(positions, made, strict=True):
                registers[position] = register
        outputs = self._call(call, arguments, registers)
        self._results = outputs[:num_results]
        for (output, _), target in zip(feedback, targets, strict=True):
            if target is None:
                raise UnsuitableError("a step makes state, or changes a number of the optimizer's")
            self._program.write(outputs[output], target)
        if min(outputs) < 0:
            raise UnsuitableError("an output is no tensor")

    def _call(self, compiled: Compiled, arguments: Sequence[torch.Tensor], registers: Sequence[int]) -> list[int]:
        added: list[int] = self._program.add_call(bound_call(compiled, arguments), registers)
        return added

    def writes_into(self, targets: Sequence[torch.Tensor | None]) -> bool:
        """Whether these are the tensors that it writes into."""
        return all(a is b for a, b in zip(targets, self._targets, strict=True))

    def call(self, arguments: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor], list[int]]:
        """Return the program, what it is given, and the registers of the last step's results."""
        return self._program, arguments, self._results

    def run(self, arguments: Sequence[torch.Tensor]) -> list[Any]:
        """Make the steps; return the results of the last.

        Raises:
            RuntimeError: A tensor is not what it was, or a kernel cannot make these steps; nothing was written.
        """
        made = self._program.run(arguments, self._results, ops.recorder_for(arguments[0].device))
        results: list[Any] = made.values
        shield.held = True
        made.write()
        return results
