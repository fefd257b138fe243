"""Loading the extension: what is said where it is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlopt import ops

ROOT = Path(__file__).parents[2]


def run(code, **environment):
    cleared = {k: v for k, v in os.environ.items() if not k.startswith("MLOPT_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**cleared, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# An import of mlopt._C that fails as it does where the extension was never built.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "mlopt._C":
            raise ModuleNotFoundError("No module named 'mlopt._C'", name="mlopt._C")
sys.meta_path.insert(0, Missing())
"""


def test_import_without_the_extension_warns_once_and_works():
    code = WITHOUT + (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import mlopt, torch\n"
        "    b = torch.ones(3, dtype=torch.float64)\n"
        "    x = mlopt.linalg.cg(mlopt.linalg.MatrixOperator(2 * torch.eye(3, dtype=torch.float64)), b).value\n"
        "    mlopt.linalg.cg(mlopt.linalg.MatrixOperator(torch.eye(3, dtype=torch.float64)), b)\n"
        "ours = [str(w.message) for w in seen if 'mlopt' in str(w.message)]\n"
        "print(len(ours), 'is not built' in ours[0], 'pip install' in ours[0])\n"
        "print(torch.allclose(x, b / 2), mlopt.build_config()['extension'])\n"
    )
    result = run(code)
    assert result.stdout.split("\n")[:2] == ["1 True True", "True False"], result.stderr


def test_a_required_extension_that_is_missing_is_an_error():
    result = run(WITHOUT + "import mlopt", MLOPT_REQUIRE_EXTENSION="1")
    assert result.returncode != 0
    assert "ImportError: the native extension of mlopt is not built; build it with" in result.stderr


# An extension that does not load, or that was built for another torch. Python sets the name of an ImportError in both
# cases to that of the extension.
DOES_NOT_LOAD = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "mlopt._C":
            raise ImportError("undefined symbol: _ZN2at5dummy", name="mlopt._C")
sys.meta_path.insert(0, Broken())
"""
OTHER_TORCH = """
import sys, types
sys.modules["mlopt._C"] = types.SimpleNamespace(build_config=lambda: {"torch": "1.13.1"})
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (DOES_NOT_LOAD, "does not load (undefined symbol"),
        (OTHER_TORCH, "was built for torch 1.13.1, and this is torch"),
    ],
    ids=["does-not-load", "other-torch"],
)
def test_an_extension_that_does_not_fit_is_reported_and_not_used(code, reason):
    use = "import mlopt, torch; print(mlopt.ops.dot(torch.ones(3), torch.ones(3)).item(), mlopt.ops.available())"
    result = run(code + use)
    assert result.stdout.strip() == "3.0 False", result.stderr
    assert result.stderr.count("UserWarning") == 1 and reason in result.stderr
    result = run(code + use, MLOPT_REQUIRE_EXTENSION="1")
    assert result.returncode != 0 and f"ImportError: the native extension of mlopt {reason}" in result.stderr


@pytest.mark.slow
def test_the_extension_can_be_disabled():
    result = run("import mlopt; print(mlopt.build_config())", MLOPT_DISABLE_EXTENSION="1")
    assert "'extension': False" in result.stdout and result.stderr == ""


def test_import_leaves_cuda_alone():
    result = run("import mlopt, torch; print(torch.cuda.is_initialized())")
    assert result.stdout.strip() == "False", result.stderr


@pytest.mark.skipif(not ops.available(), reason="the extension is not built")
def test_build_config():
    config = ops.build_config()
    assert config["extension"] is True
    assert set(config) == {"extension", "torch", "compiler", "cuda"}
