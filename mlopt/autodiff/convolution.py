"""Convolutions whose second derivatives are convolutions of the usual shapes.

A convolution ``y = C(x, w)`` is linear in each argument, so with cotangents a, b of its two gradients
``x' = C_x(w)^T g`` and ``w' = C_w(x)^T g``

    d/dg (<a, x'> + <b, w'>) = C(a, w) + C(x, b)
    d/dx                     =            C_x(b)^T g
    d/dw                     = C_w(a)^T g

and the last two are one call of ``convolution_backward`` with a for the input and b for the weight. PyTorch's formula
(``_convolution_double_backward``, 2.11 to 2.15) computes ``C_w(a)^T g`` as a forward convolution with the images as
kernels instead, which oneDNN has no fast path for, and reads sizes in C++, which fixes the batch size of a trace.

In channels-last order oneDNN's float32 convolutions are faster, those for weight gradients twice as fast (measured on
AVX-512: 3 x 3, 16 to 40 channels); the other operations keep the order they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ATEN = torch.ops.aten


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *settings: Any) -> torch.Tensor:
    """Convolve as ``aten.convolution`` does.

    Args:
        x: Images [B, C, ...] or without the batch dimension.
        weight: Kernels, as ``aten.convolution`` takes them.
        bias: [C'] or None.
        settings: Stride, padding, dilation, transposed, output padding, groups, and whether float32 images may be put
            into channels-last order.
    """
    x, weight, bias = _cast(x), _cast(weight), None if bias is None else _cast(bias)
    if x.ndim == weight.ndim - 1:
        return convolution(x[None], weight, bias, *settings)[0]
    *settings_, reorder = settings
    reorder = reorder and x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4
    y = _convolve(x, weight, settings_, reorder)
    return y if bias is None else y + bias.view(1, -1, *[1] * (x.ndim - 2))


def _cast(tensor: torch.Tensor) -> torch.Tensor:
    """Do what autocast does to an argument of a convolution; it does not look into Functions."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


# The order is changed out here: what `forward` made of its inputs would be saved without their history.


def _convolve(x: torch.Tensor, weight: torch.Tensor, settings: Sequence[Any], reorder: bool) -> torch.Tensor:
    return _Convolution.apply(*_reordered(reorder, x, weight), settings, reorder)


def _pull_back(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, settings: Sequence[Any], reorder: bool, mask: Sequence[bool]
) -> Any:
    return _ConvolutionBackward.apply(*_reordered(reorder, g, x, weight), settings, reorder, mask)


def _reordered(reorder: bool, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    if not reorder:
        return tensors
    # With one channel both orders are the same in memory and the strides say "contiguous", so that the result would be
    # laid out so, too; a copy has the strides that were asked for.
    return [
        t.clone(memory_format=torch.channels_last)
        if t.shape[1] == 1
        else t.contiguous(memory_format=torch.channels_last)
        for t in tensors
    ]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, settings: Sequence[Any], reorder: bool) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.reorder = settings, reorder
        return _ATEN.convolution.default(x, weight, None, *settings)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        mask = ctx.needs_input_grad[:2]
        return *_pull_back(g, x, weight, ctx.settings, ctx.reorder, mask), None, None


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        g: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        settings: Sequence[Any],
        reorder: bool,
        mask: Sequence[bool],
    ) -> Any:
        ctx.save_for_backward(g, x, weight)
        ctx.settings, ctx.reorder = settings, reorder
        ctx.set_materialize_grads(False)
        return _ATEN.convolution_backward.default(g, x, weight, None, *settings, [*mask, False])[:2]

    @staticmethod
    def backward(ctx: Any, a: torch.Tensor | None, b: torch.Tensor | None) -> Any:
        g, x, weight = ctx.saved_tensors
        settings, reorder = ctx.settings, ctx.reorder
        parts = [] if a is None else [_convolve(a, weight, settings, reorder)]
        parts += [] if b is None else [_convolve(x, b, settings, reorder)]
        for_g = None if not parts else parts[0] if len(parts) == 1 else parts[0] + parts[1]
        mask = (b is not None and ctx.needs_input_grad[1], a is not None and ctx.needs_input_grad[2])
        for_x = for_weight = None
        if any(mask):
            for_x, for_weight = _pull_back(
                g, x if a is None else a, weight if b is None else b, settings, reorder, mask
            )
        return for_g, for_x, for_weight, None, None, None
