"""Ctrl-C at every moment: a step is whole or not at all, and the counters say which."""

import signal
import sys
import threading

import pytest
import torch

import mlopt
from mlopt import ops
from mlopt.runtime.shield import Shield
from tests.helpers.packages import PackageBackend
from tests.helpers.steps import compiled
from tests.helpers.twins import assert_same, make


@pytest.fixture(autouse=True)
def _default_handler():
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def press():
    signal.raise_signal(signal.SIGINT)


class TestShield:
    def test_it_waits_for_the_end_of_what_is_written(self):
        shield, done = Shield(), []
        with pytest.raises(KeyboardInterrupt), shield:
            shield.held = True
            press()
            done.append("written")
            shield.release()
            done.append("never")
        assert done == ["written"]

    def test_it_comes_at_once_otherwise(self):
        shield, done = Shield(), []
        with pytest.raises(KeyboardInterrupt), shield:
            press()
            done.append("never")
        assert done == []

    def test_a_second_one_does_not_wait(self):
        shield, done = Shield(), []
        with pytest.raises(KeyboardInterrupt), shield:
            shield.held = True
            press()
            done.append("written")
            press()
            done.append("never")
        assert done == ["written"]

    def test_the_context_ends_the_waiting(self):
        shield, done = Shield(), []
        with pytest.raises(KeyboardInterrupt):
            with shield:
                shield.held = True
                press()
                done.append("written")
            done.append("never")
        assert done == ["written"]

    def test_handlers_are_put_back(self):
        shield, seen = Shield(), []

        def own(number, frame):
            seen.append(number)

        signal.signal(signal.SIGINT, own)
        with shield:
            press()
            shield.held = True
            press()
            assert seen == [signal.SIGINT]
            shield.release()
        assert seen == [signal.SIGINT] * 2 and signal.getsignal(signal.SIGINT) is own
        with shield:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with shield:
            press()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN

    def test_other_threads_have_their_own(self):
        shield, found = Shield(), []

        def work():
            with shield:
                shield.held = True
                found.append(signal.getsignal(signal.SIGINT))
                shield.release()

        with shield:
            handler = signal.getsignal(signal.SIGINT)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            assert not shield.held and found == [handler]


def program(backend, monkeypatch):
    torch.manual_seed(3)
    estimator = mlopt.CG(max_steps=2, damping=5.0)
    return compiled(make(estimator=estimator, lower={"unroll_steps": 2}), backend(), monkeypatch)


class Presses:
    """Sends the signal at one of the events of the interpreter: calls and returns, of C functions, too."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __call__(self, frame, event, argument):
        self.count += 1
        if self.count == self.at:
            press()


BACKENDS = {
    "packages": pytest.param(
        PackageBackend, marks=pytest.mark.skipif(not ops.available(), reason="the native extension is not built")
    ),
    "eager": mlopt.backends.EagerBackend,
}


@pytest.mark.parametrize("stride", [97, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_at_every_moment_of_a_run(backend, stride, monkeypatch):
    plan = program(backend, monkeypatch)
    plan.run(24)
    start, steps = plan.state_dict(), 4
    count = Presses(at=-1)
    sys.setprofile(count)
    plan.run(steps)
    sys.setprofile(None)
    expected, target = plan.state_dict(), plan.num_steps
    interrupted = 0
    for at in range(1, count.count, stride):
        plan.load_state_dict(start)
        plan._unfinished = None
        sys.setprofile(Presses(at))
        try:
            plan.run(steps)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.setprofile(None)
        assert plan.num_steps <= target
        while plan.num_steps < target:
            plan.run(target - plan.num_steps)
        found = plan.state_dict()
        for each in (found, expected):  # batches of a list may have been looked at
            for problem in each["problems"].values():
                problem["data"] = None
        assert_same(found, expected)
    assert interrupted > 5
