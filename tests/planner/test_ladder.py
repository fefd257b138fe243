"""Ladders of problems: the cost is linear in the edges, the result that of path enumeration."""

import pytest
import torch

import mlopt
from benchmarks.problems import ladder
from mlopt.planner import Linearize, MixedProduct, Solve


def counts(depth):
    graph = ladder.make(depth)
    plan = mlopt.compile(graph, progress=False, verify=False)
    instructions = plan.program["top"].instructions
    kinds = [sum(isinstance(i, kind) for i in instructions) for kind in (Linearize, Solve, MixedProduct)]
    return plan, graph, kinds


@pytest.mark.parametrize("depth", [2, 4, 6, 10])
def test_d19_one_solve_per_problem(depth):
    plan, graph, kinds = counts(depth)
    assert kinds == [2 * depth] * 3
    expected = ladder.by_paths(graph)
    torch.testing.assert_close(plan.hypergradient("top")["w"], expected, rtol=1e-9, atol=1e-11)
