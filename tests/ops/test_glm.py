"""Every op of the family `glm` against its plain-torch reference and against autograd."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from mlopt import ops
from mlopt.ops.reference import glm as reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.float64]
EPS = {torch.float32: 2e-5, torch.float64: 1e-11}

needs_extension = pytest.mark.skipif(not ops.available(), reason="the extension is not built")
everywhere = pytest.mark.parametrize("device", DEVICES)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64"])

# (T, K, n, D, C), None where the axis is missing: no rows, one of everything, around the lanes (4, 8, 16), the tiles
# (2, 4), the row blocks (32) and the columns per tile (6); several chunks of rows; on GPUs every size of the tiles for
# tensor cores.
SHAPES = [
    (None, None, 0, 5, 3),
    (None, None, 1, 1, 1),
    (None, None, 7, 0, 2),
    (None, None, 31, 15, 2),
    (None, 1, 32, 16, 3),
    (None, 3, 33, 17, 5),
    (2, None, 65, 31, 6),
    (0, None, 4, 3, 2),
    (2, 0, 4, 3, 2),
    (3, 2, 20, 33, 7),
    (None, None, 129, 64, 12),
    (None, 2, 50, 8, 13),
    (None, None, 40, 9, 32),
    (None, None, 4099, 130, 10),
    (2, 3, 1501, 77, 11),
    (32, None, 25, 64, 5),
    (None, None, 300, 784, 10),
    (None, 2, 100, 1408, 3),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
small = pytest.mark.parametrize("shape", [(None, None, 33, 17, 5), (3, 2, 20, 33, 7), (2, 2, 2001, 65, 10)], ids=str)


class Case:
    """Random operands for one shape."""

    def __init__(self, shape, dtype=torch.float64, device="cpu", seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        tasks, rhs, n, features, classes = shape
        self.dtype, self.device = dtype, device
        self.lead = () if tasks is None else (tasks,)
        self.rows, self.classes = (*self.lead, n), classes
        several = () if rhs is None else (rhs,)
        self.x = self.draw(*self.rows, features)
        self.w, self.bias = self.draw(*self.lead, features, classes), self.draw(*self.lead, classes)
        self.v, self.v_bias = (
            self.draw(*self.lead, *several, features, classes),
            self.draw(*self.lead, *several, classes),
        )
        self.r = self.draw(*self.lead, *several, n, classes)
        self.weights = self.draw(*self.rows).abs()
        self.diagonal, self.per_row = self.draw(*self.rows, classes).abs(), self.draw(*self.rows).abs()
        self.p = self.draw(*self.rows, classes).softmax(-1)
        self.soft = self.draw(*self.rows, classes).softmax(-1) * 1.5
        self.labels = torch.randint(classes, self.rows, generator=self.generator).to(device)
        self.reg, self.reg_bias = self.draw(*self.lead, features, classes).abs(), self.draw(*self.lead, classes).abs()

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype).to(self.device)

    def curvatures(self):
        # Positive semi-definite ones, for solves.
        rank_one = torch.stack([self.diagonal, self.p, self.p], -2)
        root = rank_one.new_tensor(range(1, self.classes + 1)) * self.p
        block = self.diagonal.diag_embed() + root.unsqueeze(-1) * root.unsqueeze(-2)
        symmetric = [("diagonal", self.diagonal), ("diagonal", self.per_row), ("softmax", self.p)]
        return [*symmetric, ("rank_one", rank_one), ("block", block)]

    def losses(self):
        return [("softmax", self.labels), ("softmax", self.soft), ("logistic", self.soft)]


def assert_close(got, expected, dtype, factor=1.0):
    """Up to a multiple of the roundings in the largest element: elements of a product may cancel."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=0, atol=factor * EPS[dtype] * scale)


