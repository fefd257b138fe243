"""`NativeSteps`: steps of problems above others as one native program each, where nothing in them needs Python.

Such a step is a handful of calls: the gradient of the problem's own loss, for every problem below a linearization, a
solve and mixed products, and the update. In a small program they take less time than what leads from one to the next in
Python. So a step that has been made once is put together as a `mlopt._C.Program`, with its packages, for the sizes that
they were called with. The user's objects stay the truth: a program reads the live tensors and writes into them, and is
left aside as soon as anything is not as it was.
"""

from __future__ import annotations

import dataclasses
import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mlopt import ops
from mlopt.autodiff import FlatLayout
from mlopt.backends import Compiled
from mlopt.capture import LossGraph
from mlopt.hypergradient import CG, Neumann
from mlopt.linalg import Solution
from mlopt.linalg.solvers.cg import cg_check_every, cg_solution
from mlopt.linalg.solvers.neumann import neumann_solution
from mlopt.planner import ExecutionPlan, Gradient, Linearize, MixedProduct, Solve, Update
from mlopt.planner.instructions import HYPERGRADIENT
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import AbstractDerivatives, GraphDerivatives
from mlopt.runtime.programs import Programs, ReadyStep, UnsuitableError, Wanted, bound_call
from mlopt.runtime.shield import shield

_NO_TENSOR = -1  # mlopt::BoundCall::kNothing


@dataclasses.dataclass(frozen=True)
class _Value:
    """A register of the program, or `_NO_TENSOR`, and what it held when the step was put together."""

    register: int
    then: Any


@dataclasses.dataclass(frozen=True)
class _Solved:
    """A solve of the program: the registers that tell how it went."""

    instruction: Solve
    registers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class NativeOutcome:
    """What came of a step.

    Attributes:
        results: Loss and metrics.
        solutions: For each solve.
        write: Makes the update. Nothing is changed before.
    """

    results: dict[str, Any]
    solutions: list[tuple[Solve, Solution]]
    write: Callable[[], None]


class NativeStep:
    """One step as a program, for derivatives and sizes that the caller answers for.

    Args:
        plan: The instructions.
        layouts: Flat layouts by problem.
        name: The problem.
        derivatives: Of this problem and of those that its step linearizes.
        batches: What they are evaluated on.

    Raises:
        UnsuitableError: It cannot be.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        layouts: Mapping[str, FlatLayout],
        name: str,
        derivatives: Mapping[str, GraphDerivatives],
        batches: Mapping[str, Batch],
    ) -> None:
        update = derivatives[name].update
        if update is None:
            raise UnsuitableError("its update is not compiled")
        self._derivatives = derivatives  # alive as long as their ids stand for them
        self._device = layouts[name].device
        self._update, self._targets = update, update.targets()
        self._losses = [derivatives[key].graphs.loss for key in batches]
        built = _Builder(plan, name, derivatives, self._losses, self._given(batches), self._targets)
        self._program, self._wanted, self._solved = built.program, built.wanted, built.solved

    def is_right(self) -> bool:
        """Whether the update would write into the same tensors."""
        return all(map(operator.is_, self._update.targets(), self._targets))

    def call(self, batches: Mapping[str, Batch]) -> tuple[Any, list[torch.Tensor], list[int]]:
        """Return the program, what it is given, and the registers that `results` and `solutions` read."""
        return self._program, self._given(batches), self._wanted

    def run(self, batches: Mapping[str, Batch]) -> NativeOutcome:
        """Make the step, as far as nothing is changed.

        Raises:
            RuntimeError: A tensor is not what it was.
        """
        program, given, wanted = self.call(batches)
        made = program.run(given, wanted, ops.recorder_for(self._device))

        def write() -> None:
            shield.held = True
            made.write()
            self.written()

        return NativeOutcome(self.results(made.values), self.solutions(made.values), write)

    def results(self, values: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return loss and metrics."""
        end = 1 + len(self._losses[0].metrics)
        return {"loss": values[0], **self._losses[0].named_metrics(values[1:end])}

    def solutions(self, values: Sequence[torch.Tensor]) -> list[tuple[Solve, Solution]]:
        """Return how each solve went."""
        end = 1 + len(self._losses[0].metrics)
        found = []
        for solved in self._solved:
            start, end = end, end + len(solved.registers)
            found.append((solved.instruction, _solution(solved.instruction, values[start:end])))
        return found

    def unchanged(self) -> Callable[[], bool]:
        """Return what tells whether `call` would give the same: see `LoweredUpdate.unchanged`."""
        return self._update.unchanged()

    def written(self) -> None:
        """Do what is left to do where the new values have been written."""
        self._update.written()

    def _given(self, batches: Mapping[str, Batch]) -> list[torch.Tensor]:
        given: list[torch.Tensor] = []
        for loss, batch in zip(self._losses, batches.values(), strict=True):
            given += loss.bind(batch.tensors)
        return given + self._update.given()


