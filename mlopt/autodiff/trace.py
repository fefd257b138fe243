"""Trace a function of tensors, its autograd calls included, into a functional flat graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlopt.capture.fake_cache import fake_cache
from mlopt.capture.guard import ShapeGuard
from mlopt.passes import has_writes, remove_fresh_writes_pass, size_hint

Outputs = list[torch.Tensor | torch.SymInt | torch.SymFloat | None]

# These move running statistics without saying so in their schema; capture decomposes batch_norm before they appear.
_UNDECLARED_WRITES = {
    getattr(torch.ops.aten, name).default
    for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
    if hasattr(torch.ops.aten, name)
}


@dataclasses.dataclass
class TracedGraph:
    """A functional graph and the shapes it holds for.

    Attributes:
        module: ``f(*inputs) -> tuple of tensors or None``.
        guard: For which shapes of the guarded inputs it is valid; tracing may have specialized a free size.
    """

    module: fx.GraphModule
    guard: ShapeGuard


def trace(
    function: Callable[[list[torch.Tensor]], Outputs],
    inputs: Sequence[torch.Tensor],
    dynamic_dims: Sequence[frozenset[int]],
    guarded: Sequence[int],
) -> TracedGraph:
    """Trace `function`, which may call `torch.autograd.grad`, on fake copies of `inputs`.

    Two passes: the first runs autograd and records the operations of forward and backward, the second removes
    in-place operations from that record (autograd formulas written in C++ use them); it costs as much as the first, and
    is left out where all of them can be removed by looking at the graph. Only a functional graph can be split: an
    in-place operation in the tangent half would change what the primal half handed over.

    Args:
        function: Takes the list of inputs, returns a list of tensors and None.
        inputs: Real tensors; only shapes, dtypes and devices count.
        dynamic_dims: For each input, the dimensions whose size is left free.
        guarded: Positions of the inputs whose shapes may change from call to call (the batch).

    Returns:
        The traced graph.
    """
    shape_env = ShapeEnv()
    with fake_cache(len(inputs)):
        fake_mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    examples = [_fake(fake_mode, t, dims) for t, dims in zip(inputs, dynamic_dims, strict=True)]
    # Fused attention has no second derivative: it is recorded as elementary operations.
    with fake_mode, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        module = make_fx(lambda *xs: tuple(function(list(xs))))(*examples)
        remove_fresh_writes_pass(module)
        if has_writes(module):
            with torch.no_grad():
                functional = torch.func.functionalize(module, remove="mutations")
                module = make_fx(functional)(*examples)
    keep_random_layout(module)
    _flatten_outputs(module)
    _check_functional(module)
    return TracedGraph(module, ShapeGuard(shape_env, [examples[i] for i in guarded]))


def keep_random_layout(module: fx.GraphModule) -> fx.GraphModule:
    """Let functional ``bernoulli`` calls draw in the memory order of their input, as the in-place ones do.

    Eager dropout fills a tensor that has the strides of its input, in memory order; the functional operation fills a
    contiguous one. For a transposed input (attention) the same random numbers would land on other elements, and the
    graph would see another mask than the user's code.
    """
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.bernoulli.p:
            continue
        strides = [size_hint(s) for s in node.args[0].meta["val"].stride()]
        order = sorted(range(len(strides)), key=lambda d: -strides[d])
        if order == list(range(len(strides))):
            continue
        inverse = sorted(range(len(order)), key=order.__getitem__)
        with module.graph.inserting_before(node):
            source = module.graph.call_function(torch.ops.aten.permute.default, (node.args[0], order))
        with module.graph.inserting_after(node):
            result = module.graph.call_function(torch.ops.aten.permute.default, (node, inverse))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        node.update_arg(0, source)
    module.graph.lint()
    module.recompile()
    return module


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, dims: frozenset[int]) -> torch.Tensor:
    sizes = [DimDynamic.DYNAMIC if d in dims else DimDynamic.STATIC for d in range(tensor.ndim)]
    context: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
    if tensor.storage_offset() != 0:  # see `without_offset`; the storage is never touched
        tensor = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return mode.from_tensor(tensor.detach(), static_shapes=False, symbolic_context=context)


def _flatten_outputs(module: fx.GraphModule) -> None:
    """Return a plain tuple and take plain positional inputs, whatever pytree code make_fx generated."""
    module.graph.set_codegen(fx.graph.CodeGen())
    module.recompile()


def _check_functional(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert node.target not in _UNDECLARED_WRITES, f"{node.target} writes its running statistics undeclared"
            assert not node.target._schema.is_mutable, (
                f"in-place operation left in a functional graph: {node.format_node()}"
            )
