"""Hyper-cleaning: learn which training labels are wrong (Franceschi et al. 2017, arXiv 1703.01785).

The lower problem fits softmax regression on noisy labels, with one weight per training sample. The upper problem holds
these weights, one number per sample, and has the loss on a small clean validation set. Full batches, gradient descent
below, conjugate gradients for the hypergradient: as both losses read their parameters through ``X @ W``, the products
run by kernels where the native extension is there (``plan.explain()`` says so).

    python examples/cleaning.py [--seeds 3] [--data-dir PATH]

The data are scikit-learn's digits; with ``--data-dir``, Fashion-MNIST from ``fashion_mnist.npz``. A share of the
training labels is replaced by others.
"""

from __future__ import annotations

import time
from pathlib import Path

import common
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn

import mlopt

INNER_STEPS = 20


class Fit(mlopt.Problem):
    """Lower problem: cross-entropy on noisy labels, weighted per sample."""

    def training_step(self, batch):
        """Return mean_i sigmoid(a_i) loss_i + 1e-3 |W|^2 / 2."""
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        return (torch.sigmoid(self.clean.module.raw) * losses).mean() + 5e-4 * self.module.weight.square().sum()


class Clean(mlopt.Problem):
    """Upper problem: cross-entropy on clean labels."""

    def training_step(self, batch):
        """Return the loss."""
        x, y = batch
        return F.cross_entropy(self.fit(x), y)


class SampleWeights(nn.Module):
    """One weight per training sample, between 0 and 1."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(count))


def load(data_dir: Path | None, noise: float, seed: int) -> tuple[list[common.Data], torch.Tensor]:
    """Return noisy training, clean validation and test data, and which training labels are wrong."""
    if data_dir is None:
        x, y = load_digits(return_X_y=True)
        x, y, sizes = torch.tensor(x / 16), torch.tensor(y), [1000, 200]
    else:
        found = common.read(data_dir, "fashion_mnist")
        x, y, sizes = torch.tensor(found["train_x"] / 255).flatten(1), torch.tensor(found["train_y"]), [5000, 1000]
    train, validation, test = common.split(x.float(), y.long(), sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(train[1]), generator=generator) < noise
    others = (train[1] + torch.randint(1, 10, train[1].shape, generator=generator)) % 10
    return [(train[0], torch.where(wrong, others, train[1])), validation, (test[0][:10000], test[1][:10000])], wrong


def make_program(data: list[common.Data]) -> mlopt.Graph:
    """Return the bilevel program."""
    torch.manual_seed(0)
    linear, weights = nn.Linear(data[0][0].shape[1], 10), SampleWeights(len(data[0][0]))
    fit = Fit(
        "fit",
        module=linear,
        optimizer=torch.optim.SGD(linear.parameters(), lr=0.2, momentum=0.9),
        data=[data[0]],
        hypergradient=mlopt.CG(max_steps=20, rtol=1e-3, damping=1e-3),
        unroll_steps=INNER_STEPS,
        warmup_steps=10 * INNER_STEPS,
    )
    optimizer = torch.optim.Adam(weights.parameters(), lr=0.05)
    return mlopt.Graph([fit, Clean("clean", module=weights, optimizer=optimizer, data=[data[1]])])


def accuracy(linear: nn.Module, data: common.Data) -> float:
    """Return the percent of right predictions."""
    with torch.no_grad():
        return 100 * (linear(data[0]).argmax(1) == data[1]).float().mean().item()


def train_plainly(data: common.Data, steps: int) -> nn.Module:
    """Fit the same model without weights."""
    torch.manual_seed(0)
    linear = nn.Linear(data[0].shape[1], 10)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.2, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(linear(data[0]), data[1]) + 5e-4 * linear.weight.square().sum()).backward()
        optimizer.step()
    return linear


def main() -> None:
    """Run the example."""
    made = common.parser(__doc__, "cleaning_out")
    made.add_argument("--data-dir", type=Path, help="folder with fashion_mnist.npz; without it, digits")
    made.add_argument("--noise", type=float, default=0.5, help="share of wrong labels; default %(default)s")
    made.add_argument("--steps", type=int, default=150, help="upper steps; default %(default)s")
    args = common.parse(made)
    start = time.perf_counter()
    names = ("noisy labels", "validation set alone", "mlopt hyper-cleaning", "clean part of the labels")
    scores: dict[str, list[float]] = {name: [] for name in names}
    f1, auroc = [], []
    for seed in range(args.seed, args.seed + args.seeds):
        (train, validation, test), wrong = load(args.data_dir, args.noise, seed)
        graph = make_program([train, validation, test])
        plan = mlopt.compile(graph, backend=args.backend)
        if seed == args.seed:
            print(plan.explain())
        fit, clean = graph.problems["fit"], graph.problems["clean"]
        steps = fit.warmup_steps + args.steps * INNER_STEPS
        engine = mlopt.Engine(
            plan,
            steps=steps,
            validate=lambda fit=fit, test=test: {"test accuracy": accuracy(fit.module, test)},
            validate_every=INNER_STEPS,
            log_every=INNER_STEPS,
            progress=False,
        )
        history = engine.run()
        scores["mlopt hyper-cleaning"].append(accuracy(fit.module, test))
        scores["noisy labels"].append(accuracy(train_plainly(train, steps), test))
        scores["validation set alone"].append(accuracy(train_plainly(validation, steps), test))
        right = (train[0][~wrong], train[1][~wrong])
        scores["clean part of the labels"].append(accuracy(train_plainly(right, steps), test))
        weights = torch.sigmoid(clean.module.raw.detach())
        f1.append(float(f1_score(wrong, weights < 0.5)))
        auroc.append(float(roc_auc_score(~wrong, weights)))
    name = "digits" if args.data_dir is None else "Fashion-MNIST"
    rows = [(name, common.mean(values)) for name, values in scores.items()]
    title = f"{name}: {len(train[0])} samples, {100 * args.noise:.0f} % of the labels wrong; {args.seeds} seed(s)"
    common.print_table(title, ("trained on", "test accuracy, %"), rows)
    print(f"\nwrong labels found (weight < 0.5): F1 {common.mean(f1, 3)}; AUROC of the weights {common.mean(auroc, 3)}")
    save_figure(history, weights, wrong, args.out_dir / "cleaning.png")
    print(f"saved {args.out_dir / 'cleaning.png'}; took {time.perf_counter() - start:.0f} s")


def save_figure(history: dict, weights: torch.Tensor, wrong: torch.Tensor, path: Path) -> None:
    """Save the accuracy and the weights of the last seed."""
    figure, (curve, histogram) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curve.plot(*zip(*history["test accuracy"], strict=True))
    curve.set(xlabel="step of the fit", ylabel="test accuracy, %", title="Hyper-cleaning")
    curve.grid(alpha=0.3)
    parts, labels = [weights[~wrong].numpy(), weights[wrong].numpy()], ["right label", "wrong label"]
    histogram.hist(parts, bins=25, range=(0, 1), label=labels, color=["tab:green", "tab:red"])
    histogram.set(xlabel="weight of the sample", ylabel="training samples", title="Learned weights")
    histogram.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
