"""A small architecture search by gradients, after DARTS (Liu, Simonyan and Yang 2019, arXiv 1806.09055).

A network of three layers; on each edge into a layer a softmax over five operations is learned. The lower problem trains
the weights of all operations on one half of the data, the upper problem the mixture on the other half. The operations
that win are kept, and the network that they make is trained anew, and compared with ones drawn at random and with the
one that a human would write down: the largest operation everywhere.

    python examples/darts.py [--seeds 3]

The estimators are DARTS's own (a finite difference along the first-order direction) and conjugate gradients. The data
are scikit-learn's digits, 8 x 8 pixels.
"""

from __future__ import annotations

import time

import common
import digits
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mlopt

WIDTH, LR = 8, 0.1
ALL_CONVOLUTIONS = "conv 3x3 everywhere"
OPERATIONS = ("zero", "skip", "average 3x3", "conv 1x1", "conv 3x3")
# Chosen on the seeds 100 and 101; the defaults run others. Before the convolutions have learned something, what has
# no parameters wins: the mixture waits for a third of the search.
WARMUP, MIXTURE_LR = 1 / 3, 0.05
EDGES = ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))  # from layer, to layer; layer 0 is the stem
ESTIMATORS = {
    # The paper's step along v is the learning rate below.
    "finite difference": mlopt.FiniteDifference(scale=LR),
    "conjugate gradients": mlopt.CG(max_steps=3, rtol=1e-2, damping=1.0, curvature="ggn"),
}


def normalization() -> nn.Module:
    """Return what makes the outputs of all operations equally large, so that the mixture alone weighs them."""
    return nn.BatchNorm2d(WIDTH, affine=False, track_running_stats=False)


def operation(name: str) -> nn.Module:
    """Return one operation; all keep the size of the image."""
    if name == "skip":
        return nn.Identity()
    if name == "average 3x3":
        return nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), normalization())
    size = 3 if name == "conv 3x3" else 1
    conv = nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, normalization())


class Network(nn.Module):
    """The network with the operations that `kept` names for every edge; default: all of them.

    Args:
        kept: One tuple of names per edge.
    """

    def __init__(self, kept: tuple[tuple[str, ...], ...] = (OPERATIONS,) * len(EDGES)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), normalization())
        self.edges = nn.ModuleList(
            nn.ModuleDict({name.replace(" ", "_"): operation(name) for name in names if name != "zero"})
            for names in kept
        )
        self.kept = kept
        self.head = nn.Linear(WIDTH, digits.NUM_CLASSES)

    def forward(self, x: torch.Tensor, mixture: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [n, 10] of images [n, 64]; `mixture` [edges, operations] weighs the operations."""
        layers = [self.stem(x.reshape(-1, 1, 8, 8))]
        for target in range(1, 4):
            total = torch.zeros_like(layers[0])
            for k, (source, end) in enumerate(EDGES):
                if end != target:
                    continue
                for name, module in self.edges[k].items():
                    value = module(layers[source])
                    weight = None if mixture is None else mixture[k, OPERATIONS.index(name.replace("_", " "))]
                    total = total + (value if weight is None else weight * value)
            layers.append(total)
        return self.head(layers[-1].mean((2, 3)))


class Mixture(nn.Module):
    """One softmax over the operations per edge."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(1e-3 * torch.randn(len(EDGES), len(OPERATIONS)))

    def forward(self) -> torch.Tensor:
        """Return probabilities [edges, operations]."""
        return self.logits.softmax(1)


class Weights(mlopt.Problem):
    """Lower problem: the weights of all operations."""

    def training_step(self, batch):
        """Return cross-entropy under the present mixture."""
        x, y = batch
        return F.cross_entropy(self.module(x, self.architecture()), y)


class Architecture(mlopt.Problem):
    """Upper problem: the mixture."""

    def training_step(self, batch):
        """Return cross-entropy on the other half of the data."""
        x, y = batch
        return F.cross_entropy(self.weights.module(x, self.module()), y)


def search(data: list[common.Data], seed: int, estimator: mlopt.AbstractEstimator, args) -> torch.Tensor:
    """Return the learned mixture [edges, operations]."""
    torch.manual_seed(seed)
    network, mixture = Network(), Mixture()
    weights = Weights(
        "weights",
        module=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9, weight_decay=1e-3),
        data=digits.Batches(data[0], 64, seed),
        hypergradient=estimator,
        unroll_steps=1,
        warmup_steps=int(WARMUP * args.steps),
    )
    architecture = Architecture(
        "architecture",
        module=mixture,
        optimizer=torch.optim.Adam(mixture.parameters(), lr=MIXTURE_LR, weight_decay=1e-3),
        data=digits.Batches(data[1], 64, seed + 1),
    )
    plan = mlopt.compile(mlopt.Graph([weights, architecture]), backend=args.backend)
    if seed == args.seed:
        print(plan.explain(), end="\n\n")
    mlopt.Engine(plan, steps=args.steps, progress=False).run()
    return mixture().detach()