@everywhere
@both_dtypes
@shapes
def test_matmuls(shape, dtype, device):
    c = Case(shape, dtype, device)
    for bias in (None, c.v_bias):
        assert_close(ops.glm_matmul(c.x, c.v, bias), reference.glm_matmul(c.x, c.v, bias), dtype)
        got, sums = ops.glm_matmul_t(c.x, c.r, bias=bias is not None)
        expected, expected_sums = reference.glm_matmul_t(c.x, c.r, bias is not None)
        assert_close(got, expected, dtype)
        assert sums is None if bias is None else assert_close(sums, expected_sums, dtype) is None


@everywhere
@both_dtypes
@shapes
def test_hvp(shape, dtype, device):
    c = Case(shape, dtype, device)
    for kind, curvature in c.curvatures():
        for weights, v_bias, reg, reg_bias in (
            (None, None, None, None),
            (c.weights, c.v_bias, c.reg, c.reg_bias),
            (c.weights, c.v_bias, None, None),
        ):
            got = ops.glm_hvp(
                c.x, c.v, v_bias, kind=kind, curvature=curvature, weights=weights, reg=reg, reg_bias=reg_bias
            )
            expected = reference.glm_hvp(c.x, c.v, v_bias, kind, curvature, weights, reg, reg_bias)
            assert_close(got[0], expected[0], dtype, 10)
            assert got[1] is None if v_bias is None else assert_close(got[1], expected[1], dtype, 10) is None


@everywhere
@shapes
def test_rows_that_are_not_symmetric(shape, device):
    """The kernels take any block, and any three vectors, per row."""
    c = Case(shape, torch.float64, device)
    for kind, tail in (("rank_one", (3,)), ("block", (c.classes,))):
        curvature = c.draw(*c.rows, *tail, c.classes)
        got, _ = ops.glm_hvp(c.x, c.v, kind=kind, curvature=curvature, weights=c.weights)
        assert_close(got, reference.glm_hvp(c.x, c.v, None, kind, curvature, c.weights, None, None)[0], c.dtype, 10)
        if kind == "block":  # and the reference is what it says
            u = torch.matmul(c.x.unsqueeze(-3), c.v) if c.v.ndim > c.x.ndim else c.x @ c.v
            blocks, weights, x = curvature, c.weights.unsqueeze(-1), c.x
            if c.v.ndim > c.x.ndim:
                blocks, weights, x = (t.unsqueeze(len(c.lead)) for t in (blocks, weights, x))
            expected = x.mT @ (weights * torch.einsum("...ck,...k->...c", blocks, u))
            assert_close(got, expected, c.dtype, 10)


@everywhere
@both_dtypes
@shapes
def test_gradient(shape, dtype, device):
    c = Case(shape, dtype, device)
    for loss, targets in c.losses():
        for weights, bias in ((None, None), (c.weights, c.bias)):
            got = ops.glm_gradient(c.x, c.w, bias, loss=loss, targets=targets, weights=weights)
            expected = reference.glm_gradient(c.x, c.w, bias, loss, targets, weights)
            for name, a, b in zip(got._fields, got, expected, strict=True):
                assert (a is None) == (name == "dbias" and bias is None)
                assert a is None or assert_close(a, b, dtype, 10) is None


def autograd_loss(c, loss, targets, w, bias):
    z = c.x @ w + bias.unsqueeze(-2)
    if loss == "logistic":
        values = F.binary_cross_entropy_with_logits(z, targets, reduction="none").sum(-1)
    else:
        if not targets.dtype.is_floating_point:
            targets = F.one_hot(targets, c.classes).to(z.dtype)
        values = -(targets * z.log_softmax(-1)).sum(-1)
    return (c.weights * values).sum() + (c.reg * w * w).sum() / 2 + (c.reg_bias * bias * bias).sum() / 2


