"""Linear models whose solves and lower steps are kernels: the numbers of the eager backend on the CPU."""

import pytest
import torch

import mlopt
from mlopt.backends import InductorBackend, NativeBackend, inductor
from mlopt.backends.native import choice
from mlopt.backends.native.descent import GlmDescent
from mlopt.backends.native.glm import GlmGraph
from tests.cuda.programs import CG, DEVICES, KINDS, LONG, assert_close, compiled, linear_model, lowerings, moved, train
from tests.helpers.steps import GraphBackend

pytest.importorskip("mlopt._C")
ESTIMATORS = {
    "cg": CG,
    "cg, warm": mlopt.CG(max_steps=12, rtol=1e-10, damping=0.1, warm_start=True),
    "neumann": mlopt.Neumann(num_terms=8, scale=0.2),
    "nystrom": mlopt.Nystrom(rank=5, damping=0.5),
    "cg, ggn": mlopt.CG(max_steps=12, rtol=1e-10, damping=0.1, curvature="ggn"),
}


@pytest.fixture(autouse=True)
def _kernels(tmp_path, monkeypatch):
    """Let every kernel that is measured win, and remember nothing."""
    times = iter(range(100_000))
    monkeypatch.setattr(choice, "least_time", lambda *args: next(times))
    monkeypatch.setenv("MLOPT_CACHE_DIR", str(tmp_path))


@pytest.fixture
def products(monkeypatch):
    """The devices of the kernels that were bound."""
    devices, bind = [], GlmGraph._bind

    def bound(self, residuals):
        devices.append(self._structure.matrix(residuals).device.type)
        return bind(self, residuals)

    monkeypatch.setattr(GlmGraph, "_bind", bound)
    return devices


CASES = [*(("cleaning", name) for name in ESTIMATORS), *((kind, "cg") for kind in KINDS if kind != "cleaning")]


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize(("kind", "estimator"), CASES)
def test_solves_by_kernels(kind, estimator, device, products):
    expected = train(compiled(linear_model(kind, ESTIMATORS[estimator])), 24)
    plan = compiled(moved(linear_model(kind, ESTIMATORS[estimator]), device), "native")
    assert lowerings(plan)["lower", "hvp"] == "glm kernel", plan.explain()
    products.clear()
    assert_close(train(plan, 24), expected, rtol=1e-8, atol=1e-10)
    assert len(products) >= 3 and set(products) == {device}


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("kind", KINDS)
def test_solves_in_float32(kind, device, products):
    expected = train(compiled(linear_model(kind)), 8)
    plan = compiled(moved(linear_model(kind, dtype=torch.float32), device), "native")
    products.clear()
    assert_close(train(plan, 8), expected, rtol=2e-3, atol=1e-4)
    assert set(products) == {device}


@pytest.mark.parametrize("device", DEVICES)
def test_the_environment_chooses_kernels_without_packages(device, monkeypatch, products):
    monkeypatch.setenv("MLOPT_BACKEND", "native")
    expected = train(compiled(linear_model("cleaning")), 8)
    plan = compiled(moved(linear_model("cleaning"), device), "auto")
    assert lowerings(plan)["lower", "hvp"] == "glm kernel", plan.explain()
    assert_close(train(plan, 8), expected, rtol=1e-8, atol=1e-10)
    assert set(products) == {device}


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_steps_by_one_kernel(kind, momentum, device, tmp_path):
    """Twenty steps in one call are twenty calls of the graph of a single one."""
    plan = compiled(moved(linear_model(kind, momentum=momentum), device), NativeBackend(GraphBackend(), tmp_path))
    (derivatives,) = plan._report.graphs["lower"]
    step = derivatives.step
    assert step is not None and step.descent is not None, plan.explain()
    plan.step()  # makes the optimizer's state
    batch = plan._executor.states["lower"].stream.peek()
    arguments = step._arguments(batch, step._update)
    made = step.descent.make(arguments, step.graph.feedback, 20)
    assert made is not None and made.error is None and made.num_steps == 20, step.descent.lowering
    for got, expected in zip(made.fed, step._one_by_one(arguments, 20), strict=True):
        assert got.device.type == device
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing()))
@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("others", ["compiled", "the faster"])
def test_packages_and_kernels_together(others, device, packages, monkeypatch):
    """What the default is, on CPUs and GPUs: packages where they are faster, lower steps and products by kernels."""
    expected = train(compiled(linear_model("logistic", momentum=0.0)), 24)
    counts, make = [], GlmDescent.make

    def counting(self, arguments, feedback, num_steps):
        counts.append(num_steps)
        return make(self, arguments, feedback, num_steps)

    monkeypatch.setattr(GlmDescent, "make", counting)
    backend = NativeBackend(InductorBackend(packages, measure=others == "the faster"))
    plan = compiled(moved(linear_model("logistic", momentum=0.0), device), backend)
    found = lowerings(plan)
    kernels = {key for key, name in found.items() if name == "glm kernel"}
    assert kernels == {("lower", "hvp"), ("lower", "descent")}, plan.explain()
    assert {name for key, name in found.items() if key not in kernels} == {"inductor"}, plan.explain()  # as yet
    counts.clear()
    assert_close(train(plan, 24), expected, rtol=1e-8, atol=1e-10)
    assert counts and set(counts) == {7}  # of eight: the last by itself, for its loss
    assert (" us eager, " in plan.explain()) == (others == "the faster")
