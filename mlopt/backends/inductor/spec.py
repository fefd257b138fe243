"""`GraphSpec`: an FX graph as plain data.

It is what goes to a compiling process and what the disk cache hashes, so it holds nothing of the process that made it:
operations by name, sizes as expressions over numbered symbols, no tensor at all (constants become inputs).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from mlopt import ops


class UnsupportedGraphError(Exception):
    """A graph holds something that cannot be handed to Inductor; the text says what."""


@dataclasses.dataclass(frozen=True)
class Ref:
    """An argument that is the value of an earlier node."""

    node: int


@dataclasses.dataclass(frozen=True)
class NodeSpec:
    """A call: the operation by name, and its arguments, in which `Ref` stands for nodes."""

    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class SymbolSpec:
    """A free size: its value in the example, and the range the graph was traced for (None: no bound)."""

    hint: int
    lower: int
    upper: int | None


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """A tensor input. Sizes and strides are expressions over the symbols ``x0``, ``x1``, ..."""

    sizes: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True)
class GraphSpec:
    """A functional graph ``f(*tensors) -> tensors``.

    Attributes:
        symbols: The free sizes.
        inputs: The inputs; node k < len(inputs) is input k.
        nodes: The calls after them, in order.
        outputs: The nodes returned.
    """

    symbols: tuple[SymbolSpec, ...]
    inputs: tuple[InputSpec, ...]
    nodes: tuple[NodeSpec, ...]
    outputs: tuple[int, ...]

    def text(self) -> str:
        """Write the graph as text; equal graphs give equal texts in every process."""
        lines = [str(s) for s in self.symbols]
        lines += [f"{x.sizes} {x.strides} {x.dtype} {x.device}" for x in self.inputs]
        lines += [f"{n.target} {n.args} {n.kwargs}" for n in self.nodes]
        return "\n".join([*lines, str(self.outputs)])

    def digest(self, *more: str) -> str:
        """Hash the graph together with whatever else decides what is compiled."""
        return hashlib.sha256("\0".join([self.text(), *more]).encode()).hexdigest()

    def rebuild(self) -> tuple[fx.GraphModule, list[torch.Tensor], ShapeEnv, list[sympy.Symbol]]:
        """Make the graph and fake inputs for it.

        Returns:
            The module, the fake tensors, the shape environment they live in, and its symbols in the order of
            `symbols`.
        """
        shape_env = ShapeEnv()
        symbols, sizes = [], []
        for k, spec in enumerate(self.symbols):
            source = ConstantSource(f"x{k}")
            # Not create_symbol's duck shaping: two sizes that are equal in the example stay two symbols.
            symbol = shape_env.create_symbol(
                spec.hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
            )
            assert isinstance(symbol, sympy.Symbol)
            upper = int_oo if spec.upper is None else spec.upper
            shape_env.var_to_range[symbol] = ValueRanges(spec.lower, upper)
            symbols.append(symbol)
            sizes.append(shape_env.create_symintnode(symbol, hint=spec.hint, source=source))
        named = {sympy_symbol(k): symbol for k, symbol in enumerate(symbols)}
        hints = {sympy_symbol(k): spec.hint for k, spec in enumerate(self.symbols)}

        def concrete(expr: sympy.Expr) -> Any:
            if not expr.free_symbols:
                return int(expr)
            return shape_env.create_symintnode(expr.xreplace(named), hint=int(expr.xreplace(hints)))

        graph = fx.Graph()
        values: list[fx.Node] = []
        fakes: list[torch.Tensor] = []
        with FakeTensorMode(shape_env=shape_env):
            for k, x in enumerate(self.inputs):
                size, stride = [concrete(e) for e in x.sizes], [concrete(e) for e in x.strides]
                fakes.append(torch.empty_strided(size, stride, dtype=x.dtype, device=x.device))
                values.append(graph.placeholder(f"in{k}"))
                values[-1].meta["val"] = fakes[-1]
        for node in self.nodes:
            arguments = tuple(_map(node.args, lambda r: values[r.node]))
            keywords = {name: _map(value, lambda r: values[r.node]) for name, value in node.kwargs}
            values.append(graph.call_function(_find(node.target), arguments, keywords))
        graph.output(tuple(values[k] for k in self.outputs))
        module = fx.GraphModule(torch.nn.Module(), graph)
        return module, fakes, shape_env, symbols


def sympy_symbol(k: int) -> sympy.Symbol:
    """Return the symbol by which a spec names free size k."""
    return sympy.Symbol(f"x{k}", integer=True, positive=True)


def name_target(target: Any) -> str:
    """Name an operation so that another process finds it.

    Raises:
        UnsupportedGraphError: It is neither one of torch's own nor one of `mlopt.ops`.
    """
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace not in ("aten", "prims", "mlopt"):
            raise UnsupportedGraphError(f"custom operation {target}")
        return f"op:{target}"
    name = f"{getattr(target, '__module__', '')}:{getattr(target, '__qualname__', '')}"
    try:
        if _find(name) is target and name.split(":")[0].split(".")[0] in ("_operator", "math", "torch"):
            return name
    except (ImportError, AttributeError, ValueError):
        pass
    raise UnsupportedGraphError(f"operation {target}")


def encode(value: Any, refs: dict[fx.Node, Any]) -> Any:
    """Turn an argument of a node into plain data.

    Args:
        value: The argument.
        refs: What stands for each node: a `Ref` or a literal.

    Raises:
        UnsupportedGraphError: It holds something that is not plain data.
    """
    if isinstance(value, fx.Node):
        return refs[value]
    if isinstance(value, tuple | list):
        return tuple(encode(v, refs) for v in value)
    plain = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    if value is None or isinstance(value, plain):
        return value
    raise UnsupportedGraphError(f"argument of type {type(value).__name__}")


def _find(name: str) -> Callable[..., Any]:
    kind, path = name.split(":")
    if path.startswith("mlopt."):
        ops.available()  # registers them
    found: Any = torch.ops if kind == "op" else importlib.import_module(kind)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _map(value: Any, function: Callable[[Ref], fx.Node]) -> Any:
    if isinstance(value, Ref):
        return function(value)
    return [_map(v, function) for v in value] if isinstance(value, tuple) else value
