"""Three levels: which pretraining samples help? After Choe et al. 2023, arXiv 2207.02849, section 5.

1. `pretrain` trains an encoder on many samples with doubtful labels, each weighted.
2. `finetune` trains a copy on a few samples with right labels, pulled towards the pretrained parameters.
3. `reweight` holds the network of the weights, and has the loss of the finetuned classifier on held-out samples.

The gradient of the third reaches its parameters through the optimum of the second and then of the first.

    python examples/pretraining.py [--seeds 3]

The data are scikit-learn's digits: 900 for pretraining, of which 50 % have a wrong label, 40 for finetuning, and 40
held out.
Every method sees the same samples: the plain ones finetune on both small sets.
"""

from __future__ import annotations

import copy
import time

import common
import digits
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn

import mlopt

PROXIMITY = 0.03  # how strongly finetuning is pulled towards the pretrained parameters
NOISE = 0.5
SMALL = 40  # samples for finetuning, and as many held out
WARMUP = 200  # in the first steps a loss says nothing yet of a label


class Pretrain(mlopt.Problem):
    """Level 1: weighted cross-entropy on doubtful labels."""

    def training_step(self, batch):
        """Return the weighted loss."""
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        return (self.reweight(losses.detach()[:, None])[:, 0] * losses).mean()


class Finetune(mlopt.Problem):
    """Level 2: cross-entropy on a few right labels, near the pretrained parameters."""

    def training_step(self, batch):
        """Return loss + PROXIMITY |theta - theta_pretrained|^2 / 2."""
        x, y = batch
        pairs = zip(self.module.parameters(), self.pretrain.module.parameters(), strict=True)
        distance = sum((mine - theirs).square().sum() for mine, theirs in pairs)
        return F.cross_entropy(self.module(x), y) + 0.5 * PROXIMITY * distance


class Reweight(mlopt.Problem):
    """Level 3: cross-entropy of the finetuned classifier on held-out samples."""

    def training_step(self, batch):
        """Return the loss."""
        x, y = batch
        return F.cross_entropy(self.finetune(x), y)


def load(seed: int) -> tuple[list[common.Data], torch.Tensor]:
    """Return pretraining, finetuning, held-out and test data, and which pretraining labels are wrong."""
    x, y = load_digits(return_X_y=True)
    parts = common.split(torch.tensor(x / 16).float(), torch.tensor(y), [900, SMALL, SMALL], seed)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(900, generator=generator) < NOISE
    others = (parts[0][1] + torch.randint(1, 10, (900,), generator=generator)) % 10
    return [(parts[0][0], torch.where(wrong, others, parts[0][1])), *parts[1:]], wrong


def network(seed: int) -> nn.Module:
    """Return the classifier that every method starts from."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(digits.NUM_PIXELS, 64), nn.Tanh(), nn.Linear(64, digits.NUM_CLASSES))


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of both classifiers."""
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def make_program(data: list[common.Data], seed: int) -> mlopt.Graph:
    """Return the three-level program."""
    first = network(seed)
    second = copy.deepcopy(first)
    weights = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())
    estimator = mlopt.CG(max_steps=10, rtol=1e-3, damping=1.0)
    pretrain = Pretrain(
        "pretrain",
        module=first,
        optimizer=optimizer_of(first),
        data=digits.Batches(data[0], 100, seed),
        hypergradient=estimator,
        unroll_steps=2,
        warmup_steps=WARMUP,
    )
    finetune = Finetune(
        "finetune",
        module=second,
        optimizer=optimizer_of(second),
        data=digits.Batches(data[1], SMALL, seed),
        hypergradient=estimator,
        unroll_steps=2,
    )
    optimizer = torch.optim.Adam(weights.parameters(), lr=3e-3)
    held_out = digits.Batches(data[2], SMALL, seed)
    return mlopt.Graph([pretrain, finetune, Reweight("reweight", module=weights, optimizer=optimizer, data=held_out)])


def train_plainly(module: nn.Module, data: common.Data, seed: int, steps: int, towards: nn.Module | None) -> nn.Module:
    """Train a classifier, pulled towards another if one is given."""
    module = copy.deepcopy(module)
    optimizer, loader, step = optimizer_of(module), digits.Batches(data, 100, seed), 0
    while step < steps:
        for x, y in loader:
            loss = F.cross_entropy(module(x), y)
            if towards is not None:
                pairs = zip(module.parameters(), towards.parameters(), strict=True)
                loss = loss + 0.5 * PROXIMITY * sum((a - b.detach()).square().sum() for a, b in pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return module


def accuracy(module: nn.Module, data: common.Data) -> float:
    """Return the percent of right predictions."""
    with torch.no_grad():
        return 100 * (module(data[0]).argmax(1) == data[1]).float().mean().item()


def main() -> None:
    """Run the example."""
    made = common.parser(__doc__, "pretraining_out")
    made.add_argument("--steps", type=int, default=1000, help="pretraining steps; default %(default)s")
    args = common.parse(made)
    start = time.perf_counter()
    names = ("small sets alone", "pretrained on all", "pretrained with learned weights", "pretrained on right labels")
    scores: dict[str, list[float]] = {name: [] for name in names}
    auroc = []
    for seed in range(args.seed, args.seed + args.seeds):
        data, wrong = load(seed)
        graph = make_program(data, seed)
        plan = mlopt.compile(graph, backend=args.backend)
        if seed == args.seed:
            print(plan.explain())
        mlopt.Engine(plan, steps=args.steps, progress=False).run()
        first = graph.problems["pretrain"].module
        with torch.no_grad():
            losses = F.cross_entropy(first(data[0][0]), data[0][1], reduction="none")
            weights = graph.problems["reweight"].module(losses[:, None])[:, 0]
        auroc.append(float(roc_auc_score(~wrong, weights)))
        both = tuple(torch.cat(parts) for parts in zip(data[1], data[2], strict=True))
        right = (data[0][0][~wrong], data[0][1][~wrong])
        pretrained = {
            "small sets alone": network(seed),
            "pretrained on all": train_plainly(network(seed), data[0], seed, args.steps, None),
            "pretrained with learned weights": first,
            "pretrained on right labels": train_plainly(network(seed), right, seed, args.steps, None),
        }
        for name, module in pretrained.items():
            towards = None if name == "small sets alone" else module
            scores[name].append(accuracy(train_plainly(module, both, seed, 500, towards), data[3]))
    rows = [(name, common.mean(values)) for name, values in scores.items()]
    title = f"digits, {100 * NOISE:.0f} % of 900 pretraining labels wrong; {args.seeds} seed(s)"
    common.print_table(title, ("finetuned after", "test accuracy, %"), rows)
    print(f"\nAUROC of the weight against label-is-right: {common.mean(auroc, 3)}")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    parts, labels = [weights[~wrong].numpy(), weights[wrong].numpy()], ["right label", "wrong label"]
    axes.hist(parts, bins=25, range=(0, 1), label=labels, color=["tab:green", "tab:red"])
    axes.set(xlabel="weight of the sample", ylabel="pretraining samples", title="Learned weights, last seed")
    axes.legend()
    figure.savefig(args.out_dir / "pretraining.png", dpi=130)
    plan.draw(args.out_dir / "plan.svg")
    print(f"saved {args.out_dir / 'pretraining.png'} and plan.svg; took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
