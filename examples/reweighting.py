"""Data reweighting on digits with corrupted labels, after Meta-Weight-Net (Shu et al. 2019, arXiv 1902.07379).

Two problems. The lower one trains a classifier on noisy labels, each sample weighted by a small network that sees the
sample's loss. The upper one trains that network so that the classifier does well on a small clean meta set. Compare
with plain training on the noisy labels, and with an oracle that trains on the clean part only.

    python examples/reweighting.py [--seeds 5] [--estimator cg|neumann|finite-difference] [--out-dir demo_out]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import digits
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

import mlopt

BATCH, LR, MOMENTUM, META_LR = 100, 0.05, 0.9, 2e-3
VALIDATE_EVERY = 50
# Until the classifier has learned something, a sample's loss says nothing about its label, and the weights may settle
# on preferring large losses. So the upper problem waits.
WARMUP = 100

ESTIMATORS = {
    "cg": mlopt.CG(max_steps=10, rtol=1e-3, damping=1.0, warm_start=True),
    "neumann": mlopt.Neumann(num_terms=10, scale=0.1),
    "finite-difference": mlopt.FiniteDifference(),
}


class Classifier(mlopt.Problem):
    """Lower problem: cross-entropy on noisy labels, weighted per sample."""

    def training_step(self, batch):
        """Return the weighted loss."""
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        weights = self.reweight(losses.detach()[:, None]).squeeze(1)
        return (weights * losses).mean()


class Reweight(mlopt.Problem):
    """Upper problem: cross-entropy of the classifier on the clean meta set."""

    def training_step(self, batch):
        """Return the loss and the accuracy."""
        x, y = batch
        logits = self.classifier(x)
        return {"loss": F.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).float().mean()}


def make_classifier(seed: int) -> nn.Module:
    """A perceptron with one hidden layer; the same start for every method."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, digits.NUM_CLASSES))


def make_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """The same optimizer for every method."""
    return torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM)


def make_program(data: digits.Digits, seed: int, estimator: mlopt.AbstractEstimator) -> mlopt.Graph:
    """The bilevel program."""
    net = make_classifier(seed)
    weights = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())
    adam = torch.optim.Adam(weights.parameters(), lr=META_LR)
    train_loader = digits.Batches(data.train, BATCH, seed)
    meta_loader = digits.Batches(data.meta, BATCH, seed + 1)
    classifier = Classifier(
        "classifier",
        module=net,
        optimizer=make_optimizer(net),
        data=train_loader,
        hypergradient=estimator,
        unroll_steps=2,
        warmup_steps=WARMUP,
    )
    reweight = Reweight("reweight", module=weights, optimizer=adam, data=meta_loader)
    return mlopt.Graph([classifier, reweight])


