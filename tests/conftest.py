"""Shared fixtures."""

import os

import pytest
import torch

# "auto" would compile the graphs of hundreds of small programs; the tests of the compiled backend ask for it by name.
os.environ.setdefault("MLOPT_BACKEND", "eager")

torch.set_num_threads(1)  # the suite runs in parallel processes; results do not depend on it


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(skip)
