"""Between a graph as mlopt calls it and what a package takes and returns.

A package takes tensors and returns tensors that it computed. A graph may also take sizes, and may return None,
numbers, one of its inputs, a constant, or one value twice. `cut_interface` moves all of that out of the graph, into a
`CallPlan`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from mlopt.backends.inductor.spec import (
    GraphSpec,
    InputSpec,
    NodeSpec,
    Ref,
    SymbolSpec,
    UnsupportedGraphError,
    encode,
    name_target,
    sympy_symbol,
)
from mlopt.passes import ancestors, draws_random


@dataclasses.dataclass(frozen=True)
class Binding:
    """Where a free size is read: argument `argument` is a number, or has it, times `factor`, as its size `dim`."""

    argument: int
    dim: int | None
    factor: int


@dataclasses.dataclass(frozen=True)
class Computed:
    """Output number `index` of the package."""

    index: int


@dataclasses.dataclass(frozen=True)
class Argument:
    """Argument `index`, handed through."""

    index: int


@dataclasses.dataclass(frozen=True)
class Size:
    """A number made of free sizes."""

    expression: sympy.Expr


@dataclasses.dataclass(frozen=True)
class Literal:
    """None, a number, or a constant tensor."""

    value: Any


Output = Computed | Argument | Size | Literal


@dataclasses.dataclass(frozen=True)
class CallPlan:
    """How to call a package in place of its graph.

    Attributes:
        num_arguments: How many arguments the graph takes.
        bindings: Where each free size is read.
        arguments: Which arguments the package takes first.
        constants: What it takes next.
        carriers: What it takes last: for each of these sizes a tensor of that length, whose elements nobody reads. A
            package learns a size from a tensor only, and not every size is the size of a tensor it takes.
        outputs: What the graph returns.
    """

    num_arguments: int
    bindings: tuple[Binding, ...]
    arguments: tuple[int, ...]
    constants: tuple[torch.Tensor, ...]
    carriers: tuple[sympy.Symbol, ...]
    outputs: tuple[Output, ...]


def cut_interface(module: fx.GraphModule) -> tuple[GraphSpec, CallPlan]:
    """Split a functional graph into what is compiled and how it is called.

    Args:
        module: The graph; every placeholder and call has its fake value in ``meta["val"]``.

    Returns:
        The graph as data, and the plan of its calls.

    Raises:
        UnsupportedGraphError: The graph cannot be compiled; says why.
    """
    return _Cutter(module).cut()


class _Cutter:
    def __init__(self, module: fx.GraphModule) -> None:
        self._module = module
        nodes = list(module.graph.nodes)
        self._placeholders = [n for n in nodes if n.op == "placeholder"]
        self._calls = [n for n in nodes if n.op == "call_function"]
        self._attributes = {n: _constant(module, n) for n in nodes if n.op == "get_attr"}
        others = [n.format_node() for n in nodes if n.op in ("call_module", "call_method")]
        if others:
            raise UnsupportedGraphError(f"not a flat graph: {others[0]}")
        (self._returned,) = (n.args[0] for n in nodes if n.op == "output")
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}  # of the traced graph -> of the spec
        self._specs: list[SymbolSpec] = []
        self._refs: dict[fx.Node, Any] = {}
        self._inputs: list[InputSpec] = []
        self._nodes: list[NodeSpec] = []
        self._where: dict[sympy.Symbol, tuple[int, int]] = {}  # spec symbol -> input of the package, its dimension
        self._size_nodes: dict[sympy.Symbol, Ref] = {}

    def cut(self) -> tuple[GraphSpec, CallPlan]:
        outputs, wanted = self._outputs()
        needed = ancestors(wanted)
        calls = [n for n in self._calls if n in needed or draws_random(n)]  # the next one draws after it
        needed = ancestors(calls) | needed
        tensors = [
            (k, n) for k, n in enumerate(self._placeholders) if n in needed and isinstance(n.meta["val"], torch.Tensor)
        ]
        for _, node in tensors:
            self._refs[node] = self._input(node.meta["val"])
        constants = [(n, t) for n, t in self._attributes.items() if n in needed]
        for node, tensor in constants:
            self._refs[node] = self._input(tensor)
        numbers = [n for n in self._placeholders if n in needed and not isinstance(n.meta["val"], torch.Tensor)]
        expressions = [self._number(n.meta["val"]) for n in numbers]
        carriers = self._carriers(expressions)
        for node, expression in zip(numbers, expressions, strict=True):
            self._refs[node] = self._emit(expression)
        for node in calls:
            keywords = tuple((name, encode(value, self._refs)) for name, value in node.kwargs.items())
            self._refs[node] = self._call(name_target(node.target), encode(node.args, self._refs), keywords)
        spec = GraphSpec(
            tuple(self._specs), tuple(self._inputs), tuple(self._nodes), tuple(self._refs[n].node for n in wanted)
        )
        plan = CallPlan(
            num_arguments=len(self._placeholders),
            bindings=tuple(self._binding(s) for s in self._symbols),
            arguments=tuple(k for k, _ in tensors),
            constants=tuple(t for _, t in constants),
            carriers=carriers,
            outputs=outputs,
        )
        return spec, plan

    def _outputs(self) -> tuple[tuple[Output, ...], list[fx.Node]]:
        wanted: dict[fx.Node, int] = {}
        outputs: list[Output] = []
        for value in self._returned:
            if not isinstance(value, fx.Node):
                outputs.append(Literal(value))
            elif value in self._placeholders:
                outputs.append(Argument(self._placeholders.index(value)))
            elif value in self._attributes:
                outputs.append(Literal(self._attributes[value]))
            elif isinstance(value.meta["val"], torch.Tensor):
                outputs.append(Computed(wanted.setdefault(value, len(wanted))))
            else:
                expression = self._number(value.meta["val"])
                outputs.append(Size(expression) if expression.free_symbols else Literal(_plain(expression)))
        if not wanted:
            raise UnsupportedGraphError("it computes no tensor")
        return tuple(outputs), list(wanted)

    def _input(self, tensor: torch.Tensor) -> Ref:
        if type(tensor) not in (FakeTensor, torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise UnsupportedGraphError(f"an input of type {type(tensor).__name__}, {tensor.layout}")
        if tensor.is_conj() or tensor.is_neg():
            raise UnsupportedGraphError("a conjugate or negative view as input")
        sizes = tuple(self._number(s) for s in tensor.size())
        strides = tuple(self._number(s) for s in tensor.stride())
        self._inputs.append(InputSpec(sizes, strides, tensor.dtype, tensor.device))
        for dim, size in enumerate(sizes):
            if isinstance(size, sympy.Symbol):
                self._where.setdefault(size, (len(self._inputs) - 1, dim))
        return Ref(len(self._inputs) - 1)

    def _carriers(self, expressions: Sequence[sympy.Expr]) -> tuple[sympy.Symbol, ...]:
        """Add an input for every free size that no input has as a size of its own."""
        all_sizes = [e for x in self._inputs for e in (*x.sizes, *x.strides)]
        used = sorted({s for e in [*all_sizes, *expressions] for s in e.free_symbols}, key=str)
        carriers = tuple(s for s in used if s not in self._where)
        for symbol in carriers:
            self._where[symbol] = (len(self._inputs), 0)
            one = (sympy.Integer(1),)
            self._inputs.append(InputSpec((symbol,), one, torch.float32, torch.device("cpu")))
        return carriers

    def _number(self, value: Any) -> sympy.Expr:
        """Return a size as an expression over the symbols of the spec."""
        if isinstance(value, int | float):
            return sympy.sympify(value)
        if not isinstance(value, torch.SymInt | torch.SymFloat):
            raise UnsupportedGraphError(f"a value of type {type(value).__name__} between graphs")
        expression, shape_env = value.node.expr, value.node.shape_env
        return expression.xreplace({s: self._symbol(s, shape_env) for s in sorted(expression.free_symbols, key=str)})

    def _symbol(self, symbol: sympy.Symbol, shape_env: ShapeEnv) -> sympy.Symbol:
        if symbol not in self._symbols:
            # Only sizes that a real example has are in it. (Newer torch has renamed it.)
            renamed = hasattr(shape_env, "backed_var_to_val")
            hint = (shape_env.backed_var_to_val if renamed else shape_env.var_to_val).get(symbol)
            if hint is None:
                raise UnsupportedGraphError("a size that depends on data")
            bounds = shape_env.var_to_range[symbol]
            upper = int(bounds.upper) if bounds.upper.is_Integer else None
            self._symbols[symbol] = sympy_symbol(len(self._symbols))
            self._specs.append(SymbolSpec(int(hint), int(bounds.lower), upper))
        return self._symbols[symbol]

    def _binding(self, symbol: sympy.Symbol) -> Binding:
        """Find the argument that tells a free size."""
        for k, node in enumerate(self._placeholders):
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and value.node.expr == symbol:
                return Binding(k, None, 1)
            if isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.size()):
                    if isinstance(size, torch.SymInt) and size.node.expr.free_symbols == {symbol}:
                        factor = size.node.expr / symbol
                        if factor.is_Integer:
                            return Binding(k, dim, int(factor))
        raise UnsupportedGraphError(f"no input tells the size {symbol}")

    def _call(self, target: str, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...] = ()) -> Ref:
        self._nodes.append(NodeSpec(target, args, kwargs))
        return Ref(len(self._inputs) + len(self._nodes) - 1)

    def _emit(self, expression: sympy.Expr) -> Any:
        """Compute a size inside the graph."""
        if expression.is_Integer:
            return int(expression)
        if isinstance(expression, sympy.Symbol):
            if expression not in self._size_nodes:
                tensor, dim = self._where[expression]
                self._size_nodes[expression] = self._call("op:aten.sym_size.int", (Ref(tensor), dim))
            return self._size_nodes[expression]
        names = {sympy.Add: "add", sympy.Mul: "mul", FloorDiv: "floordiv", Mod: "mod", PythonMod: "mod"}
        if expression.func not in names:
            raise UnsupportedGraphError(f"the size {expression}")
        first, *rest = [self._emit(e) for e in expression.args]
        for value in rest:
            first = self._call(f"_operator:{names[expression.func]}", (first, value))
        return first


def _plain(expression: sympy.Expr) -> int | float:
    return int(expression) if expression.is_Integer else float(expression)


def _constant(module: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        raise UnsupportedGraphError(f"the attribute {node.target} of type {type(value).__name__}")
    return value.detach()
