"""A run that is killed again and again, also while a checkpoint is written, ends in the bits of an unbroken one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
def test_killed_twenty_times(tmp_path):
    script = Path(__file__).with_name("kill_runner.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), str(KILLS)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^killed (.*)$", result.stdout, re.MULTILINE) == ["-9"] * KILLS, result.stdout + result.stderr
    starts = [int(step) for step in re.findall(r"^resumed (.*)$", result.stdout, re.MULTILINE)]
    assert starts[:-1] == sorted(starts[:-1]) and len(set(starts)) > KILLS // 2 and starts[-1] == 0
    digests = re.findall(r"^(?:digest|unbroken) (\w{64})$", result.stdout, re.MULTILINE)
    assert len(digests) == 2 and digests[0] == digests[1], result.stdout
    assert {path.suffix for path in (tmp_path / "run").iterdir()} == {".ckpt"}  # nothing half written is left
    steps = [
        [line.split(",")[0] + line[line.index(",", line.index(",") + 1) :] for line in path.read_text().splitlines()]
        for path in (tmp_path / "run.csv", tmp_path / "run-unbroken.csv")
    ]
    assert steps[0] == steps[1]  # but for the column of seconds
