"""The commands, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlopt.cli import main

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
import mlopt

class Lower(mlopt.Problem):
    def training_step(self, batch):
        return ((self.module.weight - self.upper.module.weight * batch) ** 2).sum()

class Upper(mlopt.Problem):
    def training_step(self, batch):
        return (self.lower.module.weight ** 2).sum() * batch

def problem(kind, name):
    module = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return kind(name, module=module, optimizer=optimizer, data=[torch.tensor(1.0)], hypergradient=mlopt.CG())

if __name__ == "__main__":
    print("arguments", sys.argv[1:])
    plan = mlopt.compile(mlopt.Graph([problem(Lower, "lower"), problem(Upper, "upper")]))
    plan.run(3)
    print("trained")
"""


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "mlopt", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_explain_stops_before_training(script, tmp_path):
    result = run("explain", "--draw", tmp_path / "plan.svg", script, "--seed", 3)
    assert result.returncode == 0, result.stderr
    assert "arguments ['--seed', '3']" in result.stdout
    assert "mlopt plan: 2 problems, 2 edges; graphs run by the eager backend" in result.stdout
    assert "trained" not in result.stdout
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")


def test_explain_every_plan(script, capsys):
    assert main(["explain", "--all", str(script)]) == 0
    out = capsys.readouterr().out
    assert "one step of upper" in out and "trained" in out


def test_explain_a_script_that_compiles_nothing(tmp_path, capsys):
    path = tmp_path / "nothing.py"
    path.write_text("print(1)")
    assert main(["explain", str(path)]) == 1
    assert "ended without calling mlopt.compile" in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "missing.py")]) == 1
    assert "there is no file" in capsys.readouterr().err


def test_explain_shows_the_error_of_a_script(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text("import mlopt\nmlopt.compile(mlopt.Graph([]))")
    result = run("explain", path)
    assert result.returncode == 1
    assert "GraphError" in result.stderr or "ValueError" in result.stderr


@pytest.mark.slow
def test_doctor(tmp_path):
    result = run("doctor", MLOPT_CACHE_DIR=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    for subject in ("python", "torch", "native extension", "C++ compiler", "inductor backend", "CUDA", "cache"):
        assert any(line[6:].startswith(subject) for line in lines), subject
    assert lines[-1] == "mlopt can be used on this machine"


def test_doctor_says_what_to_do():
    result = run("doctor", "--quick", CXX="no-such-compiler", MLOPT_DISABLE_EXTENSION="1", MLOPT_REQUIRE_EXTENSION="0")
    assert result.returncode == 0, result.stderr
    assert "no-such-compiler was not found" in result.stdout
    assert "unset MLOPT_DISABLE_EXTENSION" in result.stdout
    assert "inductor backend" not in result.stdout
