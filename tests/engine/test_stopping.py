"""When a run ends: steps, time, validation, the user."""

import math
import time

import pytest

import mlopt
from mlopt.engine import engine as engine_module
from tests.engine.programs import program


def engine_with(values, steps=100, **options):
    plan, *_ = program()
    values = iter(values)
    return mlopt.Engine(
        plan, steps, validate=lambda: {"acc": next(values)}, validate_every=2, progress=False, **options
    )


@pytest.mark.parametrize(
    ("mode", "min_delta", "values", "steps", "best"),
    [
        ("max", 0.0, [1, 3, 2, 3], 8, (3, 4)),
        ("min", 0.0, [3, 1, 2, 1], 8, (1, 4)),
        ("max", 0.5, [1.0, 1.4, 1.5], 6, (1.0, 2)),
        ("max", 0.0, [1.0, math.nan, math.nan], 6, (1.0, 2)),
        ("max", 0.0, [1, 2, 3, 4, 4, 4], 12, (4, 8)),
    ],
)
def test_early_stopping(mode, min_delta, values, steps, best):
    stopping = mlopt.EarlyStopping("acc", mode, patience=2, min_delta=min_delta)
    engine = engine_with(values, early_stopping=stopping, log_every=5)
    history = engine.run()
    assert engine.step == steps and engine.stop_reason == "early stopping"
    assert (stopping.best, stopping.best_step) == best
    assert history["classifier.loss"][-1][0] == steps  # the last steps are recorded
    engine.run()
    assert engine.step == steps  # it is over


def test_the_validation_that_ends_a_run_does_not_count():
    stopping = mlopt.EarlyStopping("acc", patience=1)
    engine = engine_with([1, 2], steps=3, early_stopping=stopping)
    engine.run()
    assert engine.stop_reason == "steps" and stopping.num_waited == 0
    assert [step for step, _ in engine.history["acc"]] == [2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "most"}, "argument `mode`: expected 'min' or 'max', got 'most'"),
        ({"patience": 0}, "argument `patience`: expected an integer >= 1"),
        ({"min_delta": -1}, "argument `min_delta`: expected a number >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mlopt.EarlyStopping("acc", **options)


def test_a_missing_metric_is_named():
    engine = engine_with([1], early_stopping=mlopt.EarlyStopping("val.acc"))
    with pytest.raises(ValueError, match=r"EarlyStopping: `validate` returned no number named 'val.acc' .*: acc\)"):
        engine.run()


def test_arguments_that_are_needed():
    plan, *_ = program()
    with pytest.raises(ValueError, match="expected `steps` or `seconds`, got neither"):
        mlopt.Engine(plan)
    with pytest.raises(ValueError, match="`early_stopping` looks at a number of `validate`, which is not given"):
        mlopt.Engine(plan, steps=1, early_stopping=mlopt.EarlyStopping("acc"))
    for seconds in (0, -1, math.inf, math.nan, "1"):
        with pytest.raises(ValueError, match="argument `seconds`: expected a number > 0"):
            mlopt.Engine(plan, seconds=seconds)


class Clock:
    """Stands still, but for 1 second per step of a plan."""

    def __init__(self, plan, monkeypatch):
        self.now = 100.0
        step = plan._advance

        def advance(count, on_results):
            self.now += count
            return step(count, on_results)

        monkeypatch.setattr(plan, "_advance", advance)

    def monotonic(self):
        return self.now


def test_time_budget_ends_with_the_step_in_which_it_passes(monkeypatch):
    plan, *_ = program()
    monkeypatch.setattr(engine_module, "time", Clock(plan, monkeypatch))
    engine = mlopt.Engine(plan, seconds=6.5, log_every=4, progress=False)
    history = engine.run()
    assert engine.step == 7 and engine.stop_reason == "seconds" and engine.seconds == 7.0
    assert [step for step, _ in history["classifier.loss"]] == [4, 7]
    engine.run()
    assert engine.step == 7
    both = mlopt.Engine(plan, steps=3, seconds=6.5, progress=False)
    both.run()
    assert both.step == 3 and both.stop_reason == "steps"


def test_time_of_a_resumed_run_counts(monkeypatch):
    plan, *_ = program()
    monkeypatch.setattr(engine_module, "time", Clock(plan, monkeypatch))
    engine = mlopt.Engine(plan, steps=4, progress=False)
    engine.run()
    state = engine.state_dict()
    assert state["seconds"] == 4.0
    engine = mlopt.Engine(plan, seconds=6.5, progress=False)
    engine.load_state_dict(state)
    engine.run()
    assert engine.step == 7 and engine.seconds == 7.0


def test_time_budget_is_kept():
    plan, *_ = program()
    began = time.monotonic()
    engine = mlopt.Engine(plan, seconds=0.3, log_every=10**6, progress=False)
    engine.run()
    assert 0.3 <= time.monotonic() - began < 3 and engine.step > 3


def test_callbacks_may_stop_the_run():
    plan, *_ = program()

    class Enough(mlopt.Callback):
        def on_log(self, engine, values):
            if engine.step == 4:
                engine.stop("enough")

    engine = mlopt.Engine(plan, steps=10, log_every=2, callbacks=[Enough()], progress=False)
    engine.run()
    assert (engine.step, engine.stop_reason) == (4, "enough")
    engine.run()
    assert (engine.step, engine.stop_reason) == (10, "steps")
