"""The native loop over compiled steps: against the optimizer in float64, errors in the middle, Ctrl-C."""

import functools
import signal

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from mlopt import ops
from mlopt.backends import inductor
from tests.helpers.extras import extras
from tests.helpers.recording import Recorder
from tests.helpers.steps import Net, assert_same_state, batches, compiled, problem, state_of

pytestmark = [
    pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing())),
    pytest.mark.xdist_group("native-steps"),  # they share packages
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        # No bias in front of BatchNorm: its gradient is rounding noise, which Adam would blow up.
        self.layers = nn.Sequential(nn.Linear(6, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.layers(x)


def make(optimizer, **options):
    return problem(optimizer, net=Small, **options)


def nesterov(net):
    return optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


def nesterov_of_all(net):
    return optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def adam(net):
    return optim.Adam([{"params": net.layers[0].parameters(), "lr": 0.1}, {"params": net.layers[3].parameters()}])


def pair(made, cache, monkeypatch):
    ours, theirs = made(), made()
    torch.manual_seed(6)
    plan = compiled(ours, "inductor", monkeypatch, cache_dir=cache)
    torch.manual_seed(6)
    reference = compiled(theirs, "eager", monkeypatch)
    (derivatives,) = plan._report.graphs["net"]
    step = derivatives.step
    assert step is not None and step.is_used(), plan.explain()
    return ours, theirs, plan, reference, step


def native_runs(step, monkeypatch):
    """Whether each run of a step was a native loop."""
    runs = []
    for loop in (step._loop, step._keeping_loop):

        def counted(arguments, bind=loop._bind):
            found = bind(arguments)
            runs.append(found[0] is not None)
            return found

        monkeypatch.setattr(loop, "_bind", counted)
    return runs


@pytest.mark.parametrize("optimizer", extras([nesterov, adam], lambda o: o is adam), ids=lambda o: o.__name__)
@pytest.mark.parametrize("scheduled", extras([False, True], bool), ids=["", "scheduler"])
def test_native_steps_equal_the_optimizer(optimizer, scheduled, cache, monkeypatch):
    scheduler = (lambda o: lr_scheduler.ExponentialLR(o, 0.9)) if scheduled else None
    made = functools.partial(make, optimizer, scheduler=scheduler, clip_norm=0.3)
    ours, theirs, plan, reference, step = pair(made, cache, monkeypatch)
    runs = native_runs(step, monkeypatch)
    for n in (2, 30, 1, 7):
        result = plan.run(n)
        for _ in range(n):
            expected = reference.step()
        torch.testing.assert_close(result["net"], expected["net"], rtol=1e-12, atol=1e-12)
        assert_same_state(state_of(ours), state_of(theirs), 1e-11)
    assert runs == [True] * 4
    every = []
    plan.run(9, on_results=lambda results, count: every.append((results["net"], count)))
    expected = [reference.step()["net"] for _ in range(9)]
    assert [count for _, count in every] == [9]
    for name, values in every[0][0].items():
        torch.testing.assert_close(values, torch.stack([r[name] for r in expected]), rtol=1e-12, atol=1e-12)
    ours.optimizer.load_state_dict(ours.optimizer.state_dict())  # new tensors
    plan.run(3), reference.run(3)
    assert_same_state(state_of(ours), state_of(theirs), 1e-11)


@pytest.mark.slow
def test_batches_of_a_loader_whose_last_one_is_smaller(cache, monkeypatch):
    def made():
        x, y = batches(1, 22)[0]
        return make(nesterov, data=DataLoader([*zip(x, y, strict=True)], batch_size=4, shuffle=True), clip_norm=0.3)

    ours, theirs, plan, reference, step = pair(made, cache, monkeypatch)
    runs = native_runs(step, monkeypatch)
    torch.manual_seed(8)
    plan.run(20)
    torch.manual_seed(8)
    reference.run(20)
    assert_same_state(state_of(ours), state_of(theirs), 1e-11)
    assert runs and all(runs)


def test_an_error_in_the_middle(cache, monkeypatch):
    """A wrong class in the third batch: two whole steps are made, and the loss's own error comes."""
    good = batches(4)
    x, y = good[2]
    data = [*good[:2], (x, y.clone()), good[3]]
    made = functools.partial(make, nesterov, data=data, clip_norm=0.3)
    ours, theirs, plan, reference, _ = pair(made, cache, monkeypatch)
    plan.run(4), reference.run(4)
    data[2][1][0] = 17
    reference.run(2)
    with pytest.raises(Exception, match=r"(?i)out of bounds") as caught:
        plan.run(4)
    assert caught.value.__notes__ == ["(in step 7 of problem 'net')"]
    assert plan.num_steps == 6
    assert_same_state(state_of(ours), state_of(theirs), 1e-11)


def test_ctrl_c_ends_the_loop_after_a_whole_step(cache, monkeypatch):
    made = functools.partial(make, nesterov, data=batches(1), clip_norm=0.3)
    ours, theirs = made(), made()
    plan, reference = (compiled(p, "inductor", monkeypatch, cache_dir=cache) for p in (ours, theirs))
    plan.run(50)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            plan.run(10**9)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert 50 < plan.num_steps < 10**6
    reference.run(plan.num_steps)  # the same machine code without an interruption: the same bits
    assert_same_state(state_of(ours), state_of(theirs), 0)
    plan.run(3), reference.run(3)
    assert_same_state(state_of(ours), state_of(theirs), 0)


@pytest.mark.parametrize("count", extras([1, 3], lambda n: n == 1), ids=["one-batch", "batches"])
def test_recorded_steps_are_the_same_steps(count, cache, monkeypatch):
    """In place, as a CUDA graph has them: same bits, same metrics of every step, and the batches stay as they are."""
    made = functools.partial(make, nesterov, data=batches(count), clip_norm=0.3)
    ours, theirs = made(), made()
    plan, reference = (compiled(p, "inductor", monkeypatch, cache_dir=cache) for p in (ours, theirs))
    data = [(x.clone(), y.clone()) for x, y in ours.data]
    recorder = Recorder()
    for n in (2, 30, 5, 7):
        results, expected = [], []
        with monkeypatch.context() as patch:
            patch.setattr(ops, "recorder_for", lambda device: recorder)
            plan.run(n, on_results=lambda r, c, kept=results: kept.append(r["net"]))
        reference.run(n, on_results=lambda r, c, kept=expected: kept.append(r["net"]))
        assert_same_state(results, expected, 0)
        assert_same_state(state_of(ours), state_of(theirs), 0)
    assert recorder.num_recorded == 3  # two steps are too few
    assert recorder.num_replayed == 29 + 4 + 6
    plan.run(30), reference.run(30)  # on what recorded steps have left
    assert_same_state(state_of(ours), state_of(theirs), 0)
    assert_same_state(ours.data, data, 0)


@pytest.mark.slow
def test_steps_that_are_not_recorded(cache, monkeypatch):
    """A recording would hold the numbers of one step, and the random numbers of one."""
    recorder = Recorder()
    for options, recorded in (
        ({"scheduler": lambda o: lr_scheduler.ExponentialLR(o, 0.9)}, 0),
        ({"net": functools.partial(Net, dropout=0.4)}, 0),
        ({}, 1),
    ):
        plan = compiled(problem(nesterov_of_all, **options), "inductor", monkeypatch, cache_dir=cache)
        recorder.num_recorded = 0
        with monkeypatch.context() as patch:
            patch.setattr(ops, "recorder_for", lambda device: recorder)
            plan.run(9)
        assert recorder.num_recorded == recorded, options