@everywhere
@both_dtypes
@pytest.mark.parametrize("shape", [(None, None, 37, 19, 4), (3, None, 21, 16, 3), (None, None, 700, 90, 10)], ids=str)
def test_gradient_and_hvp_are_those_of_autograd(shape, dtype, device):
    c = Case(shape, dtype, device)
    for loss, targets in c.losses():
        w, bias = c.w.clone().requires_grad_(), c.bias.clone().requires_grad_()
        value = autograd_loss(c, loss, targets, w, bias)
        gradient = torch.autograd.grad(value, (w, bias), create_graph=True)
        inner = (gradient[0] * c.v).sum() + (gradient[1] * c.v_bias).sum()
        product = torch.autograd.grad(inner, (w, bias))

        got = ops.glm_gradient(c.x, c.w, c.bias, loss=loss, targets=targets, weights=c.weights)
        penalty = (c.reg * c.w * c.w).sum() / 2 + (c.reg_bias * c.bias * c.bias).sum() / 2
        assert_close(got.loss.sum() + penalty, value.detach(), dtype)
        assert_close(got.dw + c.reg * c.w, gradient[0].detach(), dtype)
        assert_close(got.dbias + c.reg_bias * c.bias, gradient[1].detach(), dtype)
        p = got.probabilities
        weights = c.weights * targets.sum(-1) if targets is c.soft and loss == "softmax" else c.weights
        kind, curvature = ("softmax", p) if loss == "softmax" else ("diagonal", p * (1 - p))
        hv, hv_bias = ops.glm_hvp(
            c.x, c.v, c.v_bias, kind=kind, curvature=curvature, weights=weights, reg=c.reg, reg_bias=c.reg_bias
        )
        assert_close(hv, product[0], dtype, 5)
        assert_close(hv_bias, product[1], dtype, 5)


@everywhere
@both_dtypes
@small
def test_cg(shape, dtype, device):
    c = Case(shape, dtype, device)
    weights = c.weights / c.weights.shape[-1]
    for kind, curvature in c.curvatures():
        for bias in (False, True):
            b_bias = c.v_bias if bias else None
            arguments = (kind, curvature, weights, c.reg, c.reg_bias if bias else None)
            names = dict(zip(("kind", "curvature", "weights", "reg", "reg_bias"), arguments, strict=True))
            got = ops.glm_cg(c.x, c.v, b_bias, **names, damping=0.5, rtol=0.0, max_steps=4)
            expected = reference.glm_cg(c.x, c.v, b_bias, None, None, *arguments, 0.5, 0.0, 4)
            assert_close(got.q, expected[0], dtype, 100)
            assert not bias or assert_close(got.q_bias, expected[1], dtype, 100) is None
            assert torch.equal(ops.CgState(got.state).num_steps, ops.CgState(expected[2]).num_steps)

            got = ops.glm_cg(c.x, c.v, b_bias, **names, damping=0.5, rtol=1e-4, max_steps=2000)
            assert (ops.CgState(got.state).status == ops.CgState.CONVERGED).all()
            hq = reference.glm_hvp(c.x, got.q, got.q_bias, *arguments, 0.5)
            residual = (c.v - hq[0]).square().sum((-2, -1)) + ((c.v_bias - hq[1]).square().sum(-1) if bias else 0)
            size = c.v.square().sum((-2, -1)) + (c.v_bias.square().sum(-1) if bias else 0)
            assert (residual.sqrt() <= 1.1e-4 * size.sqrt()).all()  # the true residual, not the recurrence's


@everywhere
def test_cg_agrees_with_the_solver_of_linalg(device):
    from mlopt.linalg import MatrixOperator, cg

    c = Case((None, 3, 40, 6, 2), device=device)
    c.v[1] = 0  # converged from the start
    basis = torch.eye(14, dtype=torch.float64, device=device)
    columns = [
        reference.glm_hvp(c.x, e[:12].view(6, 2), e[12:], "softmax", c.p[..., :2], c.weights, c.reg, None, 0.1)
        for e in basis
    ]
    matrix = torch.stack([torch.cat([w.flatten(), b]) for w, b in columns], dim=1)
    flat = torch.cat([c.v.flatten(1), c.v_bias * torch.tensor([[1.0], [0.0], [1.0]], device=device)], dim=1)
    for steps, rtol in ((3, 1e-12), (50, 1e-6)):
        expected = cg(MatrixOperator(matrix), flat, max_steps=steps, rtol=rtol)
        got = ops.glm_cg(
            c.x, c.v, flat[:, 12:], kind="softmax", curvature=c.p, weights=c.weights, reg=c.reg, damping=0.1,
            rtol=rtol, max_steps=steps,
        )  # fmt: skip
        # Past a few steps roundings decide how the residual shrinks: what two correct solvers share is what each of
        # them promises, the tolerance; it is asked to a hundredth. Which step reaches it may differ by one.
        factor = 100 if steps == 3 else 0.01 * rtol / EPS[torch.float64]
        assert_close(torch.cat([got.q.flatten(1), got.q_bias], 1), expected.value, torch.float64, factor)
        apart = (ops.CgState(got.state).num_steps.long() - expected.num_steps).abs()
        assert apart[1] == 0 and apart.max() <= (0 if steps == 3 else 1)


