"""The build: one list of sources, one OpenMP runtime, clear words where something is missing."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlopt import ops
from mlopt.ops.reference import glm, matmul, vector

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"


def listed_sources():
    lines = (line.split("#")[0].split() for line in (CSRC / "sources.txt").read_text().splitlines())
    return [(words[0], words[1]) for words in lines if words]


def test_every_source_is_listed_once():
    files = {str(p.relative_to(CSRC)) for suffix in ("cpp", "cu") for p in CSRC.rglob(f"*.{suffix}")}
    ours = {name for name in files if not name.startswith("tests/")}
    listed = [name for _, name in listed_sources()]
    assert sorted(listed) == sorted(ours)
    assert {part for part, _ in listed_sources()} == {"kernels", "cuda", "binding"}


def test_kernels_see_no_torch():
    for part, name in listed_sources():
        if part != "binding":
            included = re.findall(r'#include [<"]([^>"]+)[>"]', (CSRC / name).read_text())
            assert not [header for header in included if header.startswith(("torch/", "ATen/", "c10/"))], name


def test_every_op_has_a_wrapper_and_a_reference():
    names = re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "ops.cpp").read_text())
    assert {"dot", "glm_hvp", "small_mm"} <= set(names)
    for name in names:
        (reference,) = (family for family in (glm, matmul, vector) if hasattr(family, name))
        assert callable(getattr(ops, name)) and callable(getattr(reference, name)), name


def test_reference_never_imports_the_extension():
    for path in (ROOT / "mlopt" / "ops" / "reference").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom | ast.Import):
                assert "_C" not in ast.unparse(node) and "library" not in ast.unparse(node), path


def setup(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_torch_the_build_says_what_to_do(tmp_path):
    """As under pip's build isolation: no torch, and none may be downloaded."""
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    options = ("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    result = setup(*options, PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "Install torch first, then: pip install --no-build-isolation" in result.stderr
    assert "Traceback" not in result.stderr


def test_cuda_that_is_required_but_missing_stops_the_build(tmp_path):
    options = ("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    result = setup(*options, MLOPT_CUDA="1", PATH=str(tmp_path), CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "MLOPT_CUDA=1 was given but nvcc was not found" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_compiler_stops_the_build(tmp_path):
    options = ("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    result = setup(*options, CXX="no-such-compiler", MLOPT_CUDA="0")
    assert result.returncode != 0
    assert "no C++ compiler (no-such-compiler); install g++ or set CXX" in result.stderr


@pytest.mark.skipif(not ops.available(), reason="the extension is not built")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_one_openmp_runtime_is_loaded():
    """A second one beside torch's would start a second pool of threads on the same cores."""
    code = (
        "import torch; from mlopt import ops; a = torch.ones(3_000_000); ops.dot(a, a)\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
        "print(sorted(p for p in paths if any(n in p for n in ('libgomp', 'libiomp', 'libomp'))))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert len(ast.literal_eval(result.stdout)) == 1, result.stdout
