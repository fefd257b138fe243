"""Random problem graphs, random exact estimators: against the enumeration of all paths with explicit matrices."""

import random

import pytest
import torch

import mlopt
from benchmarks.problems.ladder import Quadratic, by_paths
from tests.helpers.extras import extras

SIZE = 3
EXACT = [
    mlopt.CG(max_steps=20, rtol=1e-13),
    mlopt.CG(max_steps=40, rtol=1e-13, preconditioner=mlopt.Nystrom(2, 0.5)),
    mlopt.Dense(),
    mlopt.Neumann(num_terms=600, scale=0.15),
    mlopt.CG(max_steps=20, rtol=1e-13, warm_start=True),
]


def random_graph(seed):
    """Problems that read some earlier ones and, some of them, the top problem; the top reads some of all."""
    rng = random.Random(seed)
    names = [f"p{i}" for i in range(rng.randint(1, 6))]
    problems = []
    for i, name in enumerate(names):
        reads = [n for n in names[:i] if rng.random() < 0.5]
        if rng.random() < 0.6 or not reads:
            reads.append("top")
        rng.shuffle(reads)
        problems.append(Quadratic(name, reads, SIZE, seed * 100 + i))
        problems[-1].hypergradient = rng.choice(EXACT)
    reads = [n for n in names if rng.random() < 0.6] or names[-1:]
    problems.append(Quadratic("top", reads, SIZE, seed * 100 + 99))
    return mlopt.Graph(problems)


@pytest.mark.parametrize("seed", extras(range(40), lambda seed: seed >= 15))
def test_hypergradient_of_a_random_graph(seed):
    graph = random_graph(seed)
    plan = mlopt.compile(graph, progress=False, strict=True)
    expected = by_paths(graph)
    for _ in range(2):  # once from scratch, once from a warm start
        torch.testing.assert_close(plan.hypergradient("top")["w"], expected, rtol=1e-8, atol=1e-9)
        plan.step()  # learning rates are zero: nothing moves but the counters