@everywhere
@both_dtypes
def test_cg_stops_each_right_hand_side_by_itself(dtype, device):
    c = Case((2, 3, 30, 9, 2), dtype, device)
    c.v[0, 1] = 0
    c.v[1, 2, 0, 0] = float("nan")
    reg = torch.full((2, 9, 2), 0.1, dtype=dtype, device=device)
    got = ops.glm_cg(c.x, c.v, kind="diagonal", curvature=c.diagonal, reg=reg, max_steps=100, rtol=1e-3)
    status = ops.CgState(got.state).status
    codes = ops.CgState
    assert status.tolist() == [[codes.CONVERGED] * 3, [codes.CONVERGED, codes.CONVERGED, codes.NON_FINITE]]
    assert ops.CgState(got.state).num_steps[0, 1] == 0 and not got.q[0, 1].any()
    assert torch.isfinite(got.q[1, :2]).all() and not got.q[1, 2].any()
    alone = ops.glm_cg(
        c.x[1], c.v[1, 0], kind="diagonal", curvature=c.diagonal[1], reg=reg[1], max_steps=100, rtol=1e-3
    )
    assert_close(alone.q, got.q[1, 0], dtype, 100)

    got = ops.glm_cg(c.x, c.v, kind="diagonal", curvature=-c.diagonal, max_steps=100)
    assert ops.CgState(got.state).status[0].tolist() == [codes.BREAKDOWN, codes.CONVERGED, codes.BREAKDOWN]
    assert not got.q[0].any()  # the iterate before the breakdown


@everywhere
@both_dtypes
def test_cg_starts_from_a_guess(dtype, device):
    c = Case((2, 2, 60, 9, 3), dtype, device)
    names = {"kind": "softmax", "curvature": c.p, "reg": c.reg, "reg_bias": c.reg_bias, "damping": 0.5}
    exact = ops.glm_cg(c.x, c.v, c.v_bias, **names, rtol=1e-5, max_steps=500)
    warm = ops.glm_cg(c.x, c.v, c.v_bias, q0=exact.q, q0_bias=exact.q_bias, **names, rtol=1e-3, max_steps=500)
    assert not ops.CgState(warm.state).num_steps.any() and torch.equal(warm.q, exact.q)
    bad = exact.q.clone()
    bad[0, 0] *= 1e6
    bad[1, 1] = float("nan")
    cold = ops.glm_cg(c.x, c.v, c.v_bias, **names, rtol=0.0, max_steps=3)
    mixed = ops.glm_cg(c.x, c.v, c.v_bias, q0=bad, q0_bias=exact.q_bias, **names, rtol=0.0, max_steps=3)
    for task, k in ((0, 0), (1, 1)):  # a guess worse than zero is not used
        assert_close(mixed.q[task, k], cold.q[task, k], dtype, 10)
    torch.testing.assert_close(mixed.q[0, 1], exact.q[0, 1], rtol=1e-3, atol=1e-3)


