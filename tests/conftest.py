"""Shared fixtures."""

import pytest
import torch

torch.set_num_threads(1)  # the suite runs in parallel processes; results do not depend on it


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
