"""A distributed run: every rank takes the same decisions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the second rank is forked")
def test_two_ranks(tmp_path):
    script = Path(__file__).with_name("ranks_runner.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert (tmp_path / f"said-{rank}").read_text().splitlines() == [
            "stopped 8 early stopping [(2, 1.0), (4, 2.5), (6, 2.0), (8, 1.5)] 7.0",
            "resumed 6",
            "asked 3 asked",
        ]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best.json",
        *(f"step-{step:09d}.rank-{rank}-of-2.ckpt" for step in (4, 6, 8) for rank in (0, 1)),
    ]
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 5  # of rank 0 only
