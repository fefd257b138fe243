"""How much faster than eager double backward are Hessian products and hypergradients, per backend?

The baseline is what one writes by hand: the gradient with ``create_graph=True`` once, then one ``autograd.grad`` per
product, on lists of tensors, and textbook CG. Results are checked against it before anything is timed. Ratios, not
times, are what to quote.

    python benchmarks/run_backends.py [--out benchmarks/results] [--threads 1] [--smoke]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import mlopt
from benchmarks import timing
from tests.helpers import double_backward

STEPS = 20
DAMPING = 10.0  # the networks are untrained: H is indefinite


class Classifier(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        return (self.reweight(losses.detach()[:, None]).squeeze(1) * losses).mean()


class Reweight(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.classifier(x), y)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def convnet(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(2 * channels * 49, 10),
    )


def make(net: nn.Module, batch: int):
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(batch, 784, generator=generator), torch.randint(0, 10, (batch,), generator=generator))
        for _ in range(2)
    ]
    weights = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    lower = Classifier(
        "classifier",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=data[:1],
        hypergradient=mlopt.CG(max_steps=STEPS, rtol=0.0, damping=DAMPING),
    )
    upper = Reweight(
        "reweight", module=weights, optimizer=torch.optim.Adam(weights.parameters(), lr=1e-3), data=data[1:]
    )
    return lower, upper, data


def textbook_cg(matvec, b):
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr = r @ r
    for _ in range(STEPS):
        ap = matvec(p)
        alpha = rr / (p @ ap)
        x.add_(alpha * p)
        r.sub_(alpha * ap)
        rr_new = r @ r
        p = r + (rr_new / rr) * p
        rr = rr_new
    return x


def by_hand(lower: Classifier, upper: Reweight, data):
    """The product function and the hypergradient function of eager double backward."""
    net, weights = lower.module, upper.module
    theta, lam = list(net.parameters()), list(weights.parameters())
    (x, y), (x_upper, y_upper) = data

    def lower_loss():
        losses = F.cross_entropy(net(x), y, reduction="none")
        return (weights(losses.detach()[:, None]).squeeze(1) * losses).mean()

    gradient = torch.autograd.grad(lower_loss(), theta, create_graph=True)

    def product(vectors):
        return torch.autograd.grad(gradient, theta, vectors, retain_graph=True)

    def solve(hvp, v):
        return textbook_cg(lambda p: hvp(p) + DAMPING * p, v)

    def hypergradient():
        return double_backward.hypergradient(
            lower_loss, lambda: F.cross_entropy(net(x_upper), y_upper), theta, lam, solve
        )

    return product, hypergradient, theta


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def measure(name: str, net: nn.Module, batch: int, backends: list[str], cache_dir: Path | None, repeats: int):
    """Check, then time every backend on one network."""
    lower, upper, data = make(net, batch)
    product, hypergradient, theta = by_hand(lower, upper, data)
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(sum(p.numel() for p in theta), generator=generator)
    vectors = double_backward.unflat(v, theta)
    products = {"by hand": lambda: product(vectors)}
    hypergradients = {"by hand": hypergradient}
    expected_product, expected = double_backward.flat(product(vectors)), hypergradient()
    checks, keep = {}, []
    for backend in backends:
        plan = mlopt.compile(mlopt.Graph([lower, upper]), backend=backend, cache_dir=cache_dir)
        executor = plan._executor
        linearization = executor.linearize("classifier")
        checks[backend] = {
            "product": difference(linearization.hvp(v), expected_product),
            "hypergradient": difference(double_backward.flat(plan.hypergradient("reweight").values()), expected),
        }
        assert checks[backend]["product"] < 1e-4, checks
        assert checks[backend]["hypergradient"] < 1e-2, checks  # 20 CG steps in float32 amplify rounding
        products[backend] = lambda linearization=linearization: linearization.hvp(v)
        hypergradients[backend] = lambda plan=plan: plan.hypergradient("reweight")
        keep.append(plan)
    times = {
        "product": timing.interleaved(products, "cpu", repeats=repeats),
        f"CG({STEPS}) hypergradient": timing.interleaved(hypergradients, "cpu", repeats=repeats),
    }
    return {
        "network": name,
        "batch": batch,
        "parameters": v.numel(),
        "differences": checks,
        "times": times,
        "by_hand_over_ours": {
            what: {b: t["by hand"]["median_s"] / t[b]["median_s"] for b in backends} for what, t in times.items()
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the JSON result")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="where compiled graphs are kept")
    parser.add_argument("--smoke", action="store_true", help="a small size on the eager backend: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backends = ["eager"] if args.smoke else ["eager", "inductor"]
    cases = [("MLP", mlp(16), 8)]
    if not args.smoke:
        cases = [
            ("MLP 784-32-32-10", mlp(32), 32),
            ("MLP 784-256-256-10", mlp(256), 128),
            ("convnet 8-16", convnet(8), 32),
            ("convnet 16-32", convnet(16), 64),
        ]
    result = {**timing.describe("cpu"), "build": mlopt.ops.build_config(), "cases": []}
    print(f"{result['device']}, torch {result['torch']}, {result['threads']} threads; float32, by hand / ours")
    for name, net, batch in cases:
        torch.manual_seed(0)
        entry = measure(name, net, batch, backends, args.cache, 3 if args.smoke else 9)
        result["cases"].append(entry)
        print(f"\n{name}, batch {batch}, {entry['parameters']:,} parameters")
        for what, ratios in entry["by_hand_over_ours"].items():
            text = ", ".join(f"{b} {r:.2f}" for b, r in ratios.items())
            by_hand_us = entry["times"][what]["by hand"]["median_s"] * 1e6
            print(f"  {what:<22} {text}   (by hand {by_hand_us:,.0f} us)")
    if args.out:
        path = args.out / "backends-cpu.json"
        timing.write(path, result)
        print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
