"""How far are the glm ops from the bound of the machine, and from torch?

The bound of a product is the larger of two times, both measured in the same run: X read once at the bandwidth of a
copy, and its floating-point operations at the rate of a large matrix product. Results are checked against autograd
before anything is timed. Ratios, not times, are what to quote. (A ratio below 1 means that torch's large product is
not the fastest the machine can do.)

    python benchmarks/run_glm.py [--device cpu|cuda] [--out benchmarks/results] [--smoke]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import timing
from mlopt import ops


class Cleaning:
    """Hyper-cleaning: softmax regression with a weight per sample, ``sum_i s_i CE_i(W) + reg |W|^2 / 2``."""

    def __init__(self, n: int, d: int, c: int, device: str, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.rand(n, d, generator=generator).to(device, dtype)
        self.labels = torch.randint(c, (n,), generator=generator).to(device)
        self.weights = torch.rand(n, generator=generator).to(device, dtype) / n
        self.w = (torch.randn(d, c, generator=generator) / d).to(device, dtype)
        self.v = torch.randn(d, c, generator=generator).to(device, dtype)
        self.reg = torch.tensor(1e-3, dtype=dtype, device=device)
        self.p = (self.x @ self.w).softmax(-1)

    def loss(self, w):
        values = F.cross_entropy(self.x @ w, self.labels, reduction="none")
        return (self.weights * values).sum() + self.reg * w.square().sum() / 2

    def eager_gradient(self, w):
        """The gradient and the graph behind it."""
        w = w.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(w), w, create_graph=True)
        return w, gradient

    def eager_hvp(self, w, gradient, v):
        return torch.autograd.grad(gradient, w, v, retain_graph=True)[0]

    def written_hvp(self, v):
        """The formula of the product in torch calls, for `torch.compile`."""
        u = self.x @ v
        d = self.weights[:, None] * self.p * (u - (self.p * u).sum(1, keepdim=True))
        return self.x.T @ d + self.reg * v

    def hvp(self, v, x=None):
        """The product by the kernel; `x` is X as it is stored, if not as float32."""
        return ops.glm_hvp(
            self.x if x is None else x, v, kind="softmax", curvature=self.p, weights=self.weights, reg=self.reg
        )[0]

    def series(self, num_products: int):
        """As many products, each with what the one before has left of a Neumann series."""
        curvature = {"kind": "softmax", "curvature": self.p, "weights": self.weights, "reg": self.reg}
        return ops.glm_neumann(self.x, self.v, **curvature, scale=1e-3, num_terms=num_products + 1).q

    def eager_program(self, steps: int, solves: int):
        """Gradient descent, then conjugate gradients at its end, by double backward."""
        w = self.w
        for _ in range(steps):
            leaf = w.detach().requires_grad_()
            w = leaf.detach() - 0.1 * torch.autograd.grad(self.loss(leaf), leaf)[0]
        leaf, gradient = self.eager_gradient(w)
        return w, eager_cg(lambda v: self.eager_hvp(leaf, gradient, v) + 1e-2 * v, self.v, solves)

    def program(self, steps: int, solves: int):
        """The same in three calls."""
        loss = {"loss": "softmax", "targets": self.labels, "weights": self.weights}
        w = ops.glm_gd(self.x, self.w, **loss, reg=self.reg, lr=0.1, num_steps=steps).w
        p = ops.glm_gradient(self.x, w, **loss).probabilities
        curvature = {"kind": "softmax", "curvature": p, "weights": self.weights, "reg": self.reg}
        return w, ops.glm_cg(self.x, self.v, **curvature, damping=1e-2, rtol=0.0, max_steps=solves).q


def eager_cg(product, b, steps: int):
    """Textbook conjugate gradients without a look at the residual, as most bilevel code has it."""
    q, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = (r * r).sum()
    for _ in range(steps):
        hp = product(p)
        alpha = rr / (p * hp).sum()
        q, r = q + alpha * p, r - alpha * hp
        rr_new = (r * r).sum()
        p, rr = r + rr_new / rr * p, rr_new
    return q


class Tasks:
    """Few-shot heads: one small softmax regression per task, each with its own solve."""

    def __init__(self, tasks: int, n: int, d: int, c: int, device: str):
        self.parts = [Cleaning(n, d, c, device) for _ in range(tasks)]
        stack = {name: [getattr(part, name) for part in self.parts] for name in ("x", "v", "p", "weights")}
        self.x, self.v, self.p, self.weights = (torch.stack(stack[k]) for k in ("x", "v", "p", "weights"))
        self.reg = self.parts[0].reg

    def eager(self, steps: int):
        results = []
        for part in self.parts:
            leaf, gradient = part.eager_gradient(part.w)
            results.append(
                eager_cg(lambda v, a=part, b=leaf, g=gradient: a.eager_hvp(b, g, v) + 1e-2 * v, part.v, steps)
            )
        return torch.stack(results)

    def native(self, steps: int):
        curvature = {"kind": "softmax", "curvature": self.p, "weights": self.weights, "reg": self.reg}
        return ops.glm_cg(self.x, self.v, **curvature, damping=1e-2, rtol=0.0, max_steps=steps).q


def machine(device: str, smoke: bool) -> tuple[dict[str, object], object]:
    """Functions whose times give the bandwidth of a copy and the rate of a large matrix product."""
    side, length = (256, 1 << 20) if smoke else (4096, 1 << 27) if device == "cuda" else (2048, 1 << 25)
    a, b = torch.rand(side, side, device=device), torch.rand(side, side, device=device)
    source, target = torch.rand(length, device=device), torch.empty(length, device=device)

    def rates(seconds):
        bandwidth, flops = 2 * 4 * length / seconds["copy"], 2 * side**3 / seconds["large product"]
        return {"bytes_per_s": bandwidth, "flops_per_s": flops}

    return {"copy": lambda: target.copy_(source), "large product": lambda: a @ b}, rates


def replayed_products(case: Cleaning, sets: list[torch.Tensor], halves: list[torch.Tensor]) -> dict[str, object]:
    """Record products with several matrices, one after the other, as a CUDA graph, which does not keep them alive.

    So there are no launches from the host, and no X is in the caches from the time before.
    """
    graphs = {}
    for name, xs in {"replayed hvp": sets, "replayed hvp of halves": halves}.items():
        case.hvp(case.v, xs[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in xs:
                case.hvp(case.v, x)
        graphs[name] = graph.replay
    return graphs


def measure_products(n: int, d: int, c: int, device: str, smoke: bool) -> dict[str, object]:
    """Skinny products, gradient and HVP against their bounds and against torch."""
    case, exact = Cleaning(n, d, c, device), Cleaning(n, d, c, device, torch.float64)
    expected = exact.eager_hvp(*exact.eager_gradient(exact.w), exact.v)
    for product in (exact.hvp, exact.written_hvp):
        torch.testing.assert_close(product(exact.v), expected, rtol=1e-9, atol=1e-9)
    x, r, loss = case.x, case.p, {"loss": "softmax", "targets": case.labels, "weights": case.weights}
    leaf, gradient = case.eager_gradient(case.w)
    compiled = torch.compile(case.written_hvp, backend="eager" if smoke else "inductor")
    functions, rates = machine(device, smoke)
    functions |= {
        "matmul": lambda: ops.glm_matmul(x, case.w),
        "matmul, torch": lambda: x @ case.w,
        "matmul_t": lambda: ops.glm_matmul_t(x, r),
        "matmul_t, torch X.T @ R": lambda: x.T @ r,
        "matmul_t, torch (R.T @ X).T": lambda: (r.T @ x).T,
        "gradient": lambda: ops.glm_gradient(x, case.w, **loss),
        "gradient, eager backward": lambda: torch.autograd.grad(case.loss(leaf), leaf),
        "hvp": lambda: case.hvp(case.v),
        "hvp, eager double backward": lambda: case.eager_hvp(leaf, gradient, case.v),
        "hvp, its formula by torch.compile": lambda: compiled(case.v),
    }
    copies = 8
    if device == "cuda":  # on CPUs X is widened first
        halves = x.to(torch.bfloat16)
        functions["hvp of halves"] = lambda: case.hvp(case.v, halves)
        sets = [x.clone() for _ in range(copies)]
        sets_of_halves = [halves.clone() for _ in range(copies)]
        functions |= replayed_products(case, sets, sets_of_halves)
    in_a_solve = 50 if device == "cuda" else 8
    functions["hvp in a solve"] = lambda: case.series(in_a_solve)
    times = timing.interleaved(functions, device, repeats=3 if smoke else 15)
    several = {"hvp in a solve": in_a_solve, "replayed hvp": copies, "replayed hvp of halves": copies}
    seconds = {k: t["median_s"] / several.get(k, 1) for k, t in times.items()}
    found = rates(seconds)
    bytes_time = 4 * n * d / found["bytes_per_s"]
    flops_time = 2 * n * d * c / found["flops_per_s"]
    bound = {"matmul": max(bytes_time, flops_time), "hvp": max(bytes_time, 2 * flops_time)}
    bound |= {"matmul_t": bound["matmul"], "gradient": bound["hvp"], "hvp in a solve": bound["hvp"]}
    if device == "cuda":
        bound["hvp of halves"] = bound["replayed hvp of halves"] = max(bytes_time / 2, 2 * flops_time)
        bound["replayed hvp"] = bound["hvp"]
    return {
        "shape": [n, d, c],
        **found,
        "seconds": seconds,
        "over_bound": {name: seconds[name] / time for name, time in bound.items()},
        "over_bytes": {name: seconds[name] / bytes_time for name in bound},
        "torch_over_ours": {name: seconds[name] / seconds[name.split(",")[0]] for name in seconds if "," in name},
    }


def measure_program(n: int, d: int, c: int, device: str, smoke: bool) -> dict[str, object]:
    """A whole hyper-cleaning iteration, and a batch of small solves."""
    case, tasks = Cleaning(n, d, c, device), Tasks(32, 25, 64, 5, device)
    for a, b in zip(case.program(5, 3), case.eager_program(5, 3), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tasks.native(10), tasks.eager(10), rtol=1e-2, atol=1e-2)
    steps, solves = (3, 2) if smoke else (50, 20)
    functions = {
        "cleaning": lambda: case.program(steps, solves),
        "cleaning, eager": lambda: case.eager_program(steps, solves),
        "tasks": lambda: tasks.native(10),
        "tasks, eager": lambda: tasks.eager(10),
    }
    seconds = {k: t["median_s"] for k, t in timing.interleaved(functions, device, repeats=3 if smoke else 5).items()}
    return {
        "steps": steps,
        "solves": solves,
        "seconds": seconds,
        "torch_over_ours": {name: seconds[name] / seconds[name.split(",")[0]] for name in seconds if "," in name},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="folder for the JSON result")
    parser.add_argument("--smoke", action="store_true", help="one small size, few repeats: does it run?")
    args = parser.parse_args()
    n, d, c = (500, 60, 10) if args.smoke else (20_000, 784, 10)
    result = {**timing.describe(args.device), "build": ops.build_config()}
    print(f"{result['device']}, torch {result['torch']}, {result['threads']} threads; float32, medians")
    products = measure_products(n, d, c, args.device, args.smoke)
    print(f"copy {products['bytes_per_s'] / 1e9:.0f} GB/s, large product {products['flops_per_s'] / 1e9:.0f} GFLOP/s")
    print(f"\nX [{n} x {d}], {c} classes   time/bound   time/bytes         us   torch/ours")
    for name, ratio in products["over_bound"].items():
        others = {k.split(", ", 1)[1]: v for k, v in products["torch_over_ours"].items() if k.split(",")[0] == name}
        text = ", ".join(f"{v:.1f} ({k})" for k, v in others.items())
        bytes_ratio, time = products["over_bytes"][name], products["seconds"][name] * 1e6
        print(f"  {name:<26}{ratio:10.2f}{bytes_ratio:13.2f}{time:11.1f}   {text}")
    program = measure_program(n, d, c, args.device, args.smoke)
    ratios = program["torch_over_ours"]
    per_product = program["seconds"]["cleaning"] / (program["steps"] + program["solves"] + 1)
    print(f"\nhyper-cleaning, {program['steps']} GD steps + {program['solves']} CG steps, eager/ours:", end=" ")
    print(f"{ratios['cleaning, eager']:.1f}; per step, over one hvp: {per_product / products['seconds']['hvp']:.2f}")
    print(f"32 tasks of 25 x 64, 5 classes, 10 CG steps, eager loop/ours: {ratios['tasks, eager']:.1f}")
    if args.out:
        path = args.out / timing.file_name(args.device, "glm")
        timing.write(path, {**result, "products": products, "program": program})
        print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