@everywhere
@both_dtypes
@small
def test_neumann(shape, dtype, device):
    c = Case(shape, dtype, device)
    weights = c.weights / c.weights.shape[-1]
    for kind, curvature in c.curvatures():
        for b_bias in (None, c.v_bias):
            for terms in (1, 2, 7):
                arguments = (kind, curvature, weights, c.reg, None)
                names = dict(zip(("kind", "curvature", "weights", "reg"), arguments[:4], strict=True))
                got = ops.glm_neumann(c.x, c.v, b_bias, **names, damping=0.2, scale=0.1, num_terms=terms)
                expected = reference.glm_neumann(c.x, c.v, b_bias, *arguments, 0.2, 0.1, terms)
                assert_close(got.q, expected[0], dtype, 10)
                assert b_bias is None or assert_close(got.q_bias, expected[1], dtype, 10) is None
                assert_close(got.ratio, expected[2], dtype, 10)
        once = ops.glm_neumann(c.x, c.v, kind=kind, curvature=curvature, scale=0.1, num_terms=1)
        assert_close(once.q, 0.1 * c.v, dtype)


@everywhere
@both_dtypes
@pytest.mark.parametrize("shape", [(None, None, 33, 17, 5), (3, None, 20, 33, 1), (2, None, 2001, 65, 10)], ids=str)
def test_gd(shape, dtype, device):
    c = Case(shape, dtype, device)
    weights = c.weights / c.weights.shape[-1]
    for loss, targets in c.losses():
        for bias, momentum, steps in ((None, 0.0, 1), (c.bias, 0.9, 5), (c.bias, 0.5, 0)):
            reg, reg_bias = (c.reg, None) if momentum else (None, None)
            got = ops.glm_gd(
                c.x, c.w, bias, loss=loss, targets=targets, weights=weights, reg=reg, reg_bias=reg_bias, lr=0.1,
                momentum=momentum, num_steps=steps,
            )  # fmt: skip
            expected = reference.glm_gd(
                c.x, c.w, bias, None, None, loss, targets, weights, reg, reg_bias, 0.1, momentum, steps
            )
            for a, b in zip(got, expected, strict=True):
                assert a is None or assert_close(a, b, dtype, 10) is None


@everywhere
def test_gd_is_torch_sgd_and_can_be_continued(device):
    c = Case((None, None, 50, 8, 3), device=device)
    w, bias = c.w.clone().requires_grad_(), c.bias.clone().requires_grad_()
    optimizer = torch.optim.SGD([w, bias], lr=0.02, momentum=0.9)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        value = autograd_loss(c, "softmax", c.labels, w, bias)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    names = {
        "loss": "softmax",
        "targets": c.labels,
        "weights": c.weights,
        "reg": c.reg,
        "reg_bias": c.reg_bias,
        "lr": 0.02,
        "momentum": 0.9,
    }
    first = ops.glm_gd(c.x, c.w, c.bias, **names, num_steps=4)
    second = ops.glm_gd(
        c.x, first.w, first.bias, velocity=first.velocity, velocity_bias=first.velocity_bias, **names, num_steps=2
    )
    assert_close(second.w, w.detach(), torch.float64)
    assert_close(second.bias, bias.detach(), torch.float64)
    assert_close(
        torch.cat([first.losses, second.losses]).cpu(), torch.tensor(losses, dtype=torch.float64), torch.float64
    )


@everywhere
def test_regularizers_of_every_shape(device):
    c = Case((2, 3, 10, 4, 3), device=device)
    zero = torch.zeros_like(c.diagonal)

    def product(reg, reg_bias):
        names = {"kind": "diagonal", "curvature": zero, "reg": reg, "reg_bias": reg_bias}
        return ops.glm_hvp(c.x, c.v, c.v_bias, **names)

    for reg in (c.reg[0, 0, 0], c.reg[:, 0, 0], c.reg[0], c.reg):
        full = reg[:, None, None, None] if reg.ndim == 1 else reg[:, None] if reg.ndim == 3 else reg
        assert_close(product(reg, None)[0], full * c.v, torch.float64)
    for reg in (c.reg_bias[0, 0], c.reg_bias[:, 0], c.reg_bias[0], c.reg_bias):
        full = reg[:, None, None] if reg.shape == (2,) else reg[:, None] if reg.ndim == 2 else reg
        assert_close(product(None, reg)[1], full * c.v_bias, torch.float64)


