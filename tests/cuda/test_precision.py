"""Problems in half precision: what autocast computes on the device, near the numbers of float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.backends import inductor
from tests.cuda.programs import LONG, alone, class_batches, compiled, lowerings, moved, perceptron, reweighting, train
from tests.helpers.double_backward import cg, flat, grad, unflat

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def program(precision, device, dtype=torch.float32):
    options = {} if precision is None else {"precision": precision}
    return moved(
        reweighting(dtype=dtype, hypergradient=mlopt.CG(max_steps=4, rtol=0.0, damping=1.0), **options), device
    )


def error(a, b):
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm())


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("precision", HALF)
def test_hypergradient_is_that_of_autocast(precision, device):
    """Against double backward of the loss under autocast, written by hand, on the same device."""
    plan = compiled(program(precision, device))
    got = flat(plan.hypergradient("weighting").values())
    lower, upper = plan.graph.problems.values()
    theta, lam = list(lower.module.parameters()), list(upper.module.parameters())
    scale = 1.0 if lower.loss_scale is None else float(lower.loss_scale.value)
    (x, y), (x_upper, y_upper) = lower.data[0], upper.data[0]
    v = flat(grad(F.cross_entropy(lower.module(x_upper), y_upper), theta))
    with torch.autocast(device, dtype=HALF[precision], cache_enabled=False):
        losses = F.cross_entropy(lower.module(x), y, reduction="none")
        loss = (upper.module(losses.detach()[:, None]).squeeze(1) * losses).mean()
    gradient = torch.autograd.grad(scale * loss, theta, create_graph=True)

    def product(vector, inputs):
        norm = vector.norm() if scale != 1 and vector.any() else 1.0
        return flat(grad(gradient, inputs, unflat(vector / norm, theta), retain_graph=True)) * norm / scale

    q = cg(lambda u: product(u, theta) + u, v, torch.zeros_like(v), 4, 0.0)
    assert error(got, -product(q, lam)) < 1e-2
    exact = compiled(program(None, "cpu", torch.float64), verify=False)
    assert 1e-6 < error(got, flat(exact.hypergradient("weighting").values())) < 1e-1


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("precision", HALF)
def test_training_stays_near_float64(precision, device):
    plan = compiled(program(precision, device))
    got = train(plan, 8)
    expected = train(compiled(program(None, "cpu", torch.float64), verify=False), 8)
    for key in ("classifier: loss", "weighting: loss", "classifier.0.weight", "classifier.2.weight"):
        assert error(got[key], expected[key]) < 5e-2, key
    assert {p.dtype for p in plan.graph.problems["classifier"].module.parameters()} == {torch.float32}


@pytest.mark.parametrize("device", LONG)
def test_overflow_halves_the_loss_scale(device):
    """The first factors overflow in fp16; steps are left out until one fits, and training goes on."""

    class Large(mlopt.Problem):
        def training_step(self, batch):
            x, y = batch
            return 100 * F.cross_entropy(self.module(x) * 100, y)

    torch.manual_seed(0)
    net = perceptron().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    data = [(x.float().to(device), y.to(device)) for x, y in class_batches(1, 2, (6,))]
    problem = Large("large", module=net, optimizer=optimizer, data=data, hypergradient=None, precision="fp16")
    before = net[0].weight.detach().clone()
    plan = compiled([problem], verify=False)
    plan.run(20)
    assert problem.loss_scale.num_overflows > 0 and problem.loss_scale.value.device.type == device
    assert not torch.equal(net[0].weight, before) and bool(net[0].weight.isfinite().all())


@pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing()))
@pytest.mark.parametrize("device", LONG)
def test_packages_in_half_precision(device, packages):
    def make():
        (made,) = alone(dtype=torch.float32, optimizer=torch.optim.SGD)
        made.precision = "bf16"
        return moved([made], device)

    got, expected = (
        compiled(make(), backend, cache_dir=packages, verify=backend != "eager") for backend in ("inductor", "eager")
    )
    assert set(lowerings(got).values()) == {"inductor"}, got.explain()
    a, b = train(got, 12), train(expected, 12)
    for key in a:
        assert error(a[key], b[key]) < 2e-2, key


class Half(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        logits = self.module(x.float())
        return F.cross_entropy(logits, y) + self.upper.module.weight.exp().mean() * self.module.weight.square().sum()


class Upper(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.lower.module(x.float()), y)


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("stored", HALF.values(), ids=HALF)
def test_data_stored_in_halves(stored, device, monkeypatch, tmp_path):
    """A linear model whose X is widened by the loss: the kernels read the halves."""
    pytest.importorskip("mlopt._C")
    from mlopt.backends.native import choice

    times = iter(range(100_000))
    monkeypatch.setattr(choice, "least_time", lambda *args: next(times))

    def make(device):
        torch.manual_seed(0)
        net, upper = nn.Linear(6, 3), nn.Linear(2, 2)
        data = [(x.to(stored), y) for x, y in class_batches(1, 1, (6,), size=50)]
        options = {"hypergradient": mlopt.CG(max_steps=6, damping=0.1, rtol=0.0), "data": data, "unroll_steps": 3}
        lower = Half("lower", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), **options)
        sgd = torch.optim.SGD(upper.parameters(), lr=0.1)
        return moved([lower, Upper("upper", module=upper, optimizer=sgd, data=data)], device)

    plan = compiled(make(device), "native", cache_dir=tmp_path)
    assert lowerings(plan)["lower", "hvp"] == "glm kernel", plan.explain()
    got, expected = train(plan, 9), train(compiled(make("cpu"), verify=False), 9)
    for key in got:
        assert error(got[key], expected[key]) < 1e-3 or float(expected[key].norm()) < 1e-6, key