class _Builder:
    """Puts the program of a step together. What it keeps of the step that it makes for that dies with it.

    Args:
        plan: The instructions.
        name: The problem.
        derivatives: Of this problem and of those that its step linearizes.
        losses: Their losses.
        given: What the program is given: the inputs of each loss, then those of the update.
        targets: What the update writes into.

    Attributes:
        program: The program.
        wanted: The registers of the loss, the metrics, and what tells how each solve went.
        solved: The solves.
    """

    def __init__(
        self,
        plan: ExecutionPlan,
        name: str,
        derivatives: Mapping[str, GraphDerivatives],
        losses: Sequence[LossGraph],
        given: Sequence[torch.Tensor],
        targets: Sequence[torch.Tensor | None],
    ) -> None:
        self.program = importlib.import_module("mlopt._C").Program(len(given))
        self.solved: list[_Solved] = []
        self._own = derivatives[name]
        self._slots: dict[str, _Value] = {}
        self._residuals: dict[str, list[_Value]] = {}
        values = iter([_Value(k, t) for k, t in enumerate(given)])
        inputs = {loss.problem: [next(values) for _ in loss.inputs] for loss in losses}
        for instruction in plan[name].instructions:
            if isinstance(instruction, Gradient):
                gradient = self._gradient(instruction, inputs[name])
            elif isinstance(instruction, Linearize):
                key = instruction.problem
                self._residuals[key] = self._call(derivatives[key].compiled("primal"), inputs[key])
            elif isinstance(instruction, Solve):
                if instruction.problem not in self._residuals:
                    raise UnsuitableError(f"{instruction.estimator!r} multiplies with no Hessian")
                self._solve(instruction, derivatives[instruction.problem])
            elif isinstance(instruction, MixedProduct) and instruction.step is None:
                self._mixed(instruction, derivatives[instruction.problem])
            elif not isinstance(instruction, Update):
                raise UnsuitableError(f"{instruction}: no part of a native program")
        loss, metrics, own, buffers = gradient
        self._write(own, list(values), buffers, targets)
        self.wanted = [loss, *metrics, *(register for solved in self.solved for register in solved.registers)]

    def _call(self, compiled: Compiled, arguments: Sequence[_Value]) -> list[_Value]:
        now = [value.then for value in arguments]
        outputs = compiled(*now)
        registers = self.program.add_call(bound_call(compiled, now), [value.register for value in arguments])
        return [_Value(register, output) for register, output in zip(registers, outputs, strict=True)]

    def _gradient(
        self, instruction: Gradient, inputs: list[_Value]
    ) -> tuple[int, list[int], list[_Value], list[tuple[torch.Tensor, int]]]:
        graph, loss = self._own.graphs.gradient, self._own.graphs.loss
        outputs = iter(self._call(self._own.compiled("gradient"), inputs))
        value, *metrics = [next(outputs) for _ in range(1 + len(loss.metrics))]
        own = [next(outputs) for _ in graph.own]
        cotangents = {key: next(outputs) for key in graph.cotangents}
        buffers = [(loss.live(i), _register(next(outputs))) for i in graph.written_buffers]
        for key, slot in instruction.cotangents:
            self._add(slot, 1.0, cotangents[key])
        return _register(value), [_register(m) for m in metrics], own, buffers

    def _add(self, slot: str, sign: float, value: _Value) -> None:
        present = self._slots.get(slot)
        if present is None and sign == 1.0:
            self._slots[slot] = value
            return
        base = _NO_TENSOR if present is None else _register(present)
        then = sign * value.then if present is None else present.then + sign * value.then
        self._slots[slot] = _Value(self.program.add_sum(base, sign, _register(value)), then)

    def _solve(self, instruction: Solve, derivatives: GraphDerivatives) -> None:
        estimator, rhs = instruction.estimator, self._slots[instruction.rhs]
        is_cg = type(estimator) is CG and estimator.preconditioner is None and not estimator.warm_start
        if not (is_cg or (type(estimator) is Neumann and estimator.uses_hvp)):
            raise UnsuitableError(f"{estimator!r} has no native loop")
        residuals, compiled = self._residuals[instruction.problem], derivatives.compiled("hvp")
        arguments = [*residuals, rhs]
        compiled.native_operator([*(value.then for value in residuals), None], len(residuals))  # it may measure first
        if compiled.is_kernel:
            raise UnsuitableError("its products are a kernel's")
        bound = bound_call(compiled, [value.then for value in arguments])
        given = (bound, [value.register for value in arguments], len(residuals))
        if isinstance(estimator, CG):
            settings = (estimator.damping, _register(rhs), estimator.rtol, estimator.max_steps)
            registers = self.program.add_cg(*given, *settings, cg_check_every(rhs.then))
        else:
            assert isinstance(estimator, Neumann)
            registers = self.program.add_neumann(*given, _register(rhs), estimator.num_terms, estimator.scale)
            registers = [*registers, _register(rhs)]
        self.solved.append(_Solved(instruction, tuple(registers[1:])))
        self._slots[instruction.out] = _Value(registers[0], torch.zeros_like(rhs.then))

    def _mixed(self, instruction: MixedProduct, derivatives: GraphDerivatives) -> None:
        linearization = derivatives.graphs.linearization
        assert linearization is not None
        arguments = [*self._residuals[instruction.problem], self._slots[instruction.vector]]
        products = self._call(derivatives.compiled("mixed"), arguments)
        by_problem = dict(zip(linearization.targets, products, strict=True))
        for key, slot in instruction.targets:
            self._add(slot, -1.0, by_problem[key])

    def _write(
        self,
        own: list[_Value],
        given: list[_Value],
        buffers: list[tuple[torch.Tensor, int]],
        targets: Sequence[torch.Tensor | None],
    ) -> None:
        """Make the update, whose inputs end in `given`, and write all that changes."""
        update = self._own.update
        assert update is not None
        graph = update.graph
        parameters, settings = given[: len(graph.parameters)], given[len(graph.parameters) :]
        direct = [own[i] for i in graph.direct]
        outputs = self._call(update.call, [*parameters, *direct, self._slots[HYPERGRADIENT], *settings])
        for target, value in zip(targets, outputs, strict=True):
            if target is None:
                raise UnsuitableError("the optimizer has no state yet, or it keeps numbers that a step changes")
            self.program.write(_register(value), target)
        for live, register in buffers:
            self.program.write(register, live)