@everywhere
def test_inputs_may_have_any_strides(device):
    c = Case((2, 3, 70, 20, 4), device=device)
    names = {"kind": "softmax", "curvature": c.p, "weights": c.weights, "reg": c.reg, "reg_bias": c.reg_bias}

    def strided(t):
        wide = torch.stack([t, t + 1], dim=-1).transpose(0, 1).contiguous().transpose(0, 1)
        return wide[..., 0]

    expected = ops.glm_hvp(c.x, c.v, c.v_bias, **names)
    got = ops.glm_hvp(
        strided(c.x), strided(c.v), strided(c.v_bias),
        **{k: strided(t) if isinstance(t, torch.Tensor) else t for k, t in names.items()},
    )  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    ones = torch.ones((), dtype=torch.float64, device=device).expand(2, 70)
    names["weights"] = ones
    got, _ = ops.glm_hvp(c.x, c.v, c.v_bias, **names)
    names["weights"] = None
    assert torch.equal(got, ops.glm_hvp(c.x, c.v, c.v_bias, **names)[0])
    got = ops.glm_gradient(c.x, c.w, loss="softmax", targets=strided(c.labels))
    assert torch.equal(got.dw, ops.glm_gradient(c.x, c.w, loss="softmax", targets=c.labels).dw)


@everywhere
@both_dtypes
def test_bits_repeat(dtype, device):
    """The same bits on every repeat and, on the CPU, for every number of threads, tasks beside each other or alone."""
    large, batch = Case((None, 2, 5001, 130, 10), dtype, device), Case((7, None, 25, 64, 5), dtype, device)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            found = []
            for c in (large, batch):
                found += ops.glm_hvp(c.x, c.v, c.v_bias, kind="softmax", curvature=c.p)
                found += ops.glm_gradient(c.x, c.w, c.bias, loss="softmax", targets=c.labels)
                found += ops.glm_cg(c.x, c.v, c.v_bias, kind="softmax", curvature=c.p, damping=1.0, max_steps=5)
            results.append(found)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = ops.glm_cg(
        batch.x[3], batch.v[3], batch.v_bias[3], kind="softmax", curvature=batch.p[3], damping=1.0, max_steps=5
    )
    assert torch.equal(alone.q, results[0][-3][3])


def test_float32_is_as_accurate_as_torch():
    c = Case((None, None, 20_001, 200, 10), torch.float32)
    wide = Case((None, None, 20_001, 200, 10))  # the same draws
    exact, _ = reference.glm_matmul_t(c.x.double(), reference.glm_matmul(c.x.double(), c.w.double(), None), False)
    got, _ = ops.glm_hvp(c.x, c.w, kind="diagonal", curvature=torch.ones(20_001))
    theirs = c.x.T @ (c.x @ c.w)
    assert wide.x.shape == c.x.shape
    assert (got.double() - exact).norm() <= 2 * (theirs.double() - exact).norm()


@everywhere
@needs_extension
@both_dtypes
@pytest.mark.parametrize("shape", [(None, None, 9, 5, 3), (2, 3, 4, 3, 2), (None, None, 0, 2, 1)], ids=str)
def test_opcheck(shape, dtype, device):
    native, c = torch.ops.mlopt, Case(shape, dtype, device)
    for bias in (False, True):
        b, vb, rb = (c.bias, c.v_bias, c.reg_bias) if bias else (None, None, None)
        for op, arguments in (
            (native.glm_matmul, (c.x, c.v, vb)),
            (native.glm_matmul_t, (c.x, c.r, bias)),
            (native.glm_hvp, (c.x, c.v, vb, "softmax", c.p, c.weights, c.reg, rb)),
            (native.glm_hvp, (c.x, c.v, vb, "diagonal", c.per_row, None, None, None)),
            (native.glm_gradient, (c.x, c.w, b, "softmax", c.labels, c.weights)),
            (native.glm_cg, (c.x, c.v, vb, c.v, vb, "diagonal", c.diagonal, None, c.reg, rb, 0.1, 1e-6, 3)),
            (native.glm_neumann, (c.x, c.v, vb, "softmax", c.p, None, c.reg, rb, 0.1, 0.5, 3)),
            (native.glm_gd, (c.x, c.w, b, c.w, b, "logistic", c.soft, None, c.reg, rb, 0.1, 0.9, 3)),
        ):
            torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("classes", [33, 40])
