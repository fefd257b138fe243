"""States, saved plans, data on the host, and what a plan tells of itself."""

import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import mlopt
from mlopt.backends import inductor
from mlopt.capture import flatten_batch
from mlopt.errors import ProblemError, StateError
from tests.cuda.programs import (
    DEVICES,
    GPU,
    LONG,
    alone,
    assert_close,
    assert_equal,
    class_batches,
    compiled,
    convolutions,
    floats,
    linear_model,
    moved,
    results_of,
    reweighting,
    train,
)

ROOT = Path(__file__).parents[2]
BACKENDS = [
    "eager",
    pytest.param("inductor", marks=pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing()))),
]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, lambda device: {}),
    "adam, capturable": (torch.optim.Adam, lambda device: {"capturable": device == "cuda"}),
    "sgd": (torch.optim.SGD, lambda device: {"momentum": 0.9}),
}


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_same_bits(name, device):
    """With dropout, whose generator is the device's, and a state that has gone through a file to the CPU."""
    optimizer, settings = OPTIMIZERS[name]

    def make():
        options = {"optimizer": optimizer, "settings": settings(device)}
        return compiled(moved(reweighting(convolutions, (1, 4, 4), **options), device), verify=False)

    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        plan = make()
        torch.manual_seed(1)
        plan.run(3)
        state = through_a_file(plan.state_dict())
        plan.run(4)
        expected = results_of(plan) | {"next": torch.rand(3, device=device).cpu()}
        for other in (plan, make()):  # back in the same plan, and on in a new one
            torch.manual_seed(9)
            other.load_state_dict(state)
            other.run(4)
            assert_equal(results_of(other) | {"next": torch.rand(3, device=device).cpu()}, expected)


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_saved_plan_runs_in_another_process(backend, device, packages, tmp_path):
    """Where nothing of the tests can be imported; to rounding, as sums on a GPU may come in another order."""
    plan = compiled(moved(reweighting(count=1), device), backend, cache_dir=packages)
    plan.run(3)
    data = {name: p.data for name, p in plan.graph.problems.items()}
    plan.save(tmp_path / "plan")
    torch.save(data, tmp_path / "data.pt")
    code = f"""
    import sys, torch, mlopt
    plan = mlopt.load({str(tmp_path / "plan")!r}, data=torch.load({str(tmp_path / "data.pt")!r}))
    assert not any("tests" in name for name in sys.modules)
    plan.run(4)
    tensors = {{f"{{n}}.{{k}}": v for n, p in plan.graph.problems.items() for k, v in p.module.state_dict().items()}}
    tensors |= plan.hypergradient("weighting")
    torch.save([tensors, plan.explain()], {str(tmp_path / "out.pt")!r})
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    plan.run(4)
    found, text = torch.load(tmp_path / "out.pt")
    assert all(t.device.type == device for t in found.values())
    states = {f"{n}.{k}": v for n, p in plan.graph.problems.items() for k, v in p.module.state_dict().items()}
    expected = states | plan.hypergradient("weighting")
    assert_close(*({k: floats(v) for k, v in tensors.items()} for tensors in (found, expected)), rtol=1e-11, atol=1e-12)
    if backend == "inductor":
        assert "from the cache" in text and "compiled in" not in text and "not compiled" not in text, text


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("pin_memory", [False, True], ids=["pageable", "pinned"])
def test_batches_come_from_the_host(pin_memory, device):
    """A loader gives tensors of the CPU; they are moved to the device of the parameters."""
    pin_memory = pin_memory and device == "cuda"

    def loader(seed):
        batches = class_batches(seed, 3, (6,))
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=10, pin_memory=pin_memory)

    def make(from_host):
        problems = moved(reweighting(), device)
        for seed, problem in enumerate(problems, start=1):
            problem.data = loader(seed) if from_host else problem.data
        return problems

    plan = compiled(make(from_host=True), verify=False)
    got = train(plan, 8)
    batch = plan.last_batch("classifier")
    assert {t.device.type for t in batch} == {device}
    assert_close(got, train(compiled(make(from_host=False), verify=False), 8), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("device", LONG)
def test_a_list_of_batches_on_the_host(device):
    """One batch of a linear model, moved; changed in place, it is the changed one that counts."""

    def make():
        problems = linear_model("logistic", unroll_steps=3)
        data = [p.data for p in problems]
        for problem, kept in zip(moved(problems, device), data, strict=True):
            problem.data = kept
        return problems

    expected, plan = train(compiled(linear_model("logistic", unroll_steps=3), verify=False), 6), compiled(make())
    assert_close(train(plan, 6), expected, rtol=1e-8, atol=1e-10)
    before = plan.hypergradient("upper", batch=plan.graph.problems["upper"].data[0])["value"]
    plan.graph.problems["upper"].data[0][0].mul_(2)
    after = plan.hypergradient("upper", batch=plan.graph.problems["upper"].data[0])["value"]
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("device", GPU)
def test_batches_on_the_gpu_for_a_problem_on_the_host(device):
    """They are there when they are read."""
    x = torch.randn(1 << 22, 2, dtype=torch.float64, device=device)
    for _ in range(5):
        (got,), _ = flatten_batch("alone", (x.add_(1),), torch.device("cpu"))
        assert torch.equal(got, x.cpu())


@pytest.mark.parametrize("device", GPU)
def test_problems_on_two_devices_are_one_clear_error(device):
    lower, upper = reweighting()
    moved([lower], device)
    with pytest.raises(ProblemError, match=r"'weighting' has its parameters on cpu, problem 'classifier' on cuda"):
        compiled([lower, upper])


@pytest.mark.parametrize("device", GPU)
def test_a_module_that_is_moved_later_is_one_clear_error(device):
    plan = compiled(moved(reweighting(), device))
    plan.step()
    plan.graph.problems["classifier"].module.cpu()
    with pytest.raises(StateError, match=r"problem 'classifier'.*on cpu.*it was .*on cuda"):
        plan.step()


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_over_another_device_names_the_line(device):
    """A tensor that a loss makes without a device is on the CPU; torch says so, mlopt says where."""

    class Wrong(mlopt.Problem):
        def training_step(self, batch):
            x, _ = batch
            return (self.module(x) + torch.zeros(3, device="cpu" if device == "cuda" else "meta")).sum()

    (made,) = moved(alone(), device)
    problem = Wrong("wrong", module=made.module, optimizer=made.optimizer, data=made.data, hypergradient=None)
    with pytest.raises(mlopt.errors.CaptureError, match=r"problem 'wrong'.*could not be captured(.|\n)*test_state.py"):
        compiled([problem])


@pytest.mark.parametrize("device", LONG)
def test_check_measures_what_it_does_on_a_cpu(device):
    def report(device):
        plan = compiled(moved(linear_model("logistic", mlopt.CG(max_steps=3, damping=0.1)), device))
        torch.manual_seed(5)
        plan.run(8)
        return plan.check()

    got, expected = report(device), report("cpu")
    (edge,), (expected_edge,) = got.edges, expected.edges
    for name in ("cosine", "error", "residual", "smallest", "largest", "gradient_norm"):
        assert getattr(edge, name) == pytest.approx(getattr(expected_edge, name), rel=1e-4, abs=1e-9), name
    assert got.hypergradients[0].norm == pytest.approx(expected.hypergradients[0].norm, rel=1e-6)
    assert "lower" in str(got)


@pytest.mark.parametrize("device", LONG)
def test_a_wrong_derivative_is_noticed(device, monkeypatch):
    """Verification compares on the device, too: a product that is off by 1e-3 is an error that names it."""
    from mlopt.backends.eager import EagerGraph

    right = EagerGraph.__call__

    def wrong(self, *arguments):
        results = right(self, *arguments)
        return [results[0] * (1 + 1e-3)] if len(results) == 1 else results

    monkeypatch.setattr(EagerGraph, "__call__", wrong)
    with pytest.raises(mlopt.errors.VerificationError, match="problem 'classifier'.*disagrees with plain autograd"):
        compiled(moved(reweighting(), device))


@pytest.mark.parametrize("device", LONG)
def test_a_plan_describes_itself(device, tmp_path):
    plan = compiled(moved(reweighting(), device))
    text = plan.explain()
    assert "classifier" in text and "2 problems" in text
    plan.draw(tmp_path / "plan.svg")
    assert "<svg" in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize("device", LONG)
def test_a_run_of_the_engine(device, tmp_path):
    """Validation, checkpoints and a guard against NaN; resumed, with the same bits."""

    def engine(steps, **options):
        plan = compiled(moved(reweighting(), device), verify=False)
        checkpoints = mlopt.Checkpoints(every=3, keep_last=2)
        return mlopt.Engine(
            plan,
            steps=steps,
            non_finite="raise",
            checkpoints=checkpoints,
            run_dir=tmp_path / "run",
            progress=False,
            **options,
        ), plan

    first, _ = engine(6)
    first.run()
    second, plan = engine(9, resume=True)
    assert second.step == 6
    second.run()
    torch.manual_seed(0)
    whole = compiled(moved(reweighting(), device), verify=False)
    whole.run(9)
    assert_close(results_of(plan), results_of(whole), rtol=1e-12, atol=1e-13)
