"""Products of small matrices by the kernel: which are replaced, how that is chosen, what packages make of it."""

import importlib
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import mlopt
from mlopt import backends, ops
from mlopt.backends import inductor
from mlopt.backends.inductor.cache import DiskCache
from mlopt.backends.inductor.interface import cut_interface
from mlopt.backends.inductor.small import c_shims, lower_small_products
from mlopt.backends.inductor.thin import fuse_thin_products
from mlopt.backends.native.skinny import lower_skinny_products
from tests.helpers import bilevel

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten
needs_compiler = pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing()))
pytestmark = pytest.mark.skipif(not ops.available(), reason="the extension is not built")


class Chosen:
    """A cache that has measured everything."""

    def __init__(self, name):
        self.name = name

    def get_choice(self, key):
        return self.name, ""


KERNEL, TORCH = Chosen("kernel"), Chosen("torch")


def traced(function, *inputs, mode="fake"):
    return make_fx(function, tracing_mode=mode)(*inputs)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def kernels(module):
    return [n for n in module.graph.nodes if n.target is torch.ops.mlopt.small_mm.default]


CASES = {
    "A B": (lambda a, b: a @ b, normal(30, 20), normal(20, 10)),
    "A B^T": (lambda a, b: a @ b.t(), normal(30, 20), normal(10, 20)),
    "A^T B": (lambda a, b: a.t() @ b, normal(30, 20), normal(30, 10)),
    "A B + b": (lambda b, x, w: torch.addmm(b, x, w), normal(10), normal(30, 20), normal(20, 10)),
    "A B + C": (lambda c, a, b: c + a @ b, normal(30, 10), normal(30, 20), normal(20, 10)),
    "part": (lambda a, b: a[2:9, ::2] @ b, normal(30, 20), normal(10, 10)),
}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name, mode):
    function, *inputs = CASES[name]
    module = traced(function, *inputs, mode=mode)
    lowered, count = lower_small_products(module, KERNEL)
    assert count == len(kernels(lowered)) == 1 and not kernels(module)
    assert not {aten.mm.default, aten.addmm.default} & {n.target for n in lowered.graph.nodes}
    torch.testing.assert_close(lowered(*inputs), module(*inputs), rtol=1e-13, atol=1e-13)
    (node,) = kernels(lowered)
    assert isinstance(node.meta["val"], torch.Tensor) and node.meta["val"].is_contiguous()
    lowered.graph.lint()
    assert lower_small_products(lowered, KERNEL) == (lowered, 0)
    assert lower_small_products(module, TORCH) == (module, 0)


