"""Graphs and programs as bytes.

Graph modules are written by torch's own `GraphPickler`, which keeps sizes that are free; everything around them is
pickled, with references in place of live tensors. Reading a pickle can run code, like loading the machine code beside
it: only plans from a trusted place may be loaded.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mlopt.autodiff import TracedGraph
from mlopt.runtime.derivatives import DerivativeGraphs


def without_code(graphs: DerivativeGraphs) -> DerivativeGraphs:
    """Return graphs without what only a capture needs, and without the step, which is joined again when loaded."""
    nothing: Any = None
    linearization = graphs.linearization
    if linearization is not None:
        linearization = dataclasses.replace(linearization, traced=TracedGraph(nothing, linearization.traced.guard))
    loss = dataclasses.replace(graphs.loss, module=nothing, attributes=())
    return dataclasses.replace(graphs.without_updates(), loss=loss, linearization=linearization)


def dumps(value: Any, live: Mapping[int, str]) -> bytes:
    """Write a value with graph modules in it.

    Args:
        value: Anything that can be pickled, besides graph modules.
        live: ``id`` of a tensor -> the name it has when the value is read again.
    """
    stream = io.BytesIO()
    _Pickler(stream, live).dump(value)
    return stream.getvalue()


def loads(data: bytes, live: Mapping[str, torch.Tensor]) -> Any:
    """Read what `dumps` wrote; every graph module gets a shape environment of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch reads its own containers in a way that it deprecates
        return _Unpickler(io.BytesIO(data), live).load()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, live: Mapping[int, str]) -> None:
        super().__init__(stream)
        self._live = live
        self._graphs: dict[int, bytes] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor) and id(obj) in self._live:
            return ("tensor", self._live[id(obj)])
        if isinstance(obj, fx.GraphModule):
            # Equal objects are written once and read as one object.
            if id(obj) not in self._graphs:
                self._graphs[id(obj)] = GraphPickler.dumps(obj, Options(ops_filter=None))
            return ("graph", self._graphs[id(obj)])
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, live: Mapping[str, torch.Tensor]) -> None:
        super().__init__(stream)
        self._live = live
        self._graphs: dict[bytes, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, value = pid
        if kind == "tensor":
            return self._live[value]
        if value not in self._graphs:
            mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
            module: Any = GraphPickler.loads(value, mode)
            module.recompile()
            self._graphs[value] = module
        return self._graphs[value]
