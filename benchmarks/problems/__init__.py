"""What is solved. Every problem meets every method (`benchmarks.methods`) and measure (`benchmarks.measures`)."""

from benchmarks.problems import cleaning, logistic, mlp, reweighting
from benchmarks.problems.base import BenchmarkProblem, Instance

PROBLEMS = {
    p.name: p
    for p in (
        logistic.PROBLEM,
        mlp.PROBLEM,
        reweighting.CONVNET,
        reweighting.TRANSFORMER,
        reweighting.RESNET,
        cleaning.PROBLEM,
    )
}

__all__ = ["PROBLEMS", "BenchmarkProblem", "Instance"]
