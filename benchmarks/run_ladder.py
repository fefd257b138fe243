"""Does the cost of a hypergradient grow with the edges of the problem graph, or with its paths?

    python benchmarks/run_ladder.py [--depths 4 6 8 10] [--figure ladder.svg]

Ladders of width 2: solves, Hessian products and time of one hypergradient of the top problem; where it is feasible, the
same number by path enumeration (Choe et al. 2022, arXiv 2207.02849, section 3).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import mlopt
from benchmarks.problems import ladder
from benchmarks.timing import interleaved
from mlopt.planner import Solve


def measure(depth: int, rounds: int) -> dict[str, float]:
    """Compile one ladder, compare it with path enumeration, count and time."""
    graph = ladder.make(depth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = mlopt.compile(graph, progress=False, verify=False)
    got = plan.hypergradient("top")["w"]
    error = float("nan")
    if depth <= 10:
        expected = ladder.by_paths(graph)
        error = float((got - expected).norm() / expected.norm())
        assert error < 1e-8, error
    run = plan._executor.evaluate("top")
    seconds = interleaved({"ours": lambda: plan.hypergradient("top")}, "cpu", repeats=rounds)["ours"]["median_s"]
    return {
        "edges": graph.nx.number_of_edges(),
        "paths": 2**depth,
        "solves": sum(isinstance(i, Solve) for i in plan.program["top"].instructions),
        "products": sum(int(s.num_steps) for s in run.solutions.values()),
        "milliseconds": 1e3 * seconds,
        "error": error,
    }


def main() -> None:
    """Print one line per depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 6, 8, 10])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--figure", help="write an SVG of time against depth")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("depth  edges  paths  solves  Hessian products  ms per hypergradient  ms per edge  error against paths")
    rows = []
    for depth in args.depths:
        row = measure(depth, args.rounds)
        rows.append((depth, row))
        print(
            f"{depth:5}  {row['edges']:5}  {row['paths']:5}  {row['solves']:6}  {row['products']:16}  "
            f"{row['milliseconds']:20.2f}  {row['milliseconds'] / row['edges']:11.3f}  {row['error']:19.1e}",
            flush=True,
        )
    if args.figure:
        draw(args.figure, rows)


def draw(path: str, rows: list[tuple[int, dict[str, float]]]) -> None:
    """Draw time, products and paths against depth, each relative to the first depth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths = [d for d, _ in rows]
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for key, style in (("milliseconds", "o-"), ("products", "s--"), ("edges", "^:"), ("paths", "x-.")):
        axes.plot(depths, [r[key] / rows[0][1][key] for _, r in rows], style, label=key)
    axes.set(xlabel="depth of the ladder", ylabel=f"relative to depth {depths[0]}", yscale="log", title="width 2")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
