"""What a process that compiles for a GPU is told of CUDA."""

import pytest

from mlopt.backends.inductor import toolkit


def script(path, text):
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A toolkit, an `nvcc` elsewhere that calls its own, and a loaded driver; a directory for the link."""
    real = tmp_path / "cuda" / "bin" / "nvcc"
    script(real, f'echo "#\\$ TOP={real.parent}/.." >&2')
    script(tmp_path / "bin" / "nvcc", f'exec {real} "$@"')
    maps = tmp_path / "maps"
    maps.write_text(f"7f00-7f01 r-xp 00000000 fe:00 1  /lib/libc.so.6\n7f02-7f03 r--p 00 fe:00 2  {driver(tmp_path)}\n")
    monkeypatch.setattr(toolkit, "_MAPS", maps)
    for name in ("CUDA_HOME", "CUDA_PATH", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    directory = tmp_path / "links"
    directory.mkdir()
    return directory


@pytest.fixture
def missing(machine, tmp_path, monkeypatch):
    """What is missing on that machine, which has Triton and nothing in the usual places."""
    monkeypatch.setattr(toolkit, "_USUAL", (tmp_path / "usual",))
    monkeypatch.setattr(toolkit.importlib.util, "find_spec", lambda name: name)
    return toolkit.missing.__wrapped__


def headers(home):
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime_api.h").touch()


def driver(tmp_path):
    return tmp_path / "nvidia" / "libcuda.so.580.1"


def test_toolkit_behind_a_script_and_a_driver_without_a_stub(machine, tmp_path):
    assert toolkit.variables(machine) == {"CUDA_HOME": str(tmp_path / "cuda"), "LIBRARY_PATH": str(machine)}
    assert (machine / "libcuda.so").readlink() == driver(tmp_path)


def test_what_the_user_has_set_stays(machine, monkeypatch):
    monkeypatch.setenv("CUDA_PATH", "/opt/cuda")
    monkeypatch.setenv("LIBRARY_PATH", "/opt/lib")
    assert toolkit.variables(machine) == {"LIBRARY_PATH": f"{machine}:/opt/lib"}


def test_without_nvcc(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolkit.variables(machine) == {"LIBRARY_PATH": str(machine)}


def test_without_a_driver(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(toolkit, "_MAPS", tmp_path / "none")
    assert toolkit.variables(machine) == {}


@pytest.mark.parametrize("place", ["cuda", "usual"])
def test_headers_of_a_toolkit(place, missing, tmp_path):
    assert missing() == (
        f"no headers of CUDA were found in {tmp_path}/cuda, {tmp_path}/usual; CUDA_HOME says where its toolkit is"
    )
    headers(tmp_path / place)
    assert missing() is None


def test_headers_where_the_user_says(missing, tmp_path, monkeypatch):
    headers(tmp_path / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "own"))
    assert f"in {tmp_path}/own;" in missing()
    headers(tmp_path / "own")
    assert missing() is None


def test_torch_without_triton(missing, tmp_path, monkeypatch):
    headers(tmp_path / "cuda")
    monkeypatch.setattr(toolkit.importlib.util, "find_spec", lambda name: None)
    assert missing() == "triton is not installed"
