"""Compiled programs: the numbers of torch calls, recorded as CUDA graphs or not."""

import pytest
import torch
from torch.optim import lr_scheduler

from mlopt import ops
from mlopt.backends import inductor
from mlopt.ops.recorder import CudaGraphRecorder
from tests.cuda.programs import LONG, alone, assert_close, compiled, convolutions, lowerings, moved, reweighting, train

pytestmark = pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing()))
STEPS = 12


@pytest.fixture
def recorded(monkeypatch):
    """Whether each recording that was tried was made."""
    made, record = [], CudaGraphRecorder.record

    def noted(self, body):
        replay = record(self, body)
        made.append(replay is not None)
        return replay

    monkeypatch.setattr(CudaGraphRecorder, "record", noted)
    return made


def packages_of(problems, device, packages):
    plan = compiled(moved(problems, device), "inductor", cache_dir=packages)
    assert set(lowerings(plan).values()) == {"inductor"}, plan.explain()
    return plan


@pytest.mark.parametrize("device", LONG)
def test_a_bilevel_program_trains_as_by_torch_calls(device, packages, recorded):
    """AdamW over minibatches, conjugate gradients, Adam above."""
    expected = train(compiled(reweighting(), verify=False), STEPS)
    plan = packages_of(reweighting(), device, packages)
    recorded.clear()
    assert_close(train(plan, STEPS), expected, rtol=1e-8, atol=1e-10)
    assert all(recorded) and bool(recorded) == (device == "cuda")  # the solves; AdamW's counter is on the host


def halving(optimizer):
    return lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


def adam(capturable):
    """On a CPU torch's Adam cannot be capturable; its numbers are those of any other."""
    return lambda device: {"optimizer": torch.optim.Adam, "capturable": capturable and device == "cuda"}


# name -> (options on a device, whether its steps can be recorded on a GPU). With a counter on the device, torch's Adam
# computes its first step, which is never compiled, in float32.
STEPPED = {
    "sgd": (lambda device: {"optimizer": torch.optim.SGD, "momentum": 0.9}, True),
    "sgd, scheduled": (lambda device: {"optimizer": torch.optim.SGD, "momentum": 0.9, "scheduler": halving}, False),
    "adam, counter on the host": (adam(capturable=False), False),
    "adam, counter on the device": (adam(capturable=True), True),
    "adam, counter on the device, scheduled": (lambda device: {**adam(True)(device), "scheduler": halving}, False),
    "adam, fused": (lambda device: {"optimizer": torch.optim.Adam, "fused": True}, True),
}


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("graphs", ["recorded", "not recorded"])
@pytest.mark.parametrize("name", STEPPED)
def test_loops_of_steps(name, graphs, device, packages, recorded, monkeypatch):
    if graphs == "not recorded":
        monkeypatch.setenv("MLOPT_CUDA_GRAPHS", "0")
    options, can_be = STEPPED[name]
    expected = train(compiled(alone(**options("cpu")), verify=False), STEPS)
    plan = packages_of(alone(**options(device)), device, packages)
    recorded.clear()
    got, exact = train(plan, STEPS), not {"capturable", "fused"} & {k for k, v in options("cuda").items() if v}
    assert_close(got, expected, rtol=1e-9 if exact else 1e-4, atol=1e-11 if exact else 1e-6)
    assert recorded == [True] * (can_be and graphs == "recorded" and device == "cuda")
    assert ops.recorder_for(torch.device(device)) is None or device == "cuda"


@pytest.mark.parametrize("device", LONG)
def test_dropout_and_batch_norm_draw_as_torch_does(device, packages, recorded):
    """Packages draw from torch's generator: the same masks as by torch calls on the same device, and never recorded."""
    made = {
        backend: compiled(moved(alone(convolutions, (1, 4, 4)), device), backend, cache_dir=packages)
        for backend in ("eager", "inductor")
    }
    assert set(lowerings(made["inductor"]).values()) == {"inductor"}, made["inductor"].explain()
    got = {backend: train(plan, STEPS) for backend, plan in made.items()}
    assert_close(got["inductor"], got["eager"], rtol=1e-7, atol=1e-9)
    assert not recorded


@pytest.mark.parametrize("device", LONG)
def test_results_of_every_step_of_a_loop(device, packages):
    """Losses that a loop hands out are those of single steps, not overwritten by later replays."""
    losses = {"run": [], "step": []}
    options = {"optimizer": torch.optim.SGD, "momentum": 0.9}
    plan = packages_of(alone(**options), device, packages)
    plan.run(STEPS, on_results=lambda results, count: losses["run"].append(results["alone"]["loss"].reshape(-1)))
    single = compiled(moved(alone(**options), device), verify=False)
    losses["step"] = [single.step()["alone"]["loss"].reshape(-1) for _ in range(STEPS)]
    torch.testing.assert_close(torch.cat(losses["run"]), torch.cat(losses["step"]), rtol=1e-9, atol=1e-11)
