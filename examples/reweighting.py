"""Data reweighting on digits with corrupted labels, after Meta-Weight-Net (Shu et al., arXiv 1902.07379).

Two problems. The lower one trains a classifier on noisy labels, each sample weighted by a small network that
sees the sample's loss. The upper one trains that network so that the classifier does well on a small clean
meta set. Compare with plain training on the noisy labels, and with an oracle that trains on the clean part.

    python examples/reweighting.py [--seeds 5] [--estimator cg|neumann|finite-difference] [--out-dir demo_out]

Every method has the same network, initial parameters, optimizer, batch size and number of steps. As plain
training overfits the noise, the table also shows what simple remedies make of it: stopping early, a weight
decay chosen for it, training on the meta set alone.
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


# Chosen on the seeds 100 to 119; the defaults below run others.
BATCH_SIZE, LR, MOMENTUM, WEIGHT_DECAY, META_LR = 200, 0.05, 0.9, 1e-3, 1e-2
# The weight decay that suits plain training best, on the same seeds; reweighting does best with the other.
PLAIN_WEIGHT_DECAY = 1e-2
# Until the classifier has learned something, a sample's loss says nothing about its label, and the weights
# may settle on preferring large losses. So the upper problem waits.
WARMUP = 100
VALIDATE_EVERY = 50

# Far from its optimum the classifier's Hessian is indefinite: a large damping keeps the solve well posed.
ESTIMATORS = {
    "cg": mlopt.CG(max_steps=10, rtol=1e-3, damping=1.0, warm_start=True),
    "neumann": mlopt.Neumann(num_terms=10, scale=0.1),
    "finite-difference": mlopt.FiniteDifference(),
}


def make_program(data: digits.Digits, seed: int, estimator: mlopt.AbstractEstimator) -> mlopt.Graph:
    """Return the bilevel program."""
    net = make_classifier(seed)
    mwn = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())
    classifier = Classifier(
        "classifier",
        module=net,
        optimizer=make_optimizer(net),
        data=digits.Batches(data.train, BATCH_SIZE, seed),
        hypergradient=estimator,
        unroll_steps=5,
        warmup_steps=WARMUP,
    )
    reweight = Reweight(
        "reweight",
        module=mwn,
        optimizer=torch.optim.Adam(mwn.parameters(), lr=META_LR),
        data=digits.Batches(data.meta, BATCH_SIZE, seed + 1),
    )
    return mlopt.Graph([classifier, reweight])


def make_classifier(seed: int) -> nn.Module:
    """Return a perceptron with one hidden layer; every method starts from the same one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(digits.NUM_PIXELS, 128), nn.ReLU(), nn.Linear(128, digits.NUM_CLASSES))


def make_optimizer(module: nn.Module, weight_decay: float = WEIGHT_DECAY) -> torch.optim.Optimizer:
    """Return the classifier's optimizer, the same for every method."""
    return torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=weight_decay)


def accuracy(module: nn.Module, data: digits.Data) -> float:
    """Return the share of right predictions."""
    with torch.no_grad():
        return (module(data[0]).argmax(1) == data[1]).float().mean().item()


@dataclasses.dataclass
class Curve:
    """A classifier's accuracies during training, every `VALIDATE_EVERY` steps and after the last one."""

    steps: list[int] = dataclasses.field(default_factory=list)
    test: list[float] = dataclasses.field(default_factory=list)
    meta: list[float] = dataclasses.field(default_factory=list)

    @property
    def final(self) -> float:
        """Test accuracy after the last step."""
        return self.test[-1]

    @property
    def stopped_early(self) -> float:
        """Test accuracy at the step that does best on the meta set."""
        return self.test[self.meta.index(max(self.meta))]


