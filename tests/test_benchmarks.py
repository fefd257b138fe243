"""The benchmarks run, at a smoke size."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_run_vector(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run_vector.py"), "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "cg_step" in result.stdout and len(list(tmp_path.glob("cpu-*.json"))) == 1


def test_run_backends(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run_backends.py"), "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "CG(20) hypergradient" in result.stdout and (tmp_path / "backends-cpu.json").exists()
