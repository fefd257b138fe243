"""Where the numbers of a run go."""

import csv
import json
import math
import sys
import types

import pytest
import torch

import mlopt
from mlopt.engine.metrics import RunningMeans, flatten
from tests.engine.programs import program


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Kept(mlopt.AbstractLogger):
    def __init__(self):
        self.calls = []

    def start(self, step, config):
        self.config = config
        self.calls.append(("start", step))

    def log(self, step, seconds, values):
        assert seconds > 0
        self.calls.append((step, dict(values)))

    def close(self):
        self.calls.append("close")


def test_files_hold_the_history(tmp_path):
    plan, *_ = program(unroll_steps=2)
    logger = Kept()
    engine = mlopt.Engine(
        plan,
        steps=6,
        log_every=2,
        validate=lambda: {"acc": {"top1": torch.tensor(0.5), "top5": 1}, "note": "text", "pair": torch.ones(2)},
        validate_every=3,
        loggers=[mlopt.CSVLogger(tmp_path / "a" / "m.csv"), mlopt.JSONLLogger(tmp_path / "m.jsonl"), logger],
        progress=False,
    )
    history = engine.run()
    assert set(history) == {"classifier.loss", "reweight.loss", "reweight.acc", "acc/top1", "acc/top5"}
    read = rows(tmp_path / "a" / "m.csv")
    assert [int(r["step"]) for r in read] == [2, 3, 4, 6]
    for key, entries in history.items():
        assert [(int(r["step"]), float(r[key])) for r in read if r[key]] == entries
        assert [(r["step"], r[key]) for r in lines(tmp_path / "m.jsonl") if key in r] == entries
    assert [c for c in logger.calls if not isinstance(c, tuple)] == ["close"]
    assert logger.calls[0] == ("start", 0)
    assert logger.calls[3][1].keys() == {"classifier.loss", "reweight.loss", "reweight.acc"}
    assert logger.config["problems"]["classifier"]["optimizer"]["groups"][0]["lr"] == 0.1
    assert json.loads(json.dumps(logger.config)) == logger.config
    assert json.loads(json.dumps(logger.config["engine"]))["steps"] == 6


def test_values_are_means_over_the_interval():
    plan, *_ = program(unroll_steps=2)
    losses = []

    class Watch(mlopt.Callback):
        def on_step_end(self, engine, results):
            losses.append(float(results["classifier"]["loss"]))

    seen = []

    class Log(mlopt.Callback):
        def on_log(self, engine, values):
            seen.append((engine.step, values["classifier.loss"]))

    engine = mlopt.Engine(plan, steps=5, log_every=3, callbacks=[Watch(), Log()], progress=False)
    history = engine.run()
    expected = [(3, sum(losses[:3]) / 3), (5, sum(losses[3:]) / 2)]
    assert history["classifier.loss"] == seen == expected
    plan, *_ = program(unroll_steps=2)  # and without a callback that has steps made one by one
    assert set(mlopt.Engine(plan, steps=5, log_every=3, progress=False).run()) == set(history)


def test_running_means():
    means = RunningMeans()
    for i in range(3000):  # more than are kept
        means.add({"a": {"loss": torch.tensor(float(i)), "n": i, "flag": True, "v": torch.ones(2)}})
    saved = means.state_dict()
    means.add({"a": {"loss": torch.tensor(3000.0, dtype=torch.float64)}, "b": {"acc": {"top1": torch.tensor(2)}}})
    assert means.take() == {"a": {"loss": 1500.0, "n": 1499.5}, "b": {"acc/top1": 2.0}}
    assert means.take() == {}
    means.load_state_dict(saved)
    assert means.take() == {"a": {"loss": 1499.5, "n": 1499.5}}


def test_flatten():
    numpy = pytest.importorskip("numpy")
    values = {"a": {"b": {"c": 1}, "d": torch.tensor([2.0])}, "e": numpy.float32(3), "f": None, "g": [1]}
    assert flatten(values) == {"a/b/c": 1.0, "a/d": 2.0, "e": 3.0}


def test_new_columns_and_odd_names(tmp_path):
    logger = mlopt.CSVLogger(tmp_path / "m.csv")
    logger.start(0, {})
    logger.log(1, 0.1, {"a": 1.0})
    logger.log(2, 0.2, {'b, "c"': math.nan})
    logger.close()
    assert [list(r.values())[2:] for r in rows(tmp_path / "m.csv")] == [["1.0", ""], ["", "nan"]]
    assert list(rows(tmp_path / "m.csv")[0]) == ["step", "seconds", "a", 'b, "c"']


@pytest.mark.parametrize("kind", [mlopt.CSVLogger, mlopt.JSONLLogger])
def test_resumed_files_drop_later_entries(tmp_path, kind):
    path = tmp_path / "metrics"
    logger = kind(path)
    logger.start(0, {})
    for step in (1, 2, 10, 12):
        logger.log(step, step / 10, {"loss": step + 0.25})
    logger.close()
    path.write_text(path.read_text()[:-6])  # killed in the middle of a line
    logger = kind(path)
    logger.start(2, {})
    logger.log(3, 0.3, {"loss": 3.0})
    logger.close()
    read = rows(path) if kind is mlopt.CSVLogger else lines(path)
    assert [(int(r["step"]), float(r["loss"])) for r in read] == [(1, 1.25), (2, 2.25), (3, 3.0)]
    logger.start(0, {})  # a new run
    logger.close()
    assert "1.25" not in path.read_text()


def test_json_without_numbers_that_are_none(tmp_path):
    logger = mlopt.JSONLLogger(tmp_path / "m.jsonl")
    logger.start(0, {})
    logger.log(1, 0.0, {"a": math.nan, "b": -math.inf})
    logger.close()
    assert lines(tmp_path / "m.jsonl") == [{"step": 1, "seconds": 0.0, "a": "nan", "b": "-inf"}]


def test_loggers_are_closed_after_an_error():
    plan, *_ = program()
    logger = Kept()

    def validate():
        raise OSError("no disk")

    engine = mlopt.Engine(plan, steps=2, validate=validate, loggers=[logger], progress=False)
    with pytest.raises(OSError, match="no disk"):
        engine.run()
    assert logger.calls[-1] == "close"


def test_tensorboard(tmp_path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            made.append((name, value, step))

        def close(self):
            made.append("close")

    stub = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    logger = mlopt.TensorBoardLogger(tmp_path)
    for first in (0, 7):
        logger.start(first, {})
        logger.log(first + 1, 0.5, {"a": 1.0, "b": 2.0})
        logger.close()
    folder = str(tmp_path)
    assert made[:4] == [(folder, None), ("a", 1.0, 1), ("b", 2.0, 1), "close"]
    assert made[4:] == [(folder, 8), ("a", 1.0, 8), ("b", 2.0, 8), "close"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        mlopt.TensorBoardLogger(tmp_path)


def test_wandb(monkeypatch):
    sent = []
    run = types.SimpleNamespace(
        log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append("finish")
    )
    stub = types.ModuleType("wandb")
    stub.init = lambda **arguments: sent.append(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", stub)
    plan, *_ = program()
    mlopt.Engine(plan, steps=2, log_every=2, loggers=[mlopt.WandbLogger(project="p", name="n")], progress=False).run()
    assert sent[0]["project"] == "p" and sent[0]["config"]["engine"]["steps"] == 2
    step, values = sent[1]
    assert step == 2 and {"classifier.loss", "reweight.loss", "seconds"} <= set(values)
    assert sent[2:] == ["finish"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        mlopt.WandbLogger()
