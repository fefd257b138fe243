"""Second derivatives of convolutions against PyTorch's own double backward, in float64; memory orders in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlopt.autodiff.convolution import convolution

# (spatial dims, channels in and out, kernel size, (stride, padding, dilation, transposed, output padding, groups))
CASES = {
    "1d": (1, 3, 4, 3, ([1], [0], [1], False, [0], 1)),
    "2d": (2, 3, 4, 3, ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
    "one channel": (2, 1, 4, 3, ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
    "strides": (2, 3, 4, 3, ([2, 3], [1, 0], [1, 1], False, [0, 0], 1)),
    "dilation": (2, 3, 4, 3, ([1, 1], [2, 2], [2, 1], False, [0, 0], 1)),
    "groups": (2, 4, 6, 3, ([1, 1], [1, 1], [1, 1], False, [0, 0], 2)),
    "depthwise": (2, 4, 4, 3, ([2, 2], [1, 1], [1, 1], False, [0, 0], 4)),
    "pointwise": (2, 4, 5, 1, ([2, 2], [0, 0], [1, 1], False, [0, 0], 1)),
    "transposed": (2, 3, 4, 3, ([2, 2], [1, 1], [1, 1], True, [1, 1], 1)),
    "transposed groups": (1, 4, 6, 3, ([2], [1], [2], True, [0], 2)),
    "3d": (3, 2, 3, 2, ([1, 2, 1], [1, 0, 1], [1, 1, 1], False, [0, 0, 0], 1)),
}


def example(name, dtype=torch.float64):
    dims, num_in, num_out, size, settings = CASES[name]
    transposed, groups = settings[3], settings[5]
    shape = (num_in, num_out // groups) if transposed else (num_out, num_in // groups)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, num_in, *range(6, 6 + dims), generator=g, dtype=torch.float64)
    weight = torch.randn(*shape, *[size] * dims, generator=g, dtype=torch.float64)
    bias = torch.randn(num_out, generator=g, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)], settings


def first_and_second(function, inputs, which):
    """Return the output, first derivatives and second ones along fixed directions, of a loss that is curved in y."""
    y = function(*inputs)
    wanted = [inputs[i] for i in which]
    first = torch.autograd.grad(torch.sin(y).sum(), wanted, create_graph=True)
    g = torch.Generator().manual_seed(1)
    directions = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in first]
    second = torch.autograd.grad(first, inputs, directions, allow_unused=True)
    return [y, *first, *[torch.zeros_like(t) if s is None else s for s, t in zip(second, inputs, strict=True)]]


@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (2,)], ids=["all", "input", "weight", "bias"])
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name, which):
    inputs, settings = example(name)
    got = first_and_second(lambda x, w, b: convolution(x, w, b, *settings, False), inputs, which)
    expected = first_and_second(lambda x, w, b: torch.ops.aten.convolution(x, w, b, *settings), inputs, which)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_third_derivatives(name):
    (x, weight, _), settings = example(name)
    assert torch.autograd.gradgradcheck(lambda x, w: convolution(x, w, None, *settings, False), (x, weight))


@pytest.mark.parametrize("name", CASES)
def test_another_memory_order_changes_rounding_only(name):
    inputs, settings = example(name, torch.float32)
    got = first_and_second(lambda x, w, b: convolution(x, w, b, *settings, True), inputs, (0, 1, 2))
    exact, _ = example(name)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = first_and_second(lambda x, w, b: torch.ops.aten.convolution(x, w, b, *settings), exact, (0, 1, 2))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


def test_an_image_without_batch_dimension_and_no_bias():
    (x, weight, _), settings = example("2d")
    expected = F.conv2d(x[0], weight, padding=1)
    torch.testing.assert_close(convolution(x[0], weight, None, *settings, True), expected)


def test_autocast_computes_in_the_half_type():
    (x, weight, bias), settings = example("2d", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = convolution(x, weight, bias, *settings, True)
        expected = F.conv2d(x, weight, bias, padding=1)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    gradient = torch.autograd.grad(got.float().sum(), weight)[0]
    assert gradient.dtype == torch.float32


def test_batch_sizes_stay_free():
    """PyTorch's own double backward reads sizes in C++, which fixes them."""
    import mlopt

    class Net(mlopt.Problem):
        def training_step(self, batch):
            return F.cross_entropy(self.module(batch[0]), batch[1]) + (self.above.module.weight**2).sum() * sum(
                (p**2).sum() for p in self.module.parameters()
            )

    class Above(mlopt.Problem):
        def training_step(self, batch):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 3)).double()
    above = nn.Linear(1, 1, bias=False).double()
    sizes = [5, 7, 4]
    data = [(torch.randn(n, 1, 8, 8, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in sizes]
    plan = mlopt.compile(
        mlopt.Graph(
            [
                Net(
                    "net",
                    module=module,
                    optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
                    data=data,
                    hypergradient=mlopt.CG(max_steps=3, damping=30.0),
                ),
                Above("above", module=above, optimizer=torch.optim.SGD(above.parameters(), lr=0.1), data=data),
            ]
        ),
        backend="eager",
        progress=False,
        strict=True,
    )
    plan.run(3)
    assert len(plan._report.graphs["net"]) == 1
