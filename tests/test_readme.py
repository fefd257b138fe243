"""The README's program runs as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_program(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "mlopt plan: 2 problems, 2 edges" in result.stdout
    assert (tmp_path / "plan.svg").exists()


def test_demo(tmp_path):
    """The demo, shortened: table, figure, picture, and reweighting ahead of plain training."""
    command = [sys.executable, str(ROOT / "examples" / "reweighting.py"), "--steps", "1000", "--out-dir", str(tmp_path)]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    numbers = {
        name: float(value)
        for name, value in re.findall(r"^(plain|mlopt|oracle).*?  ([\d.]+) %$", result.stdout, flags=re.MULTILINE)
    }
    assert numbers["plain"] + 3 < numbers["mlopt"] <= 100, result.stdout
    assert "classifier=" in result.stderr and "reweight=" in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"reweighting.png", "plan.svg"}
