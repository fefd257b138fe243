"""Checkpoints: what is kept, what is noticed, and that a run goes on with the same bits."""

import json
import logging
import os
import signal
import sys
import threading

import pytest
import torch

import mlopt
from mlopt.engine import files
from mlopt.errors import CheckpointError, CheckpointWarning, StateError
from tests.engine.programs import program


class FatalError(Exception):
    pass


class Counter(mlopt.Callback):
    """Counts logs, which is in the state, and may end the run as a crash does."""

    def __init__(self, crash_at=None):
        self.num_logs = 0
        self.crash_at = crash_at

    def on_log(self, engine, values):
        self.num_logs += 1

    def on_step_end(self, engine, results):
        if engine.step == self.crash_at:
            raise FatalError

    def state_dict(self):
        return {"num_logs": self.num_logs}

    def load_state_dict(self, state):
        self.num_logs = state["num_logs"]


CG = mlopt.CG(max_steps=3, damping=1.0, warm_start=True)


def make_engine(path=None, steps=12, crash_at=None, every=4, keep_last=3, seed=None, best="acc", **options):
    """An engine around a program with everything that a state has to hold, at its beginning.

    With a `seed` the program is in another state, which has to be replaced.
    """
    plan, lower, _ = program(hypergradient=CG, dropout=0.3, batch_norm=True, unroll_steps=2, sizes=(12, 12, 12))
    module = lower.module
    if seed is not None:
        torch.manual_seed(seed)
        torch.nn.init.normal_(module[0].weight)
        plan.run(seed)
    if path is not None:
        options["checkpoints"] = mlopt.Checkpoints(every, keep_last=keep_last, best=best, mode="max", dir=path)
    return mlopt.Engine(
        plan,
        steps,
        validate=lambda: {"acc": module[0].weight.detach().sum()},
        validate_every=3,
        log_every=5,
        callbacks=[Counter(crash_at)],
        progress=False,
        **options,
    )


def bits(engine):
    state = engine.plan.state_dict()
    return (
        {k: v for name in ("classifier", "reweight") for k, v in state["problems"][name]["tensors"].items()},
        state["generators"]["torch"],
        engine.history,
        engine._callbacks[0].num_logs,
    )


def assert_same(one, other):
    assert one[2:] == other[2:]
    assert torch.equal(one[1], other[1])
    assert one[0].keys() == other[0].keys()
    for key, value in one[0].items():
        assert torch.equal(value, other[0][key]), key


def names(path):
    return sorted(p.name for p in path.iterdir())


@pytest.fixture(scope="module")
def unbroken():
    engine = make_engine()
    engine.run()
    return bits(engine)


def test_a_crashed_run_goes_on_with_the_same_bits(tmp_path, unbroken):
    engine = make_engine(tmp_path, crash_at=7)
    with pytest.raises(FatalError):
        engine.run()
    engine = make_engine(tmp_path, seed=5, resume=True)
    assert engine.step in (4, 6) and engine.seconds > 0
    engine.run()
    assert engine.step == 12
    assert_same(bits(engine), unbroken)


def test_state_dict(unbroken):
    engine = make_engine(steps=7)
    engine.run()
    state = engine.state_dict()
    assert state["plan"]["num_steps"] == state["step"] == 7
    engine = make_engine(seed=3)
    engine.load_state_dict(state)
    engine.run()
    one, other = bits(engine), unbroken
    # the first of the two runs has ended at step 7, where it logged and validated
    assert all(torch.equal(v, other[0][k]) for k, v in one[0].items())
    with pytest.raises(StateError, match="has the format None, expected 1"):
        engine.load_state_dict(engine.plan.state_dict() | {"format": None})
    plan, *_ = program()
    with pytest.raises(StateError, match="an engine with 1 callbacks, this one has 0"):
        mlopt.Engine(plan, 1).load_state_dict(state)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    engine = make_engine(tmp_path, steps=9, every=1, keep_last=2, best="value")
    values = {3: 0.5, 6: 0.1, 9: 0.4}
    engine._validate = lambda: {"value": values[engine.step]}
    engine.run()
    assert names(tmp_path) == ["best.json", "step-000000003.ckpt", "step-000000008.ckpt", "step-000000009.ckpt"]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 3,
        "metric": "value",
        "value": 0.5,
        "file": "step-000000003.ckpt",
    }
    engine = make_engine(tmp_path, best="value", resume=tmp_path / "step-000000003.ckpt")
    assert engine.step == 3 and engine.checkpoints.best_value == 0.5
    engine._validate = lambda: {"value": 0.6}
    engine.steps = 6
    engine.run()  # what the other run did after step 3 is gone
    assert names(tmp_path) == ["best.json", "step-000000003.ckpt", "step-000000004.ckpt", "step-000000006.ckpt"]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 6


