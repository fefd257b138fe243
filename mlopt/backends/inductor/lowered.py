"""`LoweredGraph`: a compiled package in place of a graph, with the eager graph behind it."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from mlopt.backends.base import Changing, Compiled, Lowering
from mlopt.backends.inductor.cache import Entry
from mlopt.backends.inductor.interface import Argument, CallPlan, Computed, Size
from mlopt.backends.inductor.spec import GraphSpec, sympy_symbol

logger = logging.getLogger(__name__)

_COMPUTED, _ARGUMENT, _VALUE = 0, 1, 2  # mlopt::OutputKind


class LoweredGraph:
    """Calls a package like the graph it was made from.

    Sizes for which the package is not right (Inductor specialized one) run by the eager graph; so does everything once
    the package has failed.

    Args:
        spec: The graph that was compiled.
        plan: How the package is called.
        entry: The package.
        eager: The graph, run by torch.
        lowering: What is reported of it.

    Attributes:
        native: The package as ``mlopt._C.Call``.
        eager: As given.
        lowering: As given.
    """

    is_kernel = False

    def __init__(self, spec: GraphSpec, plan: CallPlan, entry: Entry, eager: Compiled, lowering: Lowering) -> None:
        extension: Any = importlib.import_module("mlopt._C")
        self.eager = eager
        self.lowering = lowering
        self._spec = spec
        self._plan = plan
        self._guards = [compile(guard, "<guard>", "eval") for guard in entry.guards]
        self._refused: set[tuple[int, ...]] = set()
        self._failed = False
        self.native = extension.Call(
            extension.Package(str(entry.path), [x.dtype for x in spec.inputs], [x.device for x in spec.inputs]),
            plan.num_arguments,
            [(b.argument, -1 if b.dim is None else b.dim, b.factor) for b in plan.bindings],
            list(plan.arguments),
            list(plan.constants),
            _number_outputs(plan),
        )

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """Return what the graph returns."""
        results = self._made(arguments, lambda: self.native(*arguments))
        return self.eager(*arguments) if results is None else results

    def native_call(self, arguments: Sequence[Any]) -> Any:
        """See `Compiled`."""
        return self._made(arguments, lambda: self.native.bind(arguments))

    def native_operator(self, arguments: Sequence[Any], hole: int) -> Any:
        """See `Compiled`."""
        return self._made(arguments, lambda: self.native.operator(arguments, hole)) if self.is_operator(hole) else None

    def native_steps(self, arguments: Sequence[Any], changing: Changing) -> Any:
        """See `Compiled`."""
        given = (arguments, changing.feedback, changing.batch, changing.numbers, changing.num_kept)
        steps = self._made(arguments, lambda: self.native.steps(*given))
        return None if steps is None else (steps, self.native.results)

    def _made(self, arguments: Sequence[Any], make: Callable[[], Any]) -> Any:
        """Return what the package makes of these arguments; None if it failed, or is not right for their sizes."""
        if self._failed:
            return None
        try:
            made = make()
            if made is None and self.accepts(arguments):  # sizes not seen before
                made = make()
        except RuntimeError as error:
            self._fail(error)
            return None
        return made

    def _fail(self, error: RuntimeError) -> None:
        """Give the package up: it was compiled for something else than it is given (tracing got a size wrong, say)."""
        logger.warning("a compiled graph failed and runs eagerly from now on: %s", error)
        self._failed = True
        self.native.give_up()
        self.lowering = Lowering("eager", f"its package failed: {str(error).strip().splitlines()[0]}")

    def is_operator(self, hole: int) -> bool:
        """Whether the graph computes one tensor that depends on argument `hole`."""
        return self._plan.outputs == (Computed(0),) and hole in self._plan.arguments

    def example(self, argument: int) -> torch.Tensor:
        """Return zeros like an argument whose size is not free."""
        x = self._spec.inputs[self._plan.arguments.index(argument)]
        return torch.zeros([int(n) for n in x.sizes], dtype=x.dtype, device=x.device)

    def accepts(self, arguments: Sequence[Any]) -> bool:
        """Make the package ready for the sizes of these arguments; return whether it is right for them."""
        sizes = tuple(self.native.sizes_of(arguments))
        if sizes in self._refused:
            return False
        symbols = {sympy_symbol(k): sympy.Integer(n) for k, n in enumerate(sizes)}
        if not self._holds(sizes):
            logger.info("a compiled graph does not hold for sizes %s; they run eagerly", sizes)
            self._refused.add(sizes)
            return False

        def numbers(expressions: Sequence[sympy.Expr]) -> list[int]:
            return [int(e.xreplace(symbols)) for e in expressions]

        layouts = [(numbers(x.sizes), numbers(x.strides)) for x in self._spec.inputs]
        carriers = [torch.empty(n) for n in numbers(self._plan.carriers)]
        values: list[Any] = []
        for output in self._plan.outputs:
            if isinstance(output, Size):
                value = output.expression.xreplace(symbols)
                values.append(int(value) if value.is_Integer else float(value))
            elif not isinstance(output, Computed | Argument):
                values.append(output.value)
        self.native.add_sizes(list(sizes), layouts, carriers, values)
        return True

    def _holds(self, sizes: tuple[int, ...]) -> bool:
        for n, symbol in zip(sizes, self._spec.symbols, strict=True):
            if n < symbol.lower or (symbol.upper is not None and n > symbol.upper):
                return False
        names = {str(sympy_symbol(k)): n for k, n in enumerate(sizes)}
        return all(eval(guard, {"math": math, "torch": torch, **names}) for guard in self._guards)


def _number_outputs(plan: CallPlan) -> list[tuple[int, int]]:
    numbered: list[tuple[int, int]] = []
    num_values = 0
    for output in plan.outputs:
        if isinstance(output, Computed):
            numbered.append((_COMPUTED, output.index))
        elif isinstance(output, Argument):
            numbered.append((_ARGUMENT, output.index))
        else:
            numbered.append((_VALUE, num_values))
            num_values += 1
    return numbered
