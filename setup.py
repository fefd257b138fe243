"""Builds the native extension mlopt._C against the torch that is installed.

One shared library: torch-free kernels (compiled by g++, and by nvcc where a CUDA toolkit is found) under a thin
binding. No torch header reaches nvcc, and the CUDA runtime is linked statically, so the CUDA part builds beside a
CPU-only torch and imports without a driver.

Environment: MLOPT_SKIP_EXTENSION=1 installs the Python part only. MLOPT_CUDA=0 leaves CUDA out, MLOPT_CUDA=1 requires
it; by default it is built if nvcc is found. Whether the machine has a GPU plays no part. MAX_JOBS limits parallel
compilation (default 4).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"
# -ffp-contract=off: one rounding per operation on every instruction set, so all of them give the same bits.
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
# Machine code for sm_80 and sm_90; the PTX of the last is compiled by the driver on newer devices.
CUDA_CODE = (("80", "sm_80"), ("90", "sm_90"), ("90", "compute_90"))


def read_sources() -> dict[str, list[Path]]:
    """Read csrc/sources.txt: part -> files."""
    parts: dict[str, list[Path]] = {}
    for line in (CSRC / "sources.txt").read_text().splitlines():
        words = line.split("#")[0].split()
        if words:
            parts.setdefault(words[0], []).append(CSRC / words[1])
    return parts


def find_nvcc() -> str | None:
    """Return the nvcc to use, or None."""
    choice = os.environ.get("MLOPT_CUDA", "auto")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))
    if choice == "0":
        return None
    if nvcc is None and choice == "1":
        sys.exit("mlopt: MLOPT_CUDA=1 was given but nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
    return nvcc


class BuildExtension(build_ext):
    """Compiles all sources in parallel and links them; objects are kept and rebuilt only when an input is newer."""

    def build_extension(self, ext: Extension) -> None:
        """Build mlopt._C."""
        try:
            import torch
        except ImportError:
            sys.exit(
                "mlopt: torch must be there to build the extension. Install torch first, then: pip install "
                "--no-build-isolation .   (or without the extension: MLOPT_SKIP_EXTENSION=1 pip install .)"
            )
        package = Path(torch.__file__).parent
        nvcc = find_nvcc()
        parts = read_sources()
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        objects_dir = Path(self.build_temp).absolute() / f"torch-{torch.__version__}{'-cuda' if nvcc else ''}"
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            sys.exit(f"mlopt: no C++ compiler ({compiler}); install g++ or set CXX")

        binding = [
            # -isystem: no warning of any compiler in headers that are not ours stops the build
            *("-isystem", str(package / "include")),  # has pybind11 too
            *("-isystem", str(package / "include" / "torch" / "csrc" / "api" / "include")),
            *("-isystem", sysconfig.get_path("include")),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            "-fopenmp",  # at::parallel_for is serial without it; torch's own libgomp is the one that gets loaded
        ]
        if nvcc:
            binding.append(f'-DMLOPT_WITH_CUDA="{cuda_version(nvcc)}"')
        commands = []
        for part, files in parts.items():
            for source in files:
                output = objects_dir / source.relative_to(CSRC).with_suffix(f"{source.suffix}.o")
                if part == "cuda":
                    if nvcc is None:
                        continue
                    command = [nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-Werror"]
                    command += ["all-warnings"]
                    for arch, code in CUDA_CODE:
                        command += ["-gencode", f"arch=compute_{arch},code={code}"]
                else:
                    command = [compiler, *CXX_FLAGS, *(binding if part == "binding" else [])]
                commands.append(([*command, "-c", str(source), "-o", str(output)], output))
        stale = []
        for command, output in commands:
            output.parent.mkdir(parents=True, exist_ok=True)
            stamp = output.with_suffix(".cmd")
            command += ["-MMD", "-MF", str(output.with_suffix(".d"))]
            if not (is_fresh(output) and stamp.exists() and stamp.read_text() == " ".join(command)):
                stale.append((command, stamp))
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "4"))) as pool:
            list(pool.map(lambda job: run(*job), stale))

        target.parent.mkdir(parents=True, exist_ok=True)
        link = [compiler, "-shared", "-o", str(target), *(str(output) for _, output in commands)]
        link += [f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}"]
        link += ["-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-lgomp"]
        if nvcc:
            cuda_lib = find_cudart(nvcc)
            link += [str(cuda_lib), "-ldl", "-lrt", "-lpthread"]
        run(link, None)


def is_fresh(output: Path) -> bool:
    """Whether an object is newer than all files it was made of, which the compiler has listed beside it."""
    listing = output.with_suffix(".d")
    if not (output.exists() and listing.exists()):
        return False
    inputs = listing.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(Path(p).exists() and Path(p).stat().st_mtime < output.stat().st_mtime for p in inputs)


def run(command: list[str], stamp: Path | None) -> None:
    """Run one compiler command; print it and stop the build if it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"mlopt: this command failed:\n  {' '.join(command)}\n{result.stdout}{result.stderr}")
    if stamp is not None:
        stamp.write_text(" ".join(command))


def cuda_version(nvcc: str) -> str:
    """Return the toolkit's version, like 13.0."""
    found = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found.group(1) if found else "unknown"


def find_cudart(nvcc: str) -> Path:
    """Return the static CUDA runtime that belongs to nvcc."""
    listing = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"TOP=(\S+)", listing)
    roots = [Path(top.group(1))] if top else []
    roots += [Path(nvcc).resolve().parent.parent, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    for root in roots:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            library = root / folder / "libcudart_static.a"
            if library.exists():
                return library
    sys.exit("mlopt: nvcc was found but libcudart_static.a was not; install the CUDA runtime or set MLOPT_CUDA=0")


skip = os.environ.get("MLOPT_SKIP_EXTENSION") == "1"
inputs = [str(p.relative_to(ROOT)) for p in sorted(CSRC.rglob("*")) if p.is_file()]
extension = Extension("mlopt._C", sources=[], depends=inputs)  # depends: so that source distributions contain them
setup(ext_modules=[] if skip else [extension], cmdclass={"build_ext": BuildExtension})
