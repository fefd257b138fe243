"""Products of small matrices by the kernel, against torch in float64."""

import pytest
import torch

from mlopt import ops
from mlopt.ops.matmul import MAX_DIM, MAX_PRODUCTS

needs_extension = pytest.mark.skipif(not ops.available(), reason="the extension is not built")
DTYPES = [torch.float32, torch.float64]
SIZES = [(64, 64, 32), (64, 32, 10), (64, 10, 32), (10, 64, 32), (1, 7, 1), (7, 1, 9), (13, 300, 17), (5, 0, 3)]


def matrix(rows, columns, layout, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "rows": lambda: normal(rows, columns),
        "transposed": lambda: normal(columns, rows).t(),
        "rows of a larger": lambda: normal(rows, columns + 5)[:, 3 : columns + 3],
        "columns of a larger": lambda: normal(columns + 4, rows).t()[:, 4:],
        "every second": lambda: normal(2 * rows + 1, 2 * columns)[1::2, ::2],
        "expanded": lambda: normal(1, columns).expand(rows, columns),
    }[layout]()


LAYOUTS = ["rows", "transposed", "rows of a larger", "columns of a larger", "every second", "expanded"]


def check(a, b, bias=None):
    got = ops.small_mm(a, b, bias)
    assert got.is_contiguous() and got.dtype == a.dtype
    sizes = a.double().abs() @ b.double().abs()
    expected = a.double() @ b.double()
    if bias is not None:
        expected, sizes = expected + bias.double(), sizes + bias.double().abs()
    tolerance = torch.finfo(a.dtype).eps * (2 + a.shape[1])
    assert ((got.double() - expected).abs() <= tolerance * sizes).all()
    assert torch.equal(got, ops.small_mm(a, b, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_strides(left, right, dtype):
    for m, k, n in SIZES:
        check(matrix(m, k, left, dtype), matrix(k, n, right, dtype, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "every third", "expanded"])
def test_bias(kind, dtype):
    for m, k, n in SIZES:
        whole = torch.linspace(-1, 1, 3 * n, dtype=dtype)
        bias = {"plain": whole[:n], "every third": whole[::3], "expanded": whole[:1].expand(n)}[kind]
        check(matrix(m, k, "rows", dtype), matrix(k, n, "transposed", dtype, 1), bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype):
    bias = torch.arange(4, dtype=dtype)
    assert ops.small_mm(torch.ones(0, 3, dtype=dtype), torch.ones(3, 4, dtype=dtype)).shape == (0, 4)
    assert ops.small_mm(torch.ones(2, 3, dtype=dtype), torch.ones(3, 0, dtype=dtype)).shape == (2, 0)
    got = ops.small_mm(torch.ones(2, 0, dtype=dtype), torch.ones(0, 4, dtype=dtype), bias)
    assert torch.equal(got, bias.expand(2, 4))


def test_sizes_beyond_the_limits():
    check(matrix(MAX_DIM + 1, 3, "transposed", torch.float64), matrix(3, 2, "rows", torch.float64))
    side = round(MAX_PRODUCTS ** (1 / 3)) + 1
    bias = torch.ones(side, dtype=torch.float64)
    check(matrix(side, side, "rows", torch.float64), matrix(side, side, "rows", torch.float64), bias)


def test_not_finite_numbers_spread_as_in_a_sum():
    a, b = torch.zeros(9, 20), torch.ones(20, 10)
    b[3, 4], b[7, 9] = float("inf"), float("nan")
    got = ops.small_mm(a, b)
    assert got[:, [4, 9]].isnan().all() and got.isnan().sum() == 18


def test_other_dtypes_run_by_torch():
    a = torch.arange(6).reshape(2, 3)
    assert torch.equal(ops.small_mm(a, a.t()), a @ a.t())


def test_refusals():
    a = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"small_mm: expected \[M, K\] and \[K, N\], got \(2, 3\) and \(2, 3\)"):
        ops.small_mm(a, a)
    with pytest.raises(ValueError, match=r"small_mm: expected bias of shape \(2,\), got \(3,\)"):
        ops.small_mm(a, a.t(), torch.ones(3))
    with pytest.raises(ValueError, match="small_mm: expected b like a"):
        ops.small_mm(a, a.t().double())
    with pytest.raises(ValueError, match="small_mm: not differentiable, but b requires a gradient"):
        ops.small_mm(a, torch.ones(3, 2, requires_grad=True))


@needs_extension
def test_the_op_checks_by_itself():
    a = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="mlopt::small_mm: expected matrices"):
        torch.ops.mlopt.small_mm(a, a)
    with pytest.raises(RuntimeError, match="mlopt::small_mm: expected bias of shape"):
        torch.ops.mlopt.small_mm(a, a.t(), a)
    with pytest.raises(RuntimeError, match="mlopt::small_mm: expected float32 or float64"):
        torch.ops.mlopt.small_mm(a.half(), a.half().t())
    with pytest.raises(RuntimeError, match="mlopt::small_mm: not differentiable, but a requires a gradient"):
        torch.ops.mlopt.small_mm(torch.ones(2, 3, requires_grad=True), a.t())


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "transposed", "expanded"])
def test_opcheck(layout, dtype):
    a, b = matrix(5, 4, layout, dtype), matrix(4, 9, layout, dtype, 1)
    for bias in (None, torch.ones(9, dtype=dtype)):
        torch.library.opcheck(torch.ops.mlopt.small_mm.default, (a, b, bias))