def test_many_classes_run_by_the_reference(classes):
    c = Case((None, 2, 20, 6, classes))
    got, _ = ops.glm_hvp(c.x, c.v, kind="softmax", curvature=c.p)
    assert_close(got, reference.glm_hvp(c.x, c.v, None, "softmax", c.p, None, None, None)[0], torch.float64)
    if ops.available():
        with pytest.raises(RuntimeError, match="mlopt::glm_matmul: expected 1 to 32 classes"):
            torch.ops.mlopt.glm_matmul(c.x, c.w, None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[3:10], ids=str)
def test_half_precision_features(device, dtype, shape):
    """Everything but X is float32: the results are those of X widened first."""
    c = Case(shape, torch.float32, device)
    x = c.x.to(dtype)
    wide = x.float()
    curvature = {"kind": "softmax", "curvature": c.p, "weights": c.weights}
    loss = {"loss": "softmax", "targets": c.labels, "weights": c.weights}
    for call in (
        lambda x: ops.glm_matmul(x, c.w, c.bias),
        lambda x: ops.glm_hvp(x, c.v, c.v_bias, **curvature)[0],
        lambda x: ops.glm_cg(x, c.v, c.v_bias, **curvature, damping=1.0, max_steps=3).q,
        lambda x: ops.glm_neumann(x, c.v, c.v_bias, **curvature, scale=0.01, num_terms=3).q,
        *([lambda x: ops.glm_gradient(x, c.w, **loss).dw] if c.w.ndim == c.x.ndim else []),
    ):
        got, expected = call(x), call(wide)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("features", [19, 72, 900])
def test_features_that_are_not_finite_show(features, dtype, value, device):
    c = Case((None, None, 40, features, 3), torch.float32, device)
    x = c.x.to(dtype)
    x[7, 5] = value
    rows = ops.glm_matmul(x, c.w, None).isfinite().all(dim=1)
    assert not rows[7] and rows.sum() == 39
    product, _ = ops.glm_hvp(x, c.v, None, kind="softmax", curvature=c.p, weights=c.weights)
    assert not product.isfinite().any()