def accuracy(module: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share of right predictions."""
    with torch.no_grad():
        return (module(data[0]).argmax(1) == data[1]).float().mean().item()


def train_plain(data: digits.Digits, train: tuple[torch.Tensor, torch.Tensor], seed: int, steps: int) -> list[float]:
    """Ordinary training; returns the test accuracy every `VALIDATE_EVERY` steps."""
    net = make_classifier(seed)
    optimizer = make_optimizer(net)
    batches = digits.Batches(train, BATCH, seed)
    curve, iterator = [], iter(batches)
    for step in range(1, steps + 1):
        batch = next(iterator, None)
        if batch is None:
            iterator = iter(batches)
            batch = next(iterator)
        optimizer.zero_grad()
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
        if step % VALIDATE_EVERY == 0 or step == steps:
            curve.append(accuracy(net, data.test))
    return curve


@dataclasses.dataclass
class Result:
    """Test accuracy curves of the three methods, and what the weights became."""

    plain: list[float]
    oracle: list[float]
    reweighted: list[float]
    history: dict[str, list[tuple[int, float]]]
    weights: torch.Tensor
    is_clean: torch.Tensor

    @property
    def auroc(self) -> float:
        """Area under the ROC curve of "weight" as a score for "label is clean"."""
        return float(roc_auc_score(self.is_clean, self.weights))


def run(seed: int, args: argparse.Namespace, *, verbose: bool) -> Result:
    """Train the three methods on one seed."""
    data = digits.load(seed, noise=args.noise)
    graph = make_program(data, seed, ESTIMATORS[args.estimator])
    plan = mlopt.compile(graph)
    if verbose:
        print(plan.explain(), end="\n\n", flush=True)
        plan.draw(args.out_dir / "plan.svg")
    net = graph.problems["classifier"].module
    engine = mlopt.Engine(
        plan,
        steps=args.steps,
        validate=lambda: {"test accuracy": accuracy(net, data.test)},
        validate_every=VALIDATE_EVERY,
        progress=verbose,
    )
    history = engine.run()
    with torch.no_grad():
        losses = F.cross_entropy(net(data.train[0]), data.train[1], reduction="none")
        weights = graph.problems["reweight"].module(losses[:, None]).squeeze(1)
    clean = (data.train[0][data.is_clean], data.train[1][data.is_clean])
    return Result(
        plain=train_plain(data, data.train, seed, args.steps),
        oracle=train_plain(data, clean, seed, args.steps),
        reweighted=[value for _, value in history["test accuracy"]],
        history=history,
        weights=weights,
        is_clean=data.is_clean,
    )


def print_table(results: list[Result], noise: float) -> None:
    """Print final accuracies; with several seeds, mean and standard deviation."""

    def cell(values: list[float]) -> str:
        mean = f"{100 * statistics.mean(values):.1f} %"
        return mean if len(values) == 1 else f"{mean} +- {100 * statistics.stdev(values):.1f}"

    rows = [
        ("plain training, noisy labels", cell([r.plain[-1] for r in results])),
        ("  the same, at its best moment", cell([max(r.plain) for r in results])),
        ("mlopt reweighting, noisy labels", cell([r.reweighted[-1] for r in results])),
        ("oracle, clean part only", cell([r.oracle[-1] for r in results])),
    ]
    width = max(len(name) for name, _ in rows)
    seeds = "1 seed" if len(results) == 1 else f"{len(results)} seeds"
    print(f"\n{100 * noise:.0f} % of the training labels replaced; {seeds}")
    print(f"{'method':<{width}}  test accuracy")
    print(f"{'-' * width}  {'-' * 13}")
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    print(f"\nAUROC of weight against label-is-clean: {statistics.mean(r.auroc for r in results):.3f}")


def save_figure(result: Result, path: Path) -> None:
    """Save accuracy curves, losses and the histogram of the weights."""
    figure, (accuracies, losses, histogram) = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    steps = [step for step, _ in result.history["test accuracy"]]
    for name, curve, color in (
        ("oracle (clean part)", result.oracle, "tab:green"),
        ("mlopt reweighting", result.reweighted, "tab:blue"),
        ("plain training", result.plain, "tab:red"),
    ):
        accuracies.plot(steps, curve, label=name, color=color)
    accuracies.set(xlabel="step", ylabel="test accuracy", title="Test accuracy", ylim=(0.4, 1.0))
    accuracies.legend(loc="lower left")
    for key, name, color in (
        ("classifier.loss", "classifier: weighted noisy loss", "tab:blue"),
        ("reweight.loss", "reweight: clean meta loss", "tab:orange"),
    ):
        points = result.history[key]
        losses.plot([s for s, _ in points], [v for _, v in points], label=name, color=color, linewidth=0.9)
    losses.set(xlabel="step", ylabel="loss", title="Losses of the two problems", yscale="log")
    losses.legend()
    bins = torch.linspace(0, 1, 31).tolist()
    histogram.hist(result.weights[result.is_clean], bins=bins, alpha=0.6, label="right label", color="tab:green")
    histogram.hist(result.weights[~result.is_clean], bins=bins, alpha=0.6, label="corrupted label", color="tab:red")
    histogram.set(xlabel="weight", ylabel="training samples", title=f"Learned weights (AUROC {result.auroc:.3f})")
    histogram.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds; prints mean and standard deviation")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the classifier")
    parser.add_argument("--noise", type=float, default=0.4, help="share of training labels replaced")
    parser.add_argument("--estimator", choices=list(ESTIMATORS), default="cg")
    parser.add_argument("--out-dir", type=Path, default=Path("demo_out"), help="where pictures are saved")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other more than they compute
    start = time.perf_counter()
    results = []
    for seed in range(args.seed, args.seed + args.seeds):
        results.append(run(seed, args, verbose=seed == args.seed))
    save_figure(results[0], args.out_dir / "reweighting.png")
    print_table(results, args.noise)
    print(f"saved {args.out_dir / 'reweighting.png'} and {args.out_dir / 'plan.svg'}")
    print(f"took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
