"""Products with one row or column as fused loops, against the products, in float64."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mlopt.backends.inductor.thin import fuse_thin_products

aten = torch.ops.aten


def traced(function, *inputs, mode="fake"):
    return make_fx(function, tracing_mode=mode)(*inputs)


def products(module):
    return [n.target for n in module.graph.nodes if n.target in (aten.mm.default, aten.addmm.default)]


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


class Module(torch.nn.Module):
    def forward(self, x, w):
        return torch.ops.aten.mm.default(x, w)


CASES = {
    "X w": (lambda x, w: x @ w, normal(30, 20), normal(20, 1)),
    "X w + b": (torch.addmm, normal(1), normal(30, 20), normal(20, 1)),
    "r X": (lambda r, x: r @ x, normal(1, 30), normal(30, 20)),
    "r X + b": (torch.addmm, normal(20), normal(1, 30), normal(30, 20)),
    "X^T r": (lambda x, r: x.t() @ r, normal(30, 5), normal(30, 1)),
    "dot": (lambda a, b: a @ b, normal(1, 30), normal(30, 1)),
    "outer": (lambda a, b: a @ b, normal(30, 1), normal(1, 1)),
}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name, mode):
    function, *inputs = CASES[name]
    module = traced(function, *inputs, mode=mode)
    assert products(module)
    fused = fuse_thin_products(module)
    if mode == "fake":
        assert not products(fused) or name == "outer"
    torch.testing.assert_close(fused(*inputs), module(*inputs), rtol=1e-13, atol=1e-13)
    for a, b in zip(fused.graph.nodes, module.graph.nodes, strict=False):
        if a.op == b.op == "output":
            assert a.args[0].meta["val"].shape == b.args[0].meta["val"].shape


def test_free_rows_stay_free():
    exported = torch.export.export(
        Module(), (normal(30, 20), normal(20, 1)), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=999)}, None)
    )
    fused = fuse_thin_products(exported.module())
    (total,) = (n for n in fused.graph.nodes if n.target is aten.sum.dim_IntList)
    assert isinstance(total.meta["val"].shape[0], torch.SymInt)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, w: x @ w, (normal(30, 8), normal(8, 1))),  # lanes would be wasted
        (lambda x, w: x @ w, (normal(3000, 100), normal(100, 1))),  # large
        (lambda x, w: x @ w, (normal(30, 20), normal(20, 2))),
        (lambda x, w: x @ w, (torch.ones(30, 20, dtype=torch.int64), torch.ones(20, 1, dtype=torch.int64))),
        (lambda b, x, w: torch.addmm(b, x, w, beta=2), (normal(1), normal(30, 20), normal(20, 1))),
    ],
)
def test_what_is_left_alone(function, inputs):
    module = traced(function, *inputs)
    assert fuse_thin_products(module) is module


FORMS = {
    "X w, r X": lambda x, w: (x @ w).t() @ x,
    "X w, X^T r": lambda x, w: (x.t() @ (x @ w)).t(),
    "w^T X^T, X^T r": lambda x, w: (x.t() @ (w.t() @ x.t()).t()).t(),
    "X w + b, r X": lambda x, w: torch.addmm(w[0], x, w).t() @ x,
}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("columns", [3, 20])
@pytest.mark.parametrize("name", FORMS)
def test_a_matrix_that_many_products_read_is_copied_once(name, columns, mode):
    def steps(x, w):
        for _ in range(5):
            w = w - 0.001 * FORMS[name](x, w).t()
        return w

    inputs = normal(70, columns), normal(columns, 1)
    module = traced(steps, *inputs, mode=mode)
    fused = fuse_thin_products(module)
    clones = [n for n in fused.graph.nodes if n.target is aten.clone.default]
    assert len(products(module)) == 10 and not products(fused) and len(clones) == 1
    torch.testing.assert_close(fused(*inputs), module(*inputs), rtol=1e-13, atol=1e-13)
    for shape in [(33, columns), (1, columns)] if mode == "symbolic" else []:
        x = normal(*shape)
        torch.testing.assert_close(fused(x, inputs[1]), module(x, inputs[1]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("change", ["few products", "few rows", "transposed", "computed"])
def test_a_matrix_that_is_not_copied(change):
    def steps(x, w):
        x = x.sin() if change == "computed" else x
        for _ in range(3 if change == "few products" else 5):
            w = w - 0.001 * ((x @ w).t() @ x).t()
        return w

    x = normal(8 if change == "few rows" else 70, 20)
    inputs = x.t().contiguous().t() if change == "transposed" else x, normal(20, 1)
    module = traced(steps, *inputs)
    fused = fuse_thin_products(module)
    assert not any(n.target is aten.clone.default for n in fused.graph.nodes)
    torch.testing.assert_close(fused(*inputs), module(*inputs), rtol=1e-13, atol=1e-13)