def test_refusals():
    c = Case((2, None, 6, 4, 3))
    with pytest.raises(ValueError, match=r"glm_matmul: expected w \[T, D, C\] or \[T, K, D, C\] to go with x of shape"):
        ops.glm_matmul(c.x, c.w[0])
    with pytest.raises(ValueError, match=r"glm_matmul: expected w of shape .* got \(\(2, 4, 3\), torch.float32"):
        ops.glm_matmul(c.x, c.w.float())
    with pytest.raises(ValueError, match=r"glm_matmul: expected floating x"):
        ops.glm_matmul(torch.zeros(3), c.w)
    with pytest.raises(ValueError, match=r"glm_matmul_t: expected r \[n, C\] or \[K, n, C\]"):
        ops.glm_matmul_t(c.x[0], c.w[0])
    with pytest.raises(ValueError, match=r"glm_hvp: expected kind"):
        ops.glm_hvp(c.x, c.v, kind="probit", curvature=c.p)
    with pytest.raises(ValueError, match=r"glm_hvp: expected curvature of shape \(2, 6, 3\)"):
        ops.glm_hvp(c.x, c.v, kind="softmax", curvature=c.per_row)
    with pytest.raises(ValueError, match=r"glm_hvp: expected reg of shape \(\) or \(2,\) or \(4, 3\) or \(2, 4, 3\)"):
        ops.glm_hvp(c.x, c.v, kind="softmax", curvature=c.p, reg=c.reg[:, 0])
    with pytest.raises(ValueError, match=r"glm_hvp: expected weights of shape \(2, 6\)"):
        ops.glm_hvp(c.x, c.v, kind="softmax", curvature=c.p, weights=c.weights[0])
    with pytest.raises(ValueError, match=r"glm_hvp: not differentiable, but curvature requires a gradient"):
        ops.glm_hvp(c.x, c.v, kind="softmax", curvature=c.p.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"glm_gradient: expected targets in 0..2, got 0..3"):
        ops.glm_gradient(c.x, c.w, loss="softmax", targets=torch.tensor([0, 1, 2, 3, 0, 0]).expand(2, 6))
    with pytest.raises(ValueError, match=r"glm_gradient: expected targets of shape \(2, 6\), torch.int64"):
        ops.glm_gradient(c.x, c.w, loss="softmax", targets=c.labels[0])
    with pytest.raises(ValueError, match=r"glm_gradient: expected w \[T, D, C\] to go with"):
        ops.glm_gradient(c.x, c.w.unsqueeze(1), loss="softmax", targets=c.labels)
    with pytest.raises(ValueError, match=r"glm_cg: expected rtol >= 0"):
        ops.glm_cg(c.x, c.v, kind="softmax", curvature=c.p, rtol=-1.0)
    with pytest.raises(ValueError, match=r"glm_cg: q0_bias was given without"):
        ops.glm_cg(c.x, c.v, q0_bias=c.v_bias, kind="softmax", curvature=c.p)
    with pytest.raises(ValueError, match=r"glm_neumann: expected num_terms >= 1, got 0"):
        ops.glm_neumann(c.x, c.v, kind="softmax", curvature=c.p, scale=1.0, num_terms=0)
    with pytest.raises(ValueError, match=r"glm_gd: expected num_steps >= 0"):
        ops.glm_gd(c.x, c.w, loss="softmax", targets=c.labels, lr=0.1, num_steps=-1)


@needs_extension
def test_native_checks_repeat_what_the_wrappers_check():
    c = Case((None, None, 6, 4, 3))
    with pytest.raises(RuntimeError, match=r"mlopt::glm_matmul: expected parameters of shape \[4, 3\]"):
        torch.ops.mlopt.glm_matmul(c.x, c.w[:3], None)
    with pytest.raises(RuntimeError, match=r"mlopt::glm_gradient: expected targets in 0..2, got 7"):
        torch.ops.mlopt.glm_gradient(c.x, c.w, None, "softmax", c.labels + 7 - c.labels, None)
    with pytest.raises(RuntimeError, match=r"mlopt::glm_hvp: not differentiable, but curvature requires a gradient"):
        torch.ops.mlopt.glm_hvp(c.x, c.v, None, "softmax", c.p.clone().requires_grad_(), None, None, None)
    with pytest.raises(
        RuntimeError, match=r"mlopt::glm_matmul: expected parameters of shape .*, Float, .* got .* Half"
    ):
        torch.ops.mlopt.glm_matmul(c.x.half(), c.w.half(), None)
    with pytest.raises(RuntimeError, match=r"mlopt::glm_matmul: expected float32 or float64"):
        torch.ops.mlopt.glm_matmul(c.x.long(), c.w.long(), None)


class ProductsInWorker(Dataset):
    """Items that a product computes: the numbers of threads of the process before and after it."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        x, v = torch.randn(4096, 256), torch.randn(256, 8)
        before = len(os.listdir("/proc/self/task"))
        product = ops.glm_matmul(x, v)
        torch.testing.assert_close(product, x @ v, rtol=1e-4, atol=1e-3)
        return before, len(os.listdir("/proc/self/task")), torch.get_num_threads()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux lists them")
def test_no_more_threads_in_a_loader_worker():
    (item,) = DataLoader(ProductsInWorker(), batch_size=None, num_workers=1)
    before, after, num_threads = item
    assert (after - before, num_threads) == (0, 1)
