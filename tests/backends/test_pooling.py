"""Max pooling and its gradient as element-wise operations, against the ones of torch, to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from mlopt.backends.inductor.pooling import localize_pools

aten = torch.ops.aten


def gradient(**options):
    def function(x, g):
        indices = aten.max_pool2d_with_indices.default(x, *arguments)[1]
        return aten.max_pool2d_with_indices_backward.default(g, x, *arguments, indices)

    kernel = options.get("kernel", [2, 2])
    arguments = (
        kernel,
        options.get("stride", []),
        options.get("padding", [0, 0]),
        options.get("dilation", [1, 1]),
        options.get("ceil_mode", False),
    )
    return function, arguments


def inputs(size, arguments, dtype=torch.float64, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 4, size, generator=generator).to(dtype)  # with ties
    x[0, 0, 0, 0] = float("nan")
    x = x.to(memory_format=memory_format)
    result = F.max_pool2d(x, *arguments)
    return x, torch.randn(result.shape, generator=generator, dtype=torch.float64).to(dtype)


def traced(function, *tensors):
    return make_fx(function, tracing_mode="fake")(*tensors)


def scatters(module):
    return [n for n in module.graph.nodes if n.target is aten.max_pool2d_with_indices_backward.default]


def searches(module):
    return [n for n in module.graph.nodes if n.target is aten.max_pool2d_with_indices.default]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(3, 8, 8, 6), (2, 9, 7, 9), (1, 16, 2, 3)])
@pytest.mark.parametrize("kernel", [[2, 2], [2, 3], [1, 2], [2]])
def test_values_and_indices(kernel, size, dtype):
    x, _ = inputs(size, (kernel,), dtype, torch.channels_last)
    x[0, 1, 0, :2] = float("nan")
    x[0, 2, :2, :2] = -float("inf")
    x[0, 3, 0, :2] = torch.tensor([0.0, -0.0])

    def function(x):
        y = x * 1  # as of a graph that computes it
        values, indices = aten.max_pool2d_with_indices.default(y, kernel)
        return values, indices, y

    module = traced(function, x)
    local = localize_pools(module)
    assert searches(module) and not searches(local)
    for got, expected in zip(local(x), module(x), strict=True):
        assert torch.equal(got.nan_to_num(3.0), expected.nan_to_num(3.0)) and got.stride() == expected.stride()
        assert torch.equal(got.signbit(), expected.signbit())


@pytest.mark.parametrize(
    "case",
    [
        (torch.randn(2, 16, 8, 6), [2, 2]),  # lanes would run over every other column
        (torch.randn(2, 4, 8, 6).to(memory_format=torch.channels_last), [2, 2]),  # few channels
        (torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last), [4, 4]),  # large windows
        (torch.randn(2, 16, 8, 6, dtype=torch.bfloat16).to(memory_format=torch.channels_last), [2, 2]),
    ],
    ids=["contiguous", "few-channels", "large-windows", "halves"],
)
def test_searches_that_are_left_alone(case):
    x, kernel = case
    module = traced(lambda x: aten.max_pool2d_with_indices.default(x, kernel), x)
    assert localize_pools(module) is module


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(3, 2, 8, 6), (2, 3, 7, 9), (1, 1, 2, 3)])
@pytest.mark.parametrize("kernel", [[2, 2], [2, 3], [1, 2], [2]])
def test_same_numbers(kernel, size, dtype, memory_format):
    function, arguments = gradient(kernel=kernel)
    tensors = inputs(size, arguments, dtype, memory_format)
    module = traced(function, *tensors)
    local = localize_pools(module)
    assert scatters(module) and not scatters(local)
    assert torch.equal(local(*tensors), module(*tensors))
    a, b = (next(n for n in m.graph.nodes if n.op == "output").args[0].meta["val"] for m in (local, module))
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_any_number_of_images():
    function, arguments = gradient()

    class Module(torch.nn.Module):
        def forward(self, x, g):
            return function(x, g)

    free = {0: torch.export.Dim("n", min=2, max=99)}
    exported = torch.export.export(Module(), inputs((4, 2, 8, 6), arguments), dynamic_shapes=(free, free)).module()
    local = localize_pools(exported)
    assert scatters(exported) and not scatters(local)
    tensors = inputs((5, 2, 8, 6), arguments)
    (result,) = local(*tensors)
    assert torch.equal(result, function(*tensors))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": [3, 3], "stride": [2, 2]},  # an element is in several windows
        {"kernel": [2, 2], "stride": [3, 3]},  # elements between the windows
        {"padding": [1, 1]},
        {"dilation": [2, 2]},
        {"ceil_mode": True},
    ],
    ids=str,
)
def test_what_is_left_alone(options):
    function, arguments = gradient(**options)
    module = traced(function, *inputs((2, 2, 7, 9), arguments))
    assert localize_pools(module) is module


def test_a_last_window_that_is_whole():
    function, arguments = gradient(ceil_mode=True)
    tensors = inputs((2, 2, 8, 6), arguments)
    local = localize_pools(traced(function, *tensors))
    assert not scatters(local) and torch.equal(local(*tensors), function(*tensors))


def test_layers_forward_and_backward():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 13, 9, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)

    def function(x):
        y = F.max_pool2d_with_indices(torch.relu(x), 2)[0]
        values, indices = aten.max_pool2d_with_indices.default(y * 3, [3, 2])
        back = aten.max_pool2d_with_indices_backward.default(
            values.sin(), y, [3, 2], [], [0, 0], [1, 1], False, indices
        )
        return values, back

    module = traced(function, x)
    local = localize_pools(module)
    assert len(searches(module)) == 2 and scatters(module) and not searches(local) and not scatters(local)
    for got, expected in zip(local(x), module(x), strict=True):
        assert torch.equal(got, expected)
