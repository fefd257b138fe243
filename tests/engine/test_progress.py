"""How far a run is, on a terminal and where nobody looks."""

import io
import sys

import pytest

import mlopt
from mlopt.engine import progress as progress_module
from mlopt.engine.progress import Progress
from tests.engine.programs import program


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_per_tenth_where_nobody_looks(capsys):
    plan, *_ = program()
    mlopt.Engine(plan, steps=40, log_every=1).run()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert [line.split("|")[2].split()[0] for line in lines] == [f"{n}/40" for n in range(4, 41, 4)]
    assert all("classifier=" in line and "step" in line.split(",")[1] for line in lines)
    mlopt.Engine(plan, steps=3, progress=False).run()
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch):
    plan, *_ = program()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    mlopt.Engine(plan, steps=20, validate=lambda: {"acc": 0.5}).run()
    shown = terminal.getvalue()
    assert "\r" in shown and "20/20" in shown and "reweight=" in shown and "acc=0.5" in shown and "/s" in shown


@pytest.mark.parametrize("done", [0, 30])
def test_long_stretches_and_resumed_runs(capsys, done):
    progress = Progress(100, done, None, enabled=True)
    for now in (done + 1, 65, 66, 100):
        progress.update(now, 1.0, {"loss": 0.123456}, last=now == 100)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "65/100" in lines[0] and "100/100" in lines[1] and "loss=0.123" in lines[0]


def test_time_left_of_a_time_budget(capsys, monkeypatch):
    progress = Progress(None, 0, 200.0, enabled=True)
    for step in range(1, 101):
        progress.update(step, 2.0 * step, {}, last=step == 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and "10step" in lines[0] and "time left=03:00" in lines[0]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress_module.Progress(None, 0, 200.0, enabled=True)
    bar.update(5, 80.0, {"loss": 1.0}, last=True)
    bar.close()
    assert "time left=02:00" in terminal.getvalue() and "5step" in terminal.getvalue()


def test_without_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    plan, *_ = program()
    assert mlopt.Engine(plan, steps=2).run()
