"""Clean-ups that make an exported graph safe to differentiate, and the questions asked of it.

Each clean-up edits the given module in place and returns it or what it found. They run before differentiation, so
they must keep what autograd sees, not only values.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from mlopt.errors import CaptureError
from mlopt.precision import wide_dtype

aten = torch.ops.aten
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_grad_mode_regions(module: fx.GraphModule, problem: str) -> fx.GraphModule:
    """Replace ``torch.no_grad()`` regions by their nodes between ``detach``es.

    torch.export records a region as a call of a submodule. Autograd sees the same thing when every tensor that enters
    and leaves the region is detached, and a flat graph is what differentiation and the passes read.

    Raises:
        CaptureError: ``enable_grad`` inside ``no_grad``, for which detaching the inputs would lose a gradient.
    """
    for node in [n for n in module.graph.nodes if n.target is _GRAD_MODE]:
        enabled, body_ref, *arguments = node.args
        body = getattr(module, body_ref.target)
        nested = any(n.target is _GRAD_MODE and n.args[0] for n in body.graph.nodes)
        if enabled or nested:
            raise CaptureError(
                f"problem {problem!r}: its training_step enables gradients inside a region without gradients; "
                "capture supports no_grad regions only"
            )
        inline_grad_mode_regions(body, problem)
        with module.graph.inserting_before(node):
            mapping: dict[fx.Node, fx.Node] = {}
            holes = [n for n in body.graph.nodes if n.op == "placeholder"]
            for hole, argument in zip(holes, arguments, strict=True):
                mapping[hole] = _detached(module.graph, argument)
            results: Sequence[fx.Node] = ()
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    continue
                if inner.op == "output":
                    results = [_detached(module.graph, mapping.get(r, r)) for r in inner.args[0]]
                elif inner.op == "get_attr":
                    name = f"{body_ref.target}_{inner.target}".replace(".", "_")
                    setattr(module, name, getattr(body, inner.target))
                    mapping[inner] = module.graph.get_attr(name)
                else:
                    mapping[inner] = module.graph.node_copy(inner, mapping.__getitem__)
        for user in list(node.users):
            assert user.target is operator.getitem, f"{user} reads a grad-mode region other than by index"
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not body_ref.users:
            module.graph.erase_node(body_ref)
    module.graph.lint()
    module.recompile()
    return module


def _detached(graph: fx.Graph, value: fx.Node) -> fx.Node:
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    node = graph.call_function(torch.ops.aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node


def return_items_as_tensors(module: fx.GraphModule) -> set[int]:
    """Let outputs that are ``tensor.item()`` be the tensor itself, so that no value is needed to differentiate.

    Returns:
        The output positions that the user meant as Python numbers.
    """
    output = next(n for n in module.graph.nodes if n.op == "output")
    values = list(output.args[0])
    found = set()
    for i, value in enumerate(values):
        if isinstance(value, fx.Node) and value.target is torch.ops.aten.item.default:
            found.add(i)
            with module.graph.inserting_before(output):
                values[i] = module.graph.call_function(torch.ops.aten.detach.default, (value.args[0],))
            values[i].meta["val"] = value.args[0].meta.get("val")
    output.args = (tuple(values),)
    for node in reversed(list(module.graph.nodes)):
        if node.target is torch.ops.aten.item.default and not node.users:
            module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return found


def depends_on(root: fx.Node, placeholders: Sequence[fx.Node]) -> set[int]:
    """Return the positions of the placeholders that `root` has a derivative for, writes through views included.

    A dependence ends at ``detach`` (regions without gradients are captured so, too) and at values without derivative
    (integers, truth values).
    """
    bases = alias_bases(root.graph)
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in root.graph.nodes:
        for written in written_arguments(node):
            writers.setdefault(bases[written], []).append(node)
    seen, stack = set(), [root]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _DETACH or not _has_derivative(node):
            continue
        stack.extend(node.all_input_nodes)
        stack.extend(writers.get(bases[node], ()))
    return {i for i, p in enumerate(placeholders) if p in seen}


_DETACH = {aten.detach.default, aten.detach_.default}


def _has_derivative(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex()


def written_placeholders(module: fx.GraphModule, placeholders: Sequence[fx.Node]) -> set[int]:
    """Return the positions of the placeholders that an in-place operation writes, directly or through a view."""
    bases = alias_bases(module.graph)
    written = {bases[argument] for node in module.graph.nodes for argument in written_arguments(node)}
    return {i for i, p in enumerate(placeholders) if p in written}


def alias_bases(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Map each node to the node whose memory it shows (itself, unless it is a view or an in-place result)."""
    bases: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        bases[node] = node
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            continue
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.returns:
            if target._schema.returns[0].alias_info is not None:
                bases[node] = bases[first]
        elif target is operator.getitem:
            bases[node] = bases[first]
    return bases


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that one call writes in place, by its schema."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    written = []
    for i, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            if isinstance(value, fx.Node):
                written.append(value)
    return written


def decompose_batch_norm(module: fx.GraphModule, problem: str) -> fx.GraphModule:
    """Write batch normalization out in elementary operations.

    Two reasons, both of correctness: in training mode the native operation moves its running statistics without
    declaring the write, and the C++ formula of its second derivative fixes the batch size as a constant. Ioffe and
    Szegedy 2015, arXiv 1502.03167; statistics in float32 for half-precision inputs, running variance unbiased, as in
    `torch.nn.BatchNorm2d`.

    Raises:
        CaptureError: `instance_norm` with running statistics, which has the same defects and is not decomposed.
    """
    for node in list(module.graph.nodes):
        if node.target is aten.instance_norm.default and node.args[3] is not None and node.args[5]:
            raise CaptureError(
                f"problem {problem!r}: InstanceNorm with track_running_stats=True cannot be captured in training mode; "
                "use track_running_stats=False"
            )
        if node.target is aten.batch_norm.default:
            with module.graph.inserting_before(node):
                _replace_batch_norm(module.graph, node)
    module.graph.lint()
    module.recompile()
    return module


def _replace_batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, running_mean, running_var, training, momentum, eps = node.args[:8]
    example = x.meta["val"]
    reduced = [0, *range(2, example.ndim)]
    dtype = wide_dtype(example.dtype)

    def call(op: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        return graph.call_function(op, args, kwargs)

    def along_channels(v: fx.Node) -> fx.Node:
        return call(aten.view.default, call(aten.to.dtype, v, dtype), [1, -1, *[1] * (example.ndim - 2)])

    wide = call(aten.to.dtype, x, dtype)
    if training:
        mean = call(aten.mean.dim, wide, reduced, True)
        centred = call(aten.sub.Tensor, wide, mean)
        var = call(aten.mean.dim, call(aten.mul.Tensor, centred, centred), reduced, True)
        if running_mean is not None:
            seen = call(aten.detach.default, wide)
            for running, now in (
                (running_mean, call(aten.mean.dim, seen, reduced)),
                (running_var, call(aten.var.correction, seen, reduced, correction=1)),
            ):
                now = call(aten.to.dtype, now, running.meta["val"].dtype)
                call(aten.lerp_.Scalar, running, now, momentum)
    else:
        mean, var = along_channels(running_mean), along_channels(running_var)
        centred = call(aten.sub.Tensor, wide, mean)
    result = call(aten.mul.Tensor, centred, call(aten.rsqrt.default, call(aten.add.Scalar, var, eps)))
    if weight is not None:
        result = call(aten.mul.Tensor, result, along_channels(weight))
    if bias is not None:
        result = call(aten.add.Tensor, result, along_channels(bias))
    result = call(aten.to.dtype, result, example.dtype)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