def test_nothing_is_removed_before_its_successor_is_there(tmp_path, monkeypatch):
    engine = make_engine(tmp_path, steps=4, every=2, keep_last=1, best=None)
    replace = os.replace
    seen = []

    def watched(source, target):
        seen.append(names(tmp_path))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    engine.run()
    assert [[n for n in found if n.startswith("step")] for found in seen] == [[], ["step-000000002.ckpt"]]
    assert names(tmp_path) == ["step-000000004.ckpt"]


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 1
    elif kind == "truncated":
        content = content[: len(content) // 3]
    elif kind == "empty":
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty"])
def test_a_damaged_file_is_noticed_and_the_one_before_it_used(tmp_path, kind, unbroken):
    make_engine(tmp_path).run()
    assert "step-000000008.ckpt" in names(tmp_path)
    damage(tmp_path / "step-000000012.ckpt", kind)
    with pytest.warns(CheckpointWarning, match="step-000000012.ckpt: .*the one before it is tried") as caught:
        engine = make_engine(tmp_path, seed=1, resume=True)
    assert len(caught) == 1 and engine.step < 12
    engine.run()
    assert_same(bits(engine), unbroken)
    with pytest.raises(CheckpointError, match="no checkpoint of mlopt|damaged"):
        damage(tmp_path / "step-000000012.ckpt", kind)
        make_engine(resume=tmp_path / "step-000000012.ckpt")


def test_all_are_damaged(tmp_path):
    make_engine(tmp_path, steps=4, best=None).run()
    damage(tmp_path / "step-000000004.ckpt", "flipped")
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(CheckpointError, match="none of the 1 checkpoints can be used"),
    ):
        make_engine(tmp_path, resume=True)


def test_where_there_is_nothing_to_resume_from(tmp_path):
    engine = make_engine(tmp_path / "new", steps=2, resume=True)
    assert engine.step == 0 and engine.resume() is None
    engine.run()
    assert make_engine(tmp_path / "new", resume=True).step == 2
    with pytest.raises(FileNotFoundError, match="no checkpoint .*absent"):
        make_engine(resume=tmp_path / "absent")
    with pytest.raises(ValueError, match="there is nothing to resume from; give a path"):
        make_engine(resume=True)
    with pytest.raises(ValueError, match=r"Engine.save: the engine has no `checkpoints`"):
        make_engine().save()


def test_files_of_another_run_are_not_overwritten(tmp_path):
    make_engine(tmp_path / "a", steps=2).run()
    engine = make_engine(tmp_path / "a", steps=2)
    with pytest.raises(ValueError, match="holds the files of another run; give resume=True"):
        engine.run()
    assert engine.step == 0
    other = make_engine(tmp_path / "b", steps=4, resume=tmp_path / "a")
    assert other.step == 2
    other.run()
    other.steps = 6
    other.run()  # its own by now
    assert other.step == 6 and names(tmp_path / "a") == ["best.json", "step-000000002.ckpt"]


@pytest.mark.parametrize("options", [{"every": 0}, {"keep_last": True}])
def test_bad_counts(options):
    with pytest.raises(ValueError, match=f"Checkpoints, argument `{next(iter(options))}`: expected an integer >= 1"):
        mlopt.Checkpoints(**options)


def test_bad_arguments():
    with pytest.raises(ValueError, match="argument `mode`: expected 'min' or 'max', got 'best'"):
        mlopt.Checkpoints(mode="best")
    plan, *_ = program()
    with pytest.raises(ValueError, match="argument `checkpoints`: give it a `dir`, or the engine a `run_dir`"):
        mlopt.Engine(plan, 1, checkpoints=mlopt.Checkpoints())


