"""One folder of compiled packages for all tests here, also where pytest runs in several processes."""

import os

import pytest


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda-packages"
    folder.mkdir(exist_ok=True)
    return folder
