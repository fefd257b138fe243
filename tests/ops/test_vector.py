"""Every native op against its plain-torch reference, on the CPU and, where there is one, on a CUDA device."""

import pytest
import torch

from mlopt import ops
from mlopt.ops.reference import vector as reference

BLOCK = 4096  # kBlock of csrc/vector/vector.h
SIZES = [0, 1, 7, 31, 32, 33, 257, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK + 3]
LARGE = 1_000_003
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float64]
EPS = {torch.float32: 2e-6, torch.float64: 1e-14}

pytestmark = pytest.mark.skipif(not ops.available(), reason="the extension is not built")
everywhere = pytest.mark.parametrize("device", DEVICES)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])


def vector(*shape, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a, nan=123.0), torch.nan_to_num(b, nan=123.0))


def shapes():
    return [(n,) for n in SIZES] + [(k, n) for k in (0, 1, 3) for n in (0, 1, 33, BLOCK + 1)] + [(LARGE,)]


@everywhere
@both_dtypes
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_dot_and_norm(shape, dtype, device):
    a, b = vector(*shape, dtype=dtype, device=device), vector(*shape, dtype=dtype, device=device, seed=1)
    exact = (a.double() * b.double()).sum(-1)
    scale = (a.double() * b.double()).abs().sum(-1)
    got = ops.dot(a, b)
    assert got.dtype == dtype and got.shape == shape[:-1]
    assert ((got.double() - exact).abs() <= EPS[dtype] * scale).all()
    torch.testing.assert_close(ops.norm(a).double(), a.double().norm(dim=-1), rtol=EPS[dtype], atol=0)


@both_dtypes
def test_dot_is_as_accurate_as_torch(dtype):
    """Within twice the error of torch's own sum of products, plus one rounding of the result."""
    a, b = vector(LARGE, dtype=dtype), vector(LARGE, dtype=dtype, seed=1)
    exact = (a.double() * b.double()).sum() if dtype == torch.float32 else None
    if exact is None:
        exact = torch.tensor(sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)), dtype=torch.float64)
        assert (ops.dot(a, b) - exact).abs() <= 1e-13 * (a * b).abs().sum()
        return
    theirs = ((a * b).sum().double() - exact).abs()
    ours = (ops.dot(a, b).double() - exact).abs()
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * (a * b).abs().sum().double() / 100


def cg_case(shape, dtype, device):
    """A solve in mid-flight; with several rows, one converged and one with negative curvature."""
    x, r, p = (vector(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2, 3))
    ap = 2 * p + 0.01 * r
    state = ops.cg_init(r, torch.full(shape[:-1], 1e-3, dtype=dtype, device=device))
    if len(shape) == 2 and shape[0] >= 3:
        ops.CgState(state).status[1] = ops.CgState.CONVERGED
        ap[2] = -p[2]
    return [x, r, p, ap, state]


@everywhere
@both_dtypes
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_cg_step(shape, dtype, device):
    got, expected = cg_case(shape, dtype, device), cg_case(shape, dtype, device)
    for _ in range(2):
        ops.cg_step_(*got)
        reference.cg_step_(*expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=200 * EPS[dtype], atol=200 * EPS[dtype])


@everywhere
@both_dtypes
def test_cg_step_leaves_stopped_rows_alone(dtype, device):
    x, r, p, ap, _ = cg_case((5, 333), dtype, device)
    ap[2] = -p[2]
    ap[3, 100] = float("nan")
    r[4] = 0
    state = ops.cg_init(r, torch.zeros(5, dtype=dtype, device=device))
    columns = ops.CgState(state)
    columns.status[1] = ops.CgState.CONVERGED
    before = [t.clone() for t in (x, r, p)]
    ops.cg_step_(x, r, p, ap, state)
    for a, b in zip((x, r, p), before, strict=True):
        assert same_bits(a[1:], b[1:]) and not torch.equal(a[0], b[0])
    codes = ops.CgState
    assert columns.status.tolist() == [
        codes.RUNNING,
        codes.CONVERGED,
        codes.BREAKDOWN,
        codes.NON_FINITE,
        codes.CONVERGED,  # a zero right-hand side
    ]
    assert columns.num_steps.tolist() == [1, 0, 0, 0, 0]


@everywhere
@both_dtypes
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_neumann_step(shape, dtype, device):
    v, acc, av = (vector(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2, 3))
    expected_v, expected_acc = v.clone(), acc.clone()
    ops.neumann_step_(v, acc, av, 0.3)
    reference.neumann_step_(expected_v, expected_acc, av, 0.3)
    torch.testing.assert_close(v, expected_v, rtol=EPS[dtype], atol=EPS[dtype])
    torch.testing.assert_close(acc, expected_acc, rtol=EPS[dtype], atol=EPS[dtype])


@everywhere
@both_dtypes
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_perturb(shape, dtype, device):
    x, d = (vector(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2))
    step = vector(*(shape[:-1] or (1,)), dtype=dtype, device=device, seed=3).reshape(shape[:-1])
    expected = reference.perturb(x, d, step)
    torch.testing.assert_close(ops.perturb(x, d, step), expected, rtol=EPS[dtype], atol=EPS[dtype])


