"""Runs the C++ tests of csrc/tests: compiled with the C++ compiler alone, as a machine without cmake would.

`make ctest` builds the same programs through CMake; `make asan` and `make tsan` do so under sanitizers.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# Extras all: what the kernels compute is tested through the ops, too.
pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler ({COMPILER})"),
    pytest.mark.slow,
]


def build(folder, name, flags=()):
    """Compile one test program together with the torch-free kernels."""
    lines = (CSRC / "sources.txt").read_text().splitlines()
    kernels = [CSRC / words[1] for words in map(str.split, lines) if words and words[0] == "kernels"]
    program = folder / name
    command = [COMPILER, *FLAGS, *flags, *kernels, CSRC / "tests" / f"{name}.cpp", "-o", program, "-pthread"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return program


def run(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("name", ["test_vector", "test_vector_cuda", "test_glm", "test_glm_cuda", "test_matmul"])
@pytest.mark.parametrize("flags", [pytest.param((), id="plain"), pytest.param(SANITIZE, id="asan")])
def test_kernels(tmp_path, name, flags):
    """CPU kernels against plain loops; CUDA kernels, emulated on the host (for long), against the CPU kernels."""
    if flags and cannot_link(tmp_path, flags):
        pytest.skip("the compiler has no sanitizer runtimes")
    result = run(build(tmp_path, name, flags))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip().endswith("ok")


def cannot_link(folder, flags):
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [COMPILER, *flags, source, "-o", folder / "empty"]
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_the_emulation_finds_wrong_barriers(tmp_path):
    program = build(tmp_path, "test_emulation")
    assert run(program, "right").returncode == 0
    different, ends = run(program, "different"), run(program, "ends")
    assert different.returncode != 0 and "threads of one block wait at different barriers" in different.stderr
    assert ends.returncode != 0 and "some threads ended while others wait at a barrier" in ends.stderr
