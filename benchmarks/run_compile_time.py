"""Where does the time of mlopt.compile go, for ResNet-32 with Meta-Weight-Net? And what does a guard cost?

python benchmarks/run_compile_time.py [--threads 2] [--backend eager] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.methods.compiled import Compiled
from benchmarks.problems import PROBLEMS


def main() -> None:
    """Compile once and print the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--profile", action="store_true", help="print the functions that take longest")
    parser.add_argument("--smoke", action="store_true", help="a tiny size: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    instance = PROBLEMS["resnet"].make(torch.float32, args.smoke)
    profile = cProfile.Profile()
    start = time.perf_counter()
    if args.profile:
        profile.enable()
    plan = Compiled(instance, "cg", args.backend).plan
    profile.disable()
    total = time.perf_counter() - start
    report = plan._report
    print(f"compile: {total:.1f} s on {args.threads} threads")
    for stage, seconds in report.seconds.items():
        print(f"  {stage:<24}{seconds:6.1f} s")
    for name, captures in report.graphs.items():
        graphs = captures[0].graphs.modules()
        calls = {k: sum(n.op == "call_function" for n in m.graph.nodes) for k, m in graphs.items()}
        print(f"  {name}: " + ", ".join(f"{k} {count} calls" for k, count in calls.items()))
    guard = plan._executor.derive._derive.__self__.guard  # type: ignore[attr-defined]
    start = time.perf_counter()
    for _ in range(200):
        guard.modes()
    print(f"guard of {len(guard._modules)} modules: {(time.perf_counter() - start) / 200 * 1e6:.0f} us")
    if args.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(40)


if __name__ == "__main__":
    main()