def train_plainly(
    data: digits.Digits, train: digits.Data, seed: int, num_steps: int, weight_decay: float = WEIGHT_DECAY
) -> Curve:
    """Train the classifier on `train` in the ordinary way."""
    net = make_classifier(seed)
    optimizer = make_optimizer(net, weight_decay)
    loader = digits.Batches(train, BATCH_SIZE, seed)
    curve, step = Curve(), 0
    while step < num_steps:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            step += 1
            if step % VALIDATE_EVERY == 0 or step == num_steps:
                curve.steps.append(step)
                curve.test.append(accuracy(net, data.test))
                curve.meta.append(accuracy(net, data.meta))
            if step == num_steps:
                break
    return curve


@dataclasses.dataclass
class Result:
    """One seed: the accuracies of every method, and what the weights became.

    Attributes:
        plain: Plain training on the noisy labels.
        plain_decayed: The same with the weight decay that suits it best.
        meta_only: Plain training on the clean meta set alone.
        oracle: Plain training on the clean part of the training set.
        history: What `mlopt.Engine` recorded, with the accuracy of reweighting on the test set.
        weights: Weights of the training samples after the last step [n].
        is_clean: Which training labels are right [n].
    """

    plain: Curve
    plain_decayed: Curve
    meta_only: Curve
    oracle: Curve
    history: dict[str, list[tuple[int, float]]]
    weights: torch.Tensor
    is_clean: torch.Tensor

    @property
    def reweighted(self) -> float:
        """Test accuracy of reweighting after the last step."""
        return self.history["test accuracy"][-1][1]

    @property
    def auroc(self) -> float:
        """Area under the ROC curve of "weight" as a score for "label is clean"."""
        return float(roc_auc_score(self.is_clean, self.weights))


def run(seed: int, args: argparse.Namespace, *, verbose: bool) -> Result:
    """Train with every method on one seed."""
    data = digits.load(seed, noise=args.noise)
    graph = make_program(data, seed, ESTIMATORS[args.estimator])
    plan = mlopt.compile(graph, backend=args.backend)
    if verbose:
        print(plan.explain(), end="\n\n", flush=True)
        plan.draw(args.out_dir / "plan.svg")
    net, mwn = graph.problems["classifier"].module, graph.problems["reweight"].module
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
        weights = mwn(losses[:, None]).squeeze(1)
    return Result(
        plain=train_plainly(data, data.train, seed, args.steps),
        plain_decayed=train_plainly(data, data.train, seed, args.steps, PLAIN_WEIGHT_DECAY),
        meta_only=train_plainly(data, data.meta, seed, args.steps),
        oracle=train_plainly(data, data.clean_train, seed, args.steps),
        history=history,
        weights=weights,
        is_clean=data.is_clean,
    )


def print_table(results: list[Result], args: argparse.Namespace) -> None:
    """Print test accuracies; with several seeds mean, standard deviation and worst seed."""

    def cell(values: list[float]) -> str:
        percent = [100 * v for v in values]
        mean = f"{statistics.mean(percent):.1f} %"
        if len(percent) == 1:
            return mean
        return f"{mean} +- {statistics.stdev(percent):.1f}, worst {min(percent):.1f}"

    rows = [
        ("plain training, noisy labels", [r.plain.final for r in results]),
        ("  the same, at its best moment (*)", [max(r.plain.test) for r in results]),
        ("  the same, stopped early by the meta set", [r.plain.stopped_early for r in results]),
        (f"  the same, weight decay {PLAIN_WEIGHT_DECAY:g}", [r.plain_decayed.final for r in results]),
        ("meta set alone", [r.meta_only.final for r in results]),
        ("mlopt reweighting, noisy labels", [r.reweighted for r in results]),
        ("oracle, clean part only", [r.oracle.final for r in results]),
    ]
    width = max(len(name) for name, _ in rows)
    seeds = "1 seed" if len(results) == 1 else f"{len(results)} seeds"
    print(f"\n{100 * args.noise:.0f} % of the training labels replaced; {args.steps} steps; {seeds}")
    print(f"{'method':<{width}}  test accuracy")
    print(f"{'-' * width}  {'-' * 13}")
    for name, values in rows:
        print(f"{name:<{width}}  {cell(values)}")
    print("(*) picked by the test accuracy itself, which nobody can know")
    aurocs = [r.auroc for r in results]
    spread = "" if len(results) == 1 else f" +- {statistics.stdev(aurocs):.4f}, worst {min(aurocs):.4f}"
    print(f"\nAUROC of weight against label-is-clean: {statistics.mean(aurocs):.4f}{spread}")