@everywhere
def test_inputs_may_have_any_strides(device):
    """Slices, transposes and the stride-0 cotangents of sums."""
    n = 1001
    wide = vector(n, 6, device=device)
    a, b = wide[:, 0], wide[:, 3]
    expanded = torch.tensor(2.0, dtype=torch.float64, device=device).expand(n)
    torch.testing.assert_close(ops.dot(a, b), (a * b).sum())
    torch.testing.assert_close(ops.dot(a, expanded), 2 * a.sum())
    torch.testing.assert_close(ops.norm(wide.T), wide.norm(dim=0))
    step = torch.ones(6, 2, dtype=torch.float64, device=device)[:, 0]
    torch.testing.assert_close(ops.perturb(wide.T, wide.flip(1).T, step), wide.T + wide.flip(1).T)
    v, acc = vector(n, device=device), vector(n, device=device, seed=1)
    expected = v - 0.5 * expanded
    ops.neumann_step_(v, acc, expanded, 0.5)
    torch.testing.assert_close(v, expected)
    got, reference_case = cg_case((n,), torch.float64, device), cg_case((n,), torch.float64, device)
    got[3] = reference_case[3] = expanded
    ops.cg_step_(*got)
    reference.cg_step_(*reference_case)
    torch.testing.assert_close(got[0], reference_case[0])


@everywhere
@both_dtypes
def test_bits_repeat(dtype, device):
    """The same bits on every repeat and, on the CPU, for every number of threads."""
    a, b = vector(3, LARGE, dtype=dtype, device=device), vector(3, LARGE, dtype=dtype, device=device, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4, 1):
            torch.set_num_threads(count)
            case = cg_case((3, LARGE // 10), dtype, device)
            ops.cg_step_(*case)
            results.append([ops.dot(a, b), ops.norm(a), *case])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(x, y) for x, y in zip(results[0], other, strict=True))


@everywhere
@both_dtypes
@pytest.mark.parametrize("shape", [(33,), (3, 17), (0,), (2, 0)], ids=str)
def test_opcheck(shape, dtype, device):
    native = torch.ops.mlopt
    a, b, c = (vector(*shape, dtype=dtype, device=device, seed=s) for s in (1, 2, 3))
    step = torch.ones(shape[:-1], dtype=dtype, device=device)
    for op, arguments in (
        (native.dot, (a, b)),
        (native.norm, (a,)),
        (native.perturb, (a, b, step)),
        (native.neumann_step_, (a.clone(), b.clone(), c, 0.5)),
        (native.cg_step_, tuple(cg_case(shape, dtype, device))),
    ):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_by_the_reference(dtype):
    a, b = vector(100, dtype=dtype), vector(100, dtype=dtype, seed=1)
    assert ops.dot(a, b).dtype == torch.float32
    case = cg_case((100,), torch.float32, "cpu")
    case = [t.to(dtype) for t in case[:4]] + [case[4]]
    ops.cg_step_(*case)
    assert ops.CgState(case[4]).num_steps == 1
    assert ops.perturb(a, b, torch.tensor(0.5)).dtype == dtype


def test_refusals():
    a = vector(5)
    with pytest.raises(ValueError, match=r"dot: expected b like a \(\(5,\), torch.float64, cpu\), got \(\(4,\)"):
        ops.dot(a, vector(4))
    with pytest.raises(ValueError, match="expected b like a"):
        ops.dot(a, a.float())
    with pytest.raises(ValueError, match="norm: expected a to be floating vectors"):
        ops.norm(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="not differentiable"):
        ops.norm(a.clone().requires_grad_())
    with pytest.raises(ValueError, match="neumann_step_: acc and v share memory"):
        ops.neumann_step_(a, a, vector(5), 0.1)
    with pytest.raises(ValueError, match="neumann_step_: v is written and must be contiguous"):
        ops.neumann_step_(vector(10)[::2], vector(5), vector(5), 0.1)
    with pytest.raises(ValueError, match=r"cg_step_: expected state of shape \(5,\)"):
        ops.cg_step_(vector(5), vector(5), vector(5), vector(5), torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"perturb: expected step of shape \(\), torch.float64, cpu, got \(\(1,\)"):
        ops.perturb(a, a, torch.ones(1, dtype=torch.float64))
    with torch.no_grad():
        ops.norm(a.clone().requires_grad_())  # fine where no gradient is recorded


def test_native_checks_repeat_what_the_wrappers_check():
    a = vector(5)
    with pytest.raises(RuntimeError, match=r"mlopt::dot: expected b of shape \[5\], got \[4\]"):
        torch.ops.mlopt.dot(a, vector(4))
    with pytest.raises(RuntimeError, match="mlopt::norm: expected float32 or float64"):
        torch.ops.mlopt.norm(a.half())
    with pytest.raises(RuntimeError, match="mlopt::neumann_step_: v is written and must be contiguous"):
        torch.ops.mlopt.neumann_step_(vector(10)[::2], vector(5), vector(5), 0.1)
