"""The training run around a plan."""

import pytest
import torch

import mlopt
from mlopt.errors import NonFiniteError, NonFiniteWarning
from tests.engine.programs import program
from tests.helpers.bilevel import make


def test_run_records_history():
    plan, *_ = program(unroll_steps=2)
    engine = mlopt.Engine(plan, steps=10, log_every=5, progress=False)
    history = engine.run()
    assert [s for s, _ in history["classifier.loss"]] == [5, 10]
    assert set(history) == {"classifier.loss", "reweight.loss", "reweight.acc"}
    assert engine.step == plan.num_steps == 10
    assert engine.run() is history and plan.num_steps == 10  # nothing is left to do


def test_validation_and_callbacks():
    plan, *_ = program()
    seen = []

    class Log(mlopt.Callback):
        def on_start(self, engine):
            seen.append("start")

        def on_step_end(self, engine, results):
            seen.append((engine.step, "classifier" in results))

        def on_end(self, engine):
            seen.append("end")

    values = iter([0.5, 0.7, 0.9])
    engine = mlopt.Engine(
        plan,
        steps=5,
        callbacks=[Log()],
        validate=lambda: {"accuracy": next(values)},
        validate_every=2,
        progress=False,
    )
    assert engine.run()["accuracy"] == [(2, 0.5), (4, 0.7), (5, 0.9)]
    assert seen == ["start", *((i, True) for i in range(1, 6)), "end"]


def test_progress_bar_shows_both_losses(capsys):
    plan, *_ = program()
    mlopt.Engine(plan, steps=20).run()
    bar = capsys.readouterr().err
    assert "train" in bar and "classifier=" in bar and "reweight=" in bar and "20/20" in bar


@pytest.mark.parametrize("argument", ["steps", "validate_every", "log_every"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_bad_counts(argument, value):
    plan, *_ = program()
    with pytest.raises(ValueError, match=f"Engine, argument `{argument}`: expected an integer >= 1"):
        mlopt.Engine(plan, **{"steps": 1, argument: value})


def test_callbacks_and_loggers_of_the_wrong_kind():
    class Log(mlopt.Callback):
        pass

    plan, *_ = program()
    for argument, value, text in (
        (
            "callbacks",
            [Log(), print],
            r"`\[1\]: expected an mlopt.Callback, got builtin_function_or_method; derive a class",
        ),
        ("callbacks", [Log], r"`\[0\]: expected an mlopt.Callback, got the class Log; pass an instance, Log\(...\)"),
        ("callbacks", Log(), "`: expected a list of mlopt.Callback, got Log$"),
        ("loggers", ["csv"], r"`\[0\]: expected an mlopt.AbstractLogger, got str; pass for example mlopt.CSVLogger"),
        ("loggers", mlopt.CSVLogger, "`: expected a list of mlopt.AbstractLogger, got the class CSVLogger$"),
    ):
        with pytest.raises(ValueError, match=f"Engine, argument `{argument}{text}"):
            mlopt.Engine(plan, steps=1, **{argument: value})
    mlopt.Engine(plan, steps=1, callbacks=(c for c in [Log()]), progress=False).run()


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (0.5, "got float;"),
        ([0.5], "got list;"),
        ({"acc": None}, "got {'acc': 'NoneType'};"),
        ({"acc": "high", "pair": torch.ones(2)}, "got {'acc': 'str', 'pair': 'Tensor'};"),
    ],
)
def test_validate_returns_no_numbers(returned, got):
    plan, *_ = program()
    engine = mlopt.Engine(plan, steps=1, validate=lambda: returned, progress=False)
    text = f"Engine, argument `validate`: expected a dict of numbers or None from it, {got} return for example"
    with pytest.raises(ValueError, match=text):
        engine.run()


def test_validate_may_return_nothing_and_must_be_a_function():
    plan, *_ = program()
    for returned in (None, {}, {"acc": 0.5, "note": "text"}):
        mlopt.Engine(plan, steps=1, validate=lambda returned=returned: returned, progress=False).run()
    with pytest.raises(ValueError, match="argument `validate`: expected a function without arguments, got dict; it is"):
        mlopt.Engine(plan, steps=1, validate={"acc": 0.5})


def test_training_improves_the_upper_loss():
    lower, upper = make(sizes=(60,), unroll_steps=2)
    upper.data = lower.data  # random labels can be learned by heart, not predicted
    plan = mlopt.compile(mlopt.Graph([lower, upper]), strict=True, progress=False)
    history = mlopt.Engine(plan, steps=200, log_every=20, progress=False).run()
    losses = torch.tensor([v for _, v in history["reweight.loss"]])
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("policy", [None, "raise", "skip", "roll_back"])
def test_non_finite_losses(policy):
    lower, upper = make(sizes=(12, 12, 12, 12))
    lower.data[2][0].fill_(torch.nan)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), strict=True, progress=False)
    engine = mlopt.Engine(plan, steps=8, log_every=1, non_finite=policy, snapshot_every=2, progress=False)
    if policy in (None, "raise"):
        with pytest.raises(NonFiniteError, match="problem 'classifier'.*step 3"):
            engine.run()
        assert torch.isfinite(lower.module[0].weight).all() == (policy == "raise")
        return
    with pytest.warns(NonFiniteWarning, match="step 3"):
        history = engine.run()
    assert engine.num_left_out == {"classifier": 2}  # the data is read twice
    assert [s for s, _ in history["classifier.loss"]] == [1, 2, 4, 5, 6, 8]
    assert torch.isfinite(lower.module[0].weight).all()
    assert plan._executor.check.guard is None  # the run is over
    with pytest.raises(ValueError, match="argument `non_finite`: expected one of"):
        mlopt.Engine(plan, steps=1, non_finite="warn")
