"""Examples run, at a small size."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )


def test_imaml(tmp_path):
    small = ["--tasks", 3, "--filters", 4, "--inner-steps", 3]
    result = run(ROOT / "examples" / "imaml.py", *small, "--episodes", 4, "--out-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^ +\d+  [\d.]+ %$", result.stdout, flags=re.MULTILINE)) == 5
    assert (tmp_path / "imaml.png").exists()
    result = run(ROOT / "examples" / "imaml.py", *small, "--check")
    assert result.returncode == 0, result.stderr
    (difference,) = re.findall(r"relative difference ([\d.e+-]+);", result.stdout)
    assert float(difference) < 1e-8
