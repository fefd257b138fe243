"""How far are the vector ops from the bandwidth of the machine, and from torch?

The bound of each op is the bytes that must move at the bandwidth of a copy measured in the same run (on CPUs a copy of
the same size, on GPUs one that no cache holds). Results are checked against the reference before anything is timed.
Ratios, not times, are what to quote.

    python benchmarks/run_vector.py [--device cpu|cuda] [--out benchmarks/results] [--smoke]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import timing
from mlopt import ops
from mlopt.ops.reference import vector as reference

REPLAYED = 20  # steps per recording


def case(n: int, device: str):
    """Tensors of a solve that can be stepped any number of times without coming to an end.

    p lies almost along ap and ap is nearly orthogonal to r, so that alpha is tiny and beta is close to 1.
    """
    generator = torch.Generator().manual_seed(0)
    x, r, ap = (torch.randn(n, generator=generator).to(device) for _ in range(3))
    return x, r, r + 1e6 * ap, ap, ops.cg_init(r, torch.zeros((), device=device))


def torch_cg_step(x, r, p, ap, state):
    """The same update in the in-place torch operations a careful user would write."""
    alpha = state[0] / torch.dot(p, ap)
    x.addcmul_(p, alpha)
    r.addcmul_(ap, -alpha)
    rr = torch.dot(r, r)
    p.mul_(rr / state[0]).add_(r)
    state[0] = rr


def allocating_cg_step(x, r, p, ap, state):
    """The same update with a new tensor per operation."""
    alpha = state[0] / (p * ap).sum()
    x_new = x + alpha * p
    r_new = r - alpha * ap
    rr = (r_new * r_new).sum()
    return x_new, r_new, r_new + rr / state[0] * p


def replayed_steps(solve):
    """Steps as a solve's loop makes them on a GPU, where they are recorded: without launches from the host."""
    ops.cg_step_(*solve)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPLAYED):
            ops.cg_step_(*solve)
    return graph.replay


def measure(n: int, device: str, *, smoke: bool) -> dict[str, object]:
    """Check, then time every op at one size."""
    repeats = 3 if smoke else 15
    with torch.no_grad():
        got, expected = case(n, device), case(n, device)
        ops.cg_step_(*got)
        reference.cg_step_(*expected)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        x, r, p, ap, _ = case(n, device)
        step, out = torch.ones((), device=device), torch.empty(n, device=device)
        compiled_cg_step = torch.compile(torch_cg_step, backend="eager" if smoke else "inductor")
        solve = case(n, device)

        vectors = {  # vector passes over memory that each op needs at least
            "cg_step": 10,
            "neumann_step": 5,
            "dot": 2,
            "perturb": 3,
        } | ({"replayed cg_step": 10} if device == "cuda" else {})
        functions = {
            "copy": lambda: out.copy_(x),
            "cg_step": lambda: ops.cg_step_(*solve),
            "cg_step, torch in place": lambda: torch_cg_step(*solve),
            "cg_step, torch allocating": lambda: allocating_cg_step(*solve),
            "cg_step, torch.compile": lambda: compiled_cg_step(*solve),
            "neumann_step": lambda: ops.neumann_step_(x, r, ap, 1e-9),
            "neumann_step, torch in place": lambda: (x.sub_(ap, alpha=1e-9), r.add_(x)),
            "dot": lambda: ops.dot(p, ap),
            "dot, torch": lambda: torch.dot(p, ap),
            "perturb": lambda: ops.perturb(p, ap, step),
            "perturb, torch": lambda: torch.addcmul(p, ap, step),
        }
        if device == "cuda":
            source, target = (torch.ones(1 << 27, device=device) for _ in range(2))  # far more than caches hold
            functions["copy"] = lambda: target.copy_(source)
            replayed = case(n, device)  # a graph does not keep its tensors alive
            functions["replayed cg_step"] = replayed_steps(replayed)
        times = timing.interleaved(functions, device, repeats=repeats)
        # A step of a solve that has stopped costs next to nothing; its time would mean nothing.
        for each in [solve, replayed] if device == "cuda" else [solve]:
            assert ops.CgState(each[4]).status == ops.CgState.RUNNING
            assert ops.CgState(each[4]).num_steps >= repeats
    second = {name: t["median_s"] for name, t in times.items()}
    vector_pass = second["copy"] / 2
    if device == "cuda":
        vector_pass *= n / source.numel()
        second["replayed cg_step"] /= REPLAYED
    return {
        "n": n,
        "times": times,
        "seconds": second,
        "over_bound": {name: second[name] / (passes * vector_pass) for name, passes in vectors.items()},
        "torch_over_ours": {name: second[name] / second[name.split(",")[0]] for name in second if "," in name},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the JSON result")
    parser.add_argument("--smoke", action="store_true", help="one small size, few repeats: does it run?")
    args = parser.parse_args()
    sizes = [10_000] if args.smoke else [10_000, 1_000_000, 10_000_000]
    result = {**timing.describe(args.device), "build": ops.build_config(), "sizes": []}
    print(f"{result['device']}, torch {result['torch']}, {result['threads']} threads; float32, medians")
    for n in sizes:
        entry = measure(n, args.device, smoke=args.smoke)
        result["sizes"].append(entry)
        print(f"\n{n:,} elements     time/bound         us   torch/ours")
        for name, ratio in entry["over_bound"].items():
            others = {k.split(", ")[1]: v for k, v in entry["torch_over_ours"].items() if k.split(",")[0] == name}
            text = ", ".join(f"{v:.1f} ({k})" for k, v in others.items())
            print(f"  {name:<18}  {ratio:6.2f} {entry['seconds'][name] * 1e6:10.2f}   {text}")
    if args.out:
        path = args.out / timing.file_name(args.device)
        timing.write(path, result)
        print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