class NativeSteps:
    """Makes steps by programs, which are put together when a step has been made a few times.

    Args:
        plan: The instructions.
        layouts: Flat layouts by problem.
    """

    def __init__(self, plan: ExecutionPlan, layouts: Mapping[str, FlatLayout]) -> None:
        self._plan, self._layouts = plan, layouts
        self._programs: Programs[NativeStep] = Programs()

    def step(
        self, name: str, batches: Mapping[str, Batch], derive: Callable[[str, Batch], AbstractDerivatives]
    ) -> NativeOutcome | None:
        """Make a step of a problem, as far as nothing is changed; None if it is to be made in the usual way.

        Args:
            name: The problem, whose update would be made by its compiled graph.
            batches: Of the problem itself, first, and of those that its step linearizes.
            derive: Gives the derivatives that are valid for a batch.
        """
        wanted = self._program(name, batches, derive)
        program = self._programs.get(wanted)
        if program is None:
            return None
        try:
            return program.run(batches)
        except RuntimeError as error:
            self._programs.give_up(wanted, error)
            return None

    def ready(
        self, name: str, batches: Mapping[str, Batch], derive: Callable[[str, Batch], AbstractDerivatives]
    ) -> ReadyStep | None:
        """Return what makes a step, if its program has been put together. Arguments: as for `step`."""
        wanted = self._program(name, batches, derive)
        program = self._programs.ready(wanted)
        if program is None:
            return None
        return ReadyStep(
            program.call(batches),
            program.unchanged(),
            program.results,
            program.solutions,
            program.written,
            lambda error: self._programs.give_up(wanted, error),
        )

    def _program(
        self, name: str, batches: Mapping[str, Batch], derive: Callable[[str, Batch], AbstractDerivatives]
    ) -> Wanted[NativeStep]:
        derivatives = {key: derive(key, batch) for key, batch in batches.items()}
        made_by = [(id(d), id(d.backend)) for d in derivatives.values()]
        return Wanted(
            name,
            (name, id(derivatives[name].update), *made_by, *[_sizes(b) for b in batches.values()]),
            NativeStep.is_right,
            lambda: self._build(name, derivatives, batches),
        )

    def _build(
        self, name: str, derivatives: Mapping[str, AbstractDerivatives], batches: Mapping[str, Batch]
    ) -> NativeStep:
        graphs = {problem: d for problem, d in derivatives.items() if isinstance(d, GraphDerivatives)}
        if len(graphs) < len(derivatives):
            raise UnsuitableError("a problem runs by plain autograd")
        if any(d.is_random for d in graphs.values()):
            raise UnsuitableError("a loss draws random numbers")
        return NativeStep(self._plan, self._layouts, name, graphs, batches)


def _register(value: _Value) -> int:
    if value.register == _NO_TENSOR:
        raise UnsuitableError("a result is no tensor")
    return value.register


def _solution(instruction: Solve, values: Sequence[torch.Tensor]) -> Solution:
    if isinstance(instruction.estimator, Neumann):
        term, b = values
        return neumann_solution(term, term, b, instruction.estimator.num_terms)
    state, scale = values
    return cg_solution(state, state, scale)


def _sizes(batch: Batch) -> object:
    return tuple([t.shape for t in batch.tensors])
