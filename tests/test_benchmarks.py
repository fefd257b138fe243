"""The benchmarks run, at a smoke size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def smoke(name, *options):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_run_vector(tmp_path):
    assert "cg_step" in smoke("run_vector", "--out", str(tmp_path)) and len(list(tmp_path.glob("cpu-*.json"))) == 1


def test_run_glm(tmp_path):
    assert (
        "double backward" in smoke("run_glm", "--out", str(tmp_path))
        and len(list(tmp_path.glob("glm-cpu-*.json"))) == 1
    )


@pytest.mark.slow
def test_run_compile_time():
    assert "guard of " in smoke("run_compile_time")


@pytest.mark.slow
def test_outer_iterations():
    """All methods that are installed agree in float64, and the table is printed."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--smoke",
        "--methods",
        "hand-written",
        "betty",
        "jax",
        "mlopt-eager",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for problem in ("logistic", "mlp", "convnet", "transformer", "resnet", "cleaning"):
        assert f"\n{problem}: " in result.stdout
    assert result.stdout.count("mlopt-eager computes what the hand-written program does") == 12
