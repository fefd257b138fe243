"""Native programs of packages of machine code: bit for bit the calls of the same packages from Python."""

import pytest

import mlopt
from mlopt.backends import inductor
from tests.helpers.twins import FIRST, Twins, make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing())),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


def test_programs_are_the_calls_of_their_packages(cache, monkeypatch):
    twins = Twins(lambda: make(sizes=(8, 8, 6)), monkeypatch, "inductor", cache_dir=cache)
    assert twins.step(12) == (8 - FIRST) + (4 - 2)
    sums = Twins(
        lambda: make(estimator=mlopt.Neumann(3, 0.1), sizes=(8, 8, 6)), monkeypatch, "inductor", cache_dir=cache
    )
    assert sums.step(6) == 1


def test_the_faster_of_graph_and_package(cache, monkeypatch):
    """Whatever was chosen, and it may be that a step is no program then."""
    Twins(lambda: make(sizes=(8, 8, 6)), monkeypatch, "auto", cache_dir=cache).step(8)
