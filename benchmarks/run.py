"""Time of an outer iteration: every method on every problem, results checked equal first.

    python -m benchmarks.run [--device cpu|cuda] [--problems logistic mlp] [--methods mlopt betty jax] [--threads 1]
                             [--memory] [--out DIR]

An outer iteration is all lower steps between two upper steps, and the upper step with its hypergradient. Methods take
turns, so a machine that drifts is unfair to none. Ratios are what to quote. Peers are optional:
``pip install -e ".[bench]"`` for JAX, ``pip install --no-deps betty-ml==0.1.1`` for Betty.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.measures import Disagreement, check_equal, peak_memory
from benchmarks.methods import CASES, DEFAULT_METHODS, METHODS, UnavailableError
from benchmarks.problems import PROBLEMS, BenchmarkProblem


def main() -> int:
    """Run and print; the exit status tells whether all results agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=DEFAULT_METHODS)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: what the problem has a target for")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, each method by itself")
    parser.add_argument(
        "--unchecked", action="store_true", help="do not compare results; what compiles does so once less"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of outer-cpu.json or outer-gpu-NAME.json; results replace their older ones there",
    )
    args = parser.parse_args()
    if args.memory and args.device != "cpu":
        parser.error("--memory measures the memory of the host: only with --device cpu")
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    agreed = True
    for name in args.problems:
        problem = PROBLEMS[name]
        print(f"\n{name}: {problem.title}")
        for method in [] if args.unchecked else args.methods:
            agreed &= _check(problem, method, args)
        for case in args.cases or problem.targets:
            result = _time(problem, case, args)
            if args.out:
                _keep(args.out, f"{name} {case}", result, args.device)
    return 0 if agreed else 1


def _check(problem: BenchmarkProblem, method: str, args: argparse.Namespace) -> bool:
    """Check a method by Neumann series, which all compute alike, and by conjugate gradients."""
    for case in ("neumann", "cg"):
        try:
            difference = check_equal(problem, case, method, smoke=args.smoke, device=args.device)
        except UnavailableError as error:
            print(f"  {method}: {error}")
            return True
        except Disagreement as error:
            print(f"  {error}")
            return False
        if difference is not None:
            print(f"  {method} computes what the hand-written program does by {case}: difference {difference:.1e}")
    return True


def _time(problem: BenchmarkProblem, case: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    runners, prepared = {}, {}
    for method in args.methods:
        start = time.perf_counter()
        try:
            instance = problem.make(torch.float32, args.smoke).to(args.device)
            runners[method] = METHODS[method](instance, case, problem.name)
        except UnavailableError:
            continue
        runners[method].outer()
        timing.wait(args.device)
        prepared[method] = time.perf_counter() - start
    repeats = 2 if args.smoke else args.repeats
    measured = timing.interleaved({m: r.outer for m, r in runners.items()}, args.device, repeats=repeats)
    result = {m: {"seconds": t["median_s"], "prepare_seconds": prepared[m]} for m, t in measured.items()}
    if args.memory:
        for method in result:
            result[method]["peak_mib"] = peak_memory(problem.name, case, method, threads=args.threads, smoke=args.smoke)
    _print(problem, case, result)
    return result


def _keep(folder: Path, key: str, result: dict[str, dict[str, float]], device: str) -> None:
    """Write a result into the file of all; each says what it was measured on."""
    path = folder / ("outer-cpu.json" if device == "cpu" else timing.file_name(device, "outer"))
    known = json.loads(path.read_text()) if path.exists() else {}
    timing.write(path, {**known, key: {**timing.describe(device), "methods": result}})


def _print(problem: BenchmarkProblem, case: str, result: dict[str, dict[str, float]]) -> None:
    ours = result.get("mlopt", {}).get("seconds")
    print(f"  {case:<18}{'outer iteration':>16}{'mlopt is':>14}{'first':>10}{'peak memory':>14}")
    for method, row in result.items():
        ratio = f"{row['seconds'] / ours:.2f} x" if ours else ""
        memory = f"{row['peak_mib']:,.0f} MiB" if "peak_mib" in row else ""
        goal = f"   target {problem.targets[case]} x" if method == "betty" and case in problem.targets else ""
        print(
            f"    {method:<16}{row['seconds'] * 1e3:>13,.3f} ms{ratio:>14}{row['prepare_seconds']:>8.1f} s{memory:>14}"
            f"{goal}"
        )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