def derive(mixture: torch.Tensor) -> tuple[tuple[str, ...], ...]:
    """Keep the most probable operation of every edge; zero is none, as in DARTS."""
    return tuple((OPERATIONS[1 + int(row[1:].argmax())],) for row in mixture)


def train(kept: tuple[tuple[str, ...], ...], data: list[common.Data], seed: int, steps: int) -> float:
    """Train a network anew on both halves; return its test accuracy in percent."""
    torch.manual_seed(seed)
    network = Network(kept)
    both = tuple(torch.cat(parts) for parts in zip(data[0], data[1], strict=True))
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9, weight_decay=1e-3)
    loader, step = digits.Batches(both, 64, seed), 0
    while step < steps:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            step += 1
    with torch.no_grad():
        return 100 * (network(data[2][0]).argmax(1) == data[2][1]).float().mean().item()


def main() -> None:
    """Run the example."""
    made = common.parser(__doc__, "darts_out")
    made.add_argument("--steps", type=int, default=300, help="search steps; default %(default)s")
    made.add_argument("--train-steps", type=int, default=400, help="steps of each final training; default %(default)s")
    made.add_argument("--random", type=int, default=5, help="random architectures per seed; default %(default)s")
    args = common.parse(made)
    start = time.perf_counter()
    x, y = load_digits(return_X_y=True)
    scores: dict[str, list[float]] = {"random architecture": [], ALL_CONVOLUTIONS: []}
    found = {}
    for seed in range(args.seed, args.seed + args.seeds):
        data = common.split(torch.tensor(x / 16).float(), torch.tensor(y), [300, 300], seed)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(args.random):
            picks = torch.randint(1, len(OPERATIONS), (len(EDGES),), generator=generator)
            kept = tuple((OPERATIONS[int(pick)],) for pick in picks)
            scores["random architecture"].append(train(kept, data, seed, args.train_steps))
        kept = (("conv 3x3",),) * len(EDGES)
        scores[ALL_CONVOLUTIONS].append(train(kept, data, seed, args.train_steps))
        for name, estimator in ESTIMATORS.items():
            found[name] = search(data, seed, estimator, args)
            scores.setdefault(f"found by {name}", []).append(train(derive(found[name]), data, seed, args.train_steps))
    rows = [(name, common.mean(values)) for name, values in scores.items()]
    title = f"digits, {len(data[2][0])} for the test, {len(EDGES)} edges of {len(OPERATIONS)} operations"
    common.print_table(f"{title}; {args.seeds} seed(s)", ("architecture", "test accuracy, %"), rows)
    figure, panels = plt.subplots(1, len(found), figsize=(11, 4), layout="constrained")
    for axes, (name, mixture) in zip(panels, found.items(), strict=True):
        axes.imshow(mixture, vmin=0, vmax=1, cmap="Blues")
        axes.set(title=f"Mixture by {name}, last seed", xlabel="operation", ylabel="edge")
        axes.set_xticks(range(len(OPERATIONS)), OPERATIONS, rotation=30)
        axes.set_yticks(range(len(EDGES)), [f"{a} to {b}" for a, b in EDGES])
        for k, row in enumerate(mixture.tolist()):
            for j, value in enumerate(row):
                axes.text(j, k, f"{value:.2f}", ha="center", va="center", color="w" if value > 0.5 else "k", fontsize=8)
    figure.savefig(args.out_dir / "darts.png", dpi=130)
    print(f"saved {args.out_dir / 'darts.png'}; took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