def save_figure(result: Result, path: Path) -> None:
    """Save accuracy curves, losses and the histogram of the weights."""
    figure, (accuracies, losses, histogram) = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    for name, (steps, values), color in (
        ("oracle, clean part only", (result.oracle.steps, result.oracle.test), "tab:green"),
        ("mlopt reweighting", zip(*result.history["test accuracy"], strict=True), "tab:blue"),
        ("plain training", (result.plain.steps, result.plain.test), "tab:red"),
    ):
        accuracies.plot(steps, values, label=name, color=color)
    accuracies.set(xlabel="step", ylabel="test accuracy", title="Test accuracy", ylim=(0.5, 1.0))
    for key, name, color in (
        ("classifier.loss", "classifier: weighted, noisy labels", "tab:blue"),
        ("reweight.loss", "reweight: clean meta set", "tab:orange"),
    ):
        steps, values = zip(*result.history[key], strict=True)
        losses.plot(steps, values, label=name, color=color, linewidth=0.9)
    losses.set(xlabel="step", ylabel="loss of the batch", title="Losses of the two problems", yscale="log")
    for axes in (accuracies, losses):
        axes.axvspan(0, WARMUP, color="0.9", label="warm-up of the classifier")
        axes.set_xlim(0, result.plain.steps[-1])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    parts = [result.weights[result.is_clean].numpy(), result.weights[~result.is_clean].numpy()]
    names = [f"right label ({len(parts[0])})", f"corrupted label ({len(parts[1])})"]
    histogram.hist(parts, bins=25, range=(0, 1), label=names, color=["tab:green", "tab:red"], log=True)
    title = f"Weights after training, AUROC {result.auroc:.3f}"
    histogram.set(xlabel="weight of the sample", ylabel="training samples", title=title)
    histogram.legend(fontsize="small", loc="upper center")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run the example."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--seed", type=int, default=0, help="(first) seed; default %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds; prints mean and spread")
    parser.add_argument("--steps", type=int, default=2000, help="classifier steps; default %(default)s")
    parser.add_argument("--noise", type=float, default=0.4, help="share of wrong labels; default %(default)s")
    parser.add_argument("--estimator", choices=list(ESTIMATORS), default="cg", help="default %(default)s")
    parser.add_argument(
        "--backend",
        choices=["auto", "eager", "inductor"],
        default="eager",  # this network trains in less time than compiling it takes the first time
        help="what runs the graphs; default %(default)s",
    )
    parser.add_argument("--out-dir", type=Path, default=Path("demo_out"), help="default %(default)s")
    args = parser.parse_args()
    if args.seeds < 1 or args.steps < 1 or not 0 < args.noise < 1:
        parser.error("--seeds and --steps must be at least 1, --noise between 0 and 1")
    # The matrices are small: more threads would wait for each other more than they compute.
    torch.set_num_threads(1)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    results = []
    for seed in range(args.seed, args.seed + args.seeds):
        results.append(run(seed, args, verbose=not results))
        if args.seeds > 1:
            last = results[-1]
            print(
                f"seed {seed}: plain {100 * last.plain.final:.1f} %, mlopt {100 * last.reweighted:.1f} %, "
                f"oracle {100 * last.oracle.final:.1f} %",
                flush=True,
            )
    save_figure(results[0], args.out_dir / "reweighting.png")
    print_table(results, args)
    print(f"saved {args.out_dir / 'reweighting.png'} and {args.out_dir / 'plan.svg'}")
    print(f"took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