class Sends(mlopt.Callback):
    def __init__(self, number, step, times=1):
        self.number, self.step, self.times = number, step, times

    def on_step_end(self, engine, results):
        if engine.step == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_being_asked_to_end(tmp_path, number, unbroken):
    before = signal.getsignal(number)
    engine = make_engine(tmp_path)
    engine._callbacks += (Sends(number, 7),)
    with pytest.raises(SystemExit if number == signal.SIGTERM else KeyboardInterrupt) as left:
        engine.run()
    if number == signal.SIGTERM:
        assert left.value.code == 143
    assert signal.getsignal(number) is before
    assert engine.step == 7 and "step-000000007.ckpt" in names(tmp_path)
    assert 7 not in [step for step, _ in engine.history["acc"]]  # as little as possible is done on the way out
    engine = make_engine(tmp_path, seed=2)
    engine._callbacks += (mlopt.Callback(),)
    engine.resume()
    engine.run()
    assert_same(bits(engine), unbroken)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    engine = make_engine(tmp_path)
    engine._callbacks += (Sends(signal.SIGINT, 7, times=2),)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert "step-000000007.ckpt" not in names(tmp_path)


def test_handlers_of_others_are_called(tmp_path):
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append((number, engine.step)))
    try:
        engine = make_engine(tmp_path)
        engine._callbacks += (Sends(signal.SIGTERM, 2),)
        with pytest.raises(SystemExit):
            engine.run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [(signal.SIGTERM, 2)]


def test_other_threads_watch_no_signals(tmp_path):
    engine = make_engine(tmp_path, steps=2)
    thread = threading.Thread(target=engine.run)
    thread.start()
    thread.join()
    assert engine.step == 2


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    files.write_text(path, "old")
    with pytest.raises(FatalError), files.replacing(path) as file:
        file.write(b"new")
        raise FatalError
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


def rows(path):
    return [line.split(",")[0] for line in (path / "metrics.csv").read_text().splitlines()[1:]]


def test_run_directory(tmp_path, unbroken):
    pytest.importorskip("matplotlib")
    run = tmp_path / "runs" / "x"

    def engine_in(**options):
        checkpoints = mlopt.Checkpoints(4, best="acc", mode="max")
        return make_engine(run_dir=run, checkpoints=checkpoints, **options)

    with pytest.raises(FatalError):
        engine_in(crash_at=11).run()
    assert names(run) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "metrics.csv",
        "metrics.jsonl",
        "plan.svg",
        "plan.txt",
    ]
    assert rows(run) == ["3", "5", "6", "9", "10"]
    with pytest.raises(ValueError, match="holds the files of another run"):
        engine_in().run()
    engine = engine_in(resume=True, seed=4)
    resumed_at = engine.step
    assert resumed_at < 10
    engine.run()
    assert rows(run) == ["3", "5", "6", "9", "10", "12"]  # none twice
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 6
    assert_same(bits(engine), unbroken)
    config = json.loads((run / "config.json").read_text())
    assert config["engine"]["steps"] == 12 and config["versions"]["torch"] == torch.__version__
    assert config["problems"]["reweight"]["optimizer"]["class"] == "Adam"
    assert "problems" in (run / "plan.txt").read_text() and "<svg" in (run / "plan.svg").read_text()
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert make_engine(resume=run).step == 12  # a run directory stands for its checkpoints


def test_no_curves_without_matplotlib(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING, "mlopt"):
        make_engine(run_dir=tmp_path, steps=6).run()
    assert "curves.png" not in names(tmp_path)
    assert [r.getMessage() for r in caplog.records if "matplotlib" in r.getMessage()] == [
        f"{tmp_path / 'curves.png'} is not drawn: matplotlib is not installed"
    ]


def test_a_picture_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    (tmp_path / "curves.png").mkdir()
    with caplog.at_level(logging.WARNING, "mlopt"):
        engine = make_engine(run_dir=tmp_path, steps=2)
        engine.run()
    assert engine.step == 2 and "curves.png is not drawn" in caplog.text
