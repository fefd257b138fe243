"""Layers of a captured loss that are differentiated in a way of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mlopt.autodiff.convolution import convolution
from mlopt.passes import is_random

_ATEN = torch.ops.aten
_CONVOLUTIONS = {
    _ATEN.conv1d.default: 1,
    _ATEN.conv2d.default: 2,
    _ATEN.conv3d.default: 3,
    _ATEN.convolution.default: None,
}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def replace_layers(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of a loss graph with layers of our own, or the graph itself if it has nothing to replace.

    Convolutions become `mlopt.autodiff.convolution.convolution`. Recurrent layers become calls without oneDNN, whose
    versions have no second derivative that can be traced. (oneDNN is not switched off for the whole trace, because it
    decides on the memory order of what convolutions return.)
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copied))
    # Random operations draw in memory order: another order of the images would give other masks than the user's code.
    reorder = not is_random(module)
    count = 0
    for old, new in copied.items():
        if old.target in _CONVOLUTIONS:
            arguments = _convolution_arguments(old)
            if arguments is None:
                continue
            new.target, new.kwargs = convolution, {}
            new.args = fx.map_arg((*arguments, reorder), lambda n: copied[n])
            count += 1
        elif isinstance(old.target, torch._ops.OpOverload) and old.target._schema.name.split("::")[1] in _RECURRENT:
            new.target, new.args = recurrent, (str(old.target), *new.args)
            count += 1
    graph.lint()
    return fx.GraphModule(module, graph) if count else module


def recurrent(operation: str, *args: Any, **kwargs: Any) -> Any:
    """Call a recurrent layer, such as ``"aten.lstm.input"``, without oneDNN."""
    _, name, overload = operation.split(".")
    with _without_onednn():
        return getattr(getattr(_ATEN, name), overload)(*args, **kwargs)


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Switch oneDNN off; `torch.backends.mkldnn.flags` would also set its TF32 mode, which warns without Intel GPUs."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _convolution_arguments(node: fx.Node) -> tuple[Any, ...] | None:
    """Return ``(input, weight, bias, stride, padding, dilation, transposed, output padding, groups)``, or None."""
    schema = node.target._schema
    values = {a.name: a.default_value for a in schema.arguments}
    values |= dict(zip([a.name for a in schema.arguments], node.args, strict=False)) | node.kwargs
    dims = _CONVOLUTIONS[node.target]
    settings = [values["stride"], values["padding"], values["dilation"]]
    if any(isinstance(s, str) for s in settings):  # padding="same"
        return None
    if dims is not None:
        settings = [[*s] * dims if len(s) == 1 else [*s] for s in settings]
    ends = [values.get("transposed", False), values.get("output_padding", [0] * len(settings[0])), values["groups"]]
    return (values["input"], values["weight"], values["bias"], *settings, *ends)
