"""Examples run, at a small size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("method", ["imaml", "maml"])
def test_few_shot(method, tmp_path):
    small = ["--method", method, "--tasks", 3, "--filters", 4, "--inner-steps", 3]
    result = run(ROOT / "examples" / "imaml.py", *small, "--episodes", 4, "--out-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^\d+ +[\d.]+$", result.stdout, flags=re.MULTILINE)) == 5
    assert (tmp_path / f"{method}.png").exists()
    result = run(ROOT / "examples" / "imaml.py", *small, "--check")
    assert result.returncode == 0, result.stderr
    (difference,) = re.findall(r"relative difference ([\d.e+-]+);", result.stdout)
    assert float(difference) < 1e-8


SMALL = {
    "logistic": ("--steps", 2),
    "cleaning": ("--steps", 2),
    "longtail": ("--steps", 120),
    "pretraining": ("--steps", 110),
    "darts": ("--steps", 32, "--train-steps", 3, "--random", 1),
    "reward": ("--updates", 2),
}


@pytest.mark.parametrize("name", SMALL)
def test_example(name, tmp_path):
    """It runs, prints the plan and a table, and saves its figure; the figures of the README need the whole run."""
    if name == "reward":
        pytest.importorskip("gymnasium")
    result = run(ROOT / "examples" / f"{name}.py", *SMALL[name], "--out-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mlopt plan: " in result.stdout
    *_, table = result.stdout.split("\n\n")
    assert len(re.findall(r"\d+\.\d", result.stdout[result.stdout.index(" seed(s)") :])) >= 3, table
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_every_example_is_described_and_tested():
    names = {p.stem for p in (ROOT / "examples").glob("*.py")} - {"common", "digits"}
    assert names == {*SMALL, "reweighting", "imaml"}  # the first is `make demo`, which tests/test_readme.py runs
    described = (ROOT / "examples" / "README.md").read_text()
    assert all(f"]({name}.py)" in described for name in names)
