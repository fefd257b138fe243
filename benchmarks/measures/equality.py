"""Do all methods compute the same? In float64, before anything is timed."""

from __future__ import annotations

import functools

import torch

from benchmarks.methods import METHODS, UnavailableError
from benchmarks.problems import BenchmarkProblem

ITERATIONS = 2
# Relative to how far the parameters moved. Adam divides by the size of the gradient, so an upper parameter whose
# gradient is rounding noise moves as far as any other: the largest error this leaves is far below a wrong derivative.
TOLERANCE = 1e-6


class Disagreement(Exception):  # noqa: N818 - a result, not a failure of the program
    """A method computes something else than the hand-written reference."""


State = tuple[torch.Tensor, torch.Tensor]


def _run(problem: BenchmarkProblem, case: str, method: str, smoke: bool, device: str) -> tuple[bool, State, State]:
    runner = METHODS[method](problem.make(torch.float64, smoke).to(device), case, problem.name)
    start = runner.state()
    for _ in range(ITERATIONS):
        runner.outer()
    return runner.exact, start, runner.state()


@functools.cache
def _reference(problem: BenchmarkProblem, case: str, smoke: bool, device: str) -> tuple[bool, State, State]:
    return _run(problem, case, "hand-written", smoke, device)


def check_equal(problem: BenchmarkProblem, case: str, method: str, *, smoke: bool, device: str = "cpu") -> float | None:
    """Compare a method's parameters with the reference's after a few outer iterations, in float64.

    Returns:
        The largest difference relative to the way the parameters went, or None where the method is the reference or
        is known to compute something else with this case, or the reference does not have it.

    Raises:
        UnavailableError: The method cannot run here.
        Disagreement: The difference is above the tolerance.
    """
    try:
        _, start, expected = _reference(problem, case, smoke, device)
    except UnavailableError:
        return None
    if method == "hand-written":
        return None
    exact, _, found = _run(problem, case, method, smoke, device)
    if not exact:
        return None
    differences = [float((f - e).norm() / (e - s).norm()) for f, e, s in zip(found, expected, start, strict=True)]
    if not max(differences) <= TOLERANCE:
        raise Disagreement(
            f"{method} on {problem.name}, {case}: lower and upper parameters differ from the hand-written program's by "
            f"{differences[0]:.1e} and {differences[1]:.1e} of the way they went; tolerance {TOLERANCE}"
        )
    return max(differences)