LEFT = {
    "integers": (lambda a, b: a @ b, torch.ones(9, 9, dtype=torch.int64), torch.ones(9, 9, dtype=torch.int64)),
    "halves": (lambda a, b: a @ b, normal(9, 9).half(), normal(9, 9).half()),
    "batches": (lambda a, b: a @ b, normal(3, 9, 9), normal(3, 9, 9)),
    "many rows": (lambda a, b: a @ b, normal(1025, 9), normal(9, 9)),
    "many products": (lambda a, b: a @ b, normal(200, 100), normal(100, 100)),
    "nothing": (lambda a, b: a @ b, normal(9, 0), normal(0, 9)),
    "a matrix added": (torch.addmm, normal(9, 9), normal(9, 9), normal(9, 9)),
    "one number added": (torch.addmm, normal(1), normal(9, 9), normal(9, 9)),
    "a factor": (lambda b, x, w: torch.addmm(b, x, w, beta=2), normal(9), normal(9, 9), normal(9, 9)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone(name):
    function, *inputs = LEFT[name]
    module = traced(function, *inputs)
    assert lower_small_products(module, KERNEL) == (module, 0)


def test_other_devices_are_left_alone():
    module = traced(lambda a, b: a @ b, normal(9, 9), normal(9, 9))
    with FakeTensorMode():
        for node in module.graph.nodes:
            if node.op != "output":
                node.meta["val"] = torch.empty(9, 9, device="cuda")
    assert lower_small_products(module, KERNEL) == (module, 0)


def test_other_kernels_come_first():
    """A product with one column is fused with what is around it; one of a tall matrix has its own kernel."""
    thin = fuse_thin_products(traced(lambda a, b: a @ b, normal(30, 20), normal(20, 1)))
    assert lower_small_products(thin, KERNEL) == (thin, 0)
    skinny, count = lower_skinny_products(traced(lambda a, b: a @ b, normal(1000, 40), normal(40, 10)))
    assert count == 1 and lower_small_products(skinny, KERNEL) == (skinny, 0)


def test_kernels_can_be_switched_off(monkeypatch):
    module = traced(*CASES["A B"])
    monkeypatch.setenv("MLOPT_KERNELS", "0")
    assert lower_small_products(module, KERNEL) == (module, 0)


def test_the_choice_is_measured_once(tmp_path, monkeypatch):
    calls = []

    def times(a, b, added, with_bias):
        calls.append((a.shape, a.stride(), b.shape, b.stride(), None if added is None else added.shape, with_bias))
        return (1e-6, 2e-6) if b.stride(1) == 1 else (2e-6, 1e-6)

    monkeypatch.setattr(importlib.import_module("mlopt._C"), "small_mm_times", times)
    for _ in range(2):
        found = {name: lower_small_products(traced(*case), DiskCache(tmp_path))[1] for name, case in CASES.items()}
        assert [name for name, count in found.items() if not count] == ["A B^T"]
    plain = ((30, 20), (20, 1), (20, 10), (10, 1))
    assert calls == [
        (*plain, None, False),
        ((30, 20), (20, 1), (20, 10), (1, 20), None, False),
        ((20, 30), (1, 20), (30, 10), (10, 1), None, False),
        (*plain, (10,), True),
        (*plain, (30, 10), False),  # Inductor would have torch add the matrix
        ((7, 10), (20, 2), (10, 10), (10, 1), None, False),
    ]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert lower_small_products(traced(*CASES["A B"]), DiskCache(tmp_path))[1] == 1 and len(calls) == 7


def test_measuring():
    extension = importlib.import_module("mlopt._C")
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.float64):
        for added in (None, normal(10, dtype=dtype), normal(30, 10, dtype=dtype)):
            a, b = normal(30, 20, dtype=dtype), normal(10, 20, dtype=dtype).t()
            with_bias = added is not None and added.ndim == 1
            assert all(0 < t < 1 for t in extension.small_mm_times(a, b, added, with_bias))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def always(monkeypatch):
    """The kernel is always found to be faster."""
    monkeypatch.setattr(importlib.import_module("mlopt._C"), "small_mm_times", lambda *args: (1e-6, 2e-6))


def network(x, w, b, v):
    hidden = torch.addmm(b, x, w).tanh()
    return hidden @ v, (hidden.t() @ x).sum(0), x @ w + hidden


@needs_compiler
def test_packages_call_the_kernel(always, tmp_path):
    inputs = normal(30, 20), normal(20, 10), normal(10), normal(5, 10).t()
    module = traced(lambda *args: list(network(*args)), *inputs)
    backend = backends.InductorBackend(tmp_path)
    lowered = backend.lower(module)
    assert lowered.lowering.backend == "inductor"
    assert lowered.lowering.note.endswith("4 small products by kernels")
    for got, expected in zip(lowered(*inputs), network(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(lowered(*inputs), lowered(*inputs), strict=True))
    (package,) = (tmp_path / "inductor").glob("*.pt2")
    with zipfile.ZipFile(package) as archive:
        text = "".join(archive.read(n).decode() for n in archive.namelist() if n.endswith(".wrapper.cpp"))
    assert text.count("aoti_torch_cpu_small_mm(") == 5  # declared, and called directly
    assert "aoti_torch_proxy_executor_call_function(proxy_executor" not in text


def test_only_graphs_with_the_op_have_its_settings():
    module = traced(lambda a, b: [a @ b], normal(30, 20), normal(20, 10))
    assert c_shims(cut_interface(module)[0]) == {}
    (settings,) = c_shims(cut_interface(lower_small_products(module, KERNEL)[0])[0]).values()
    assert list(settings) == [torch.ops.mlopt.small_mm.default]


@needs_compiler
@pytest.mark.slow
def test_a_saved_plan_in_another_process(always, tmp_path):
    torch.manual_seed(0)
    problems = bilevel.make(dtype=torch.float64, hypergradient=mlopt.CG(max_steps=5, damping=1.0))
    plan = mlopt.compile(
        mlopt.Graph(problems), backend="inductor", cache_dir=tmp_path / "cache", strict=True, progress=False
    )
    counts = re.findall(r"\d+ small products? by kernels", plan.explain())
    assert counts
    plan.save(tmp_path / "plan")
    expected = plan.hypergradient("reweight")
    torch.save({p.name: p.data for p in problems}, tmp_path / "data.pt")
    code = f"""
    import torch, mlopt
    plan = mlopt.load({str(tmp_path / "plan")!r}, data=torch.load({str(tmp_path / "data.pt")!r}))
    torch.save((plan.hypergradient("reweight"), plan.explain()), {str(tmp_path / "out.pt")!r})
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLOPT_CACHE_DIR": str(tmp_path / "empty")}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=tmp_path, env=environment)
    got, explained = torch.load(tmp_path / "out.pt")
    assert re.findall(r"\d+ small products? by kernels", explained) == counts and "compiled in" not in explained
    assert all(torch.equal(got[name], value) for name, value in expected.items())
