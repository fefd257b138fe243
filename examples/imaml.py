"""Few-shot learning, 5-way 1-shot: iMAML (Rajeswaran et al. 2019, arXiv 1909.04630) and MAML (Finn et al. 2017).

The upper problem holds the initialization of a small convolutional network. The lower problem has 16 tasks: 16 copies
of the network that adapt to 5 labelled images each. All tasks run as one batch.

- iMAML: the copies are kept near the initialization by a quadratic term, and the upper gradient passes through the
  *optimum* of each by conjugate gradients.
- MAML (arXiv 1703.03400): it passes through the *steps*, by reverse mode (`mlopt.Unroll`). What the lower problem
  solves for is then how far a copy has gone from the initialization, so that its loss reads the initialization.

    python examples/imaml.py --data-dir PATH [--method maml] [--seeds 3]    # PATH holds omniglot.npz
    python examples/imaml.py --data-dir PATH --check    # batched hypergradients against serial ones, float64

``omniglot.npz`` has ``x``, uint8 [1623 characters, 20 drawers, 28, 28], the 964 characters of the background alphabets
first (Lake, Salakhutdinov and Tenenbaum 2015). Without ``--data-dir`` the images are scikit-learn's digits, five of ten
classes per task, for a quick look.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import common
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import mlopt

WAYS, QUERIES = 5, 5
PROXIMITY = 0.5  # weight of the quadratic term, lambda in the paper
TEST_EPISODES = 5  # every test and the nearest neighbour see the same ones
BACKGROUND = 964  # characters used for training


class Adapt(mlopt.Problem):
    """Lower problem: one network per task, near the initialization."""

    def training_step(self, batch):
        """Return cross-entropy on the task's labelled images and the proximal term."""
        x, y = batch
        distance = sum(
            (mine - shared).square().sum()
            for mine, shared in zip(self.module.parameters(), self.meta.module.parameters(), strict=True)
        )
        return F.cross_entropy(self.module(x), y) + 0.5 * PROXIMITY * distance


class Meta(mlopt.Problem):
    """Upper problem: the initialization, judged by the adapted networks on other images of their tasks."""

    def training_step(self, batch):
        """Return loss and accuracy."""
        x, y = batch
        logits = self.adapt(x)
        return {"loss": F.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).float().mean()}


def adapted(start: nn.Module, offset: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of a copy: those of the initialization, and how far it went."""
    offsets = dict(offset.named_parameters())
    return {name: parameter + offsets[name] for name, parameter in start.named_parameters()}


class Steps(mlopt.Problem):
    """Lower problem of MAML: how far each copy has gone from the initialization."""

    def training_step(self, batch):
        """Return cross-entropy on the task's labelled images."""
        x, y = batch
        start = self.meta.module
        return F.cross_entropy(torch.func.functional_call(start, adapted(start, self.module), (x,)), y)


class Start(mlopt.Problem):
    """Upper problem of MAML."""

    def training_step(self, batch):
        """Return loss and accuracy."""
        x, y = batch
        logits = torch.func.functional_call(self.module, adapted(self.module, self.adapt.module), (x,))
        return {"loss": F.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).float().mean()}


def network(filters: int) -> nn.Module:
    """Four convolutional layers (Vinyals et al. 2016), normalized by the statistics of the batch."""
    layers: list[nn.Module] = []
    width = 1
    for _ in range(4):
        layers += [
            nn.Conv2d(width, filters, 3, stride=2, padding=1),
            nn.BatchNorm2d(filters, track_running_stats=False),
            nn.ReLU(),
        ]
        width = filters
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(filters * 4, WAYS))


class Episodes:
    """Endless episodes: each has `tasks` tasks of `WAYS` classes. The same number gives the same episode."""

    def __init__(self, images: torch.Tensor, tasks: int, seed: int) -> None:
        self.images, self.tasks, self.seed = images, tasks, seed

    def __getitem__(self, number: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """Return (support, query) of an episode: images [T, n, 1, 28, 28], labels [T, n]."""
        rng = np.random.default_rng((self.seed, number))
        classes, drawers = self.images.shape[:2]
        support, query = [], []
        for _ in range(self.tasks):
            chosen = rng.choice(classes, WAYS, replace=False)
            drawn = np.stack([rng.choice(drawers, 1 + QUERIES, replace=False) for _ in range(WAYS)])
            found = self.images[chosen[:, None], drawn]  # [ways, 1 + queries, 28, 28]
            support.append(found[:, :1].reshape(-1, 1, 28, 28))
            query.append(found[:, 1:].reshape(-1, 1, 28, 28))
        labels = torch.arange(WAYS)
        return (
            (torch.stack(support), labels.expand(self.tasks, WAYS).contiguous()),
            (torch.stack(query), labels.repeat_interleave(QUERIES).expand(self.tasks, WAYS * QUERIES).contiguous()),
        )


class Part:
    """One side of the episodes as a loader: the support set, repeated for every inner step, or the query set."""

    def __init__(self, episodes: Episodes, side: int, repeats: int) -> None:
        self.episodes, self.side, self.repeats = episodes, side, repeats

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield batches for ever."""
        number = 0
        while True:
            batch = self.episodes[number][self.side]
            for _ in range(self.repeats):
                yield batch
            number += 1


def load(data_dir: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images for training and for evaluation, [classes, drawers, 28, 28] in [0, 1]."""
    if data_dir is not None:
        images = torch.from_numpy(np.load(Path(data_dir) / "omniglot.npz", allow_pickle=False)["x"]).float() / 255
        return images[:BACKGROUND], images[BACKGROUND:]
    x, y = load_digits(return_X_y=True)
    small = torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(28, 28), mode="bilinear")[:, 0]
    classes = torch.stack([large[torch.from_numpy(y) == c][:170] for c in range(10)])
    return classes[:, :120], classes[:, 120:]


def make_program(episodes: Episodes, args: argparse.Namespace, tasks: int | None, seed: int = 0) -> mlopt.Graph:
    """Return the bilevel program; `tasks` None for one task without a task axis."""
    torch.manual_seed(seed)
    meta_net = network(args.filters)
    net = copy.deepcopy(meta_net)
    lower, upper, hypergradient = Adapt, Meta, mlopt.CG(max_steps=5, rtol=1e-4, damping=1.0)
    if args.method == "maml":
        lower, upper, hypergradient = Steps, Start, mlopt.Unroll(args.inner_steps)
        for parameter in net.parameters():
            parameter.data.zero_()
    adapt = lower(
        "adapt",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=args.lr),
        data=Part(episodes, 0, args.inner_steps),
        hypergradient=hypergradient,
        unroll_steps=args.inner_steps,
        tasks=tasks,
    )
    meta = upper(
        "meta",
        module=meta_net,
        optimizer=torch.optim.Adam(meta_net.parameters(), lr=args.meta_lr),
        data=Part(episodes, 1, 1),
    )
    return mlopt.Graph([adapt, meta])


def restart(adapt: mlopt.Problem, meta: mlopt.Problem) -> None:
    """Let every task begin at the initialization."""
    with torch.no_grad():
        for mine, shared in zip(adapt.module.parameters(), meta.module.parameters(), strict=True):
            if isinstance(adapt, Steps):
                mine.zero_()
            else:
                mine.copy_(shared.expand_as(mine))


def evaluate(meta_net: nn.Module, episodes: Episodes, count: int, args: argparse.Namespace) -> float:
    """Return the accuracy on new classes after adaptation, by plain PyTorch."""
    start = {k: p.detach() for k, p in meta_net.named_parameters()}
    inner_steps, lr = args.inner_steps, args.lr
    proximity = PROXIMITY if args.method == "imaml" else 0.0

    def loss(parameters, x, y):
        logits = torch.func.functional_call(meta_net, parameters, (x,))
        distance = sum((parameters[k] - start[k]).square().sum() for k in start)
        return F.cross_entropy(logits, y) + 0.5 * proximity * distance

    step = torch.func.vmap(torch.func.grad(loss))
    right = total = 0
    for number in range(count):
        (x, y), (x_query, y_query) = episodes[number]
        parameters = {k: p.expand(len(x), *p.shape) for k, p in start.items()}
        for _ in range(inner_steps):
            gradients = step(parameters, x, y)
            parameters = {k: p - lr * gradients[k] for k, p in parameters.items()}
        logits = torch.func.vmap(lambda p, x: torch.func.functional_call(meta_net, p, (x,)))(parameters, x_query)
        right += int((logits.argmax(-1) == y_query).sum())
        total += y_query.numel()
    return right / total


def nearest_neighbour(episodes: Episodes, count: int) -> float:
    """Return the accuracy on new classes of taking the label of the nearest labelled image, pixel by pixel."""
    right = total = 0
    for number in range(count):
        (x, y), (x_query, y_query) = episodes[number]
        nearest = torch.cdist(x_query.flatten(2), x.flatten(2)).argmin(2)
        right += int((y.gather(1, nearest) == y_query).sum())
        total += y_query.numel()
    return right / total


def check(images: torch.Tensor, args: argparse.Namespace) -> None:
    """Compare one batched hypergradient with the mean of serial ones, and their times."""
    episodes = Episodes(images, args.tasks, seed=0)
    graph = make_program(episodes, args, args.tasks)
    plan = mlopt.compile(graph, backend=args.backend)
    start = time.perf_counter()
    for _ in range(args.inner_steps - 1):  # with one more the upper problem would step, too
        plan.step()
    batched = plan.hypergradient("meta")
    seconds = time.perf_counter() - start
    serial, serial_seconds = [], 0.0

    class One(Episodes):
        task = 0

        def __getitem__(self, number):
            return tuple(tuple(t[self.task] for t in side) for side in super().__getitem__(number))

    one = One(images, args.tasks, seed=0)
    single_graph = make_program(one, args, None)
    for task in range(args.tasks):
        one.task = task
        single = mlopt.compile(single_graph, backend=args.backend, progress=False)
        restart(single_graph.problems["adapt"], single_graph.problems["meta"])
        start = time.perf_counter()
        for _ in range(args.inner_steps - 1):
            single.step()
        serial.append(single.hypergradient("meta"))
        serial_seconds += time.perf_counter() - start
    got = torch.cat([g.reshape(-1) for g in batched.values()])
    mean = torch.stack([torch.cat([g.reshape(-1) for g in one.values()]) for one in serial]).mean(0)
    print(
        f"{args.tasks} tasks, {args.filters} filters: relative difference "
        f"{float((got - mean).norm() / mean.norm()):.1e}; batched {seconds:.2f} s, serial {serial_seconds:.2f} s"
    )


def train(images: torch.Tensor, test: torch.Tensor, args: argparse.Namespace, seed: int, verbose: bool) -> list:
    """Train from one seed.

    Returns:
        The accuracies of the training episodes; (episode, test accuracy) now and then; the test accuracy of the nearest
        neighbour.
    """
    episodes, held_out = Episodes(images, args.tasks, seed=2 * seed), Episodes(test, args.tasks, seed=2 * seed + 1)
    graph = make_program(episodes, args, args.tasks, seed)
    plan = mlopt.compile(graph, backend=args.backend)
    if verbose:
        print(plan.explain())
    adapt, meta = graph.problems["adapt"], graph.problems["meta"]
    curve, tests = [], [(0, evaluate(meta.module, held_out, TEST_EPISODES, args))]
    every = max(1, args.episodes // 10)
    with tqdm(total=args.episodes, desc="episodes", disable=None) as bar:
        for episode in range(1, args.episodes + 1):
            restart(adapt, meta)
            result = plan.run(args.inner_steps)["meta"]
            curve.append(float(result["acc"]))
            if episode % every == 0 or episode == args.episodes:
                tests.append((episode, evaluate(meta.module, held_out, TEST_EPISODES, args)))
            bar.set_postfix(loss=f"{float(result['loss']):.3f}", acc=f"{curve[-1]:.3f}", test=f"{tests[-1][1]:.3f}")
            bar.update()
    return [curve, tests, nearest_neighbour(held_out, TEST_EPISODES)]


def main() -> None:
    """Train, print a table, save the curve."""
    parser = common.parser(__doc__, "imaml_out")
    parser.add_argument("--data-dir", help="folder with omniglot.npz; without it, scikit-learn's digits")
    parser.add_argument("--method", choices=["imaml", "maml"], default="imaml", help="default %(default)s")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--filters", type=int, default=32)
    parser.add_argument("--inner-steps", type=int, help="default: 10, for MAML 5")
    parser.add_argument("--lr", type=float, help="of the inner steps; default: 0.1, for MAML 0.4")
    parser.add_argument("--meta-lr", type=float, default=2e-3)
    parser.add_argument("--check", action="store_true", help="compare one batched call with serial ones, and stop")
    args = common.parse(parser)
    args.inner_steps = args.inner_steps or (10 if args.method == "imaml" else 5)
    args.lr = args.lr or (0.1 if args.method == "imaml" else 0.4)
    images, test = load(args.data_dir)
    if args.check:
        torch.set_default_dtype(torch.float64)
        check(images.double(), args)
        return
    start = time.perf_counter()
    runs = [train(images, test, args, seed, seed == args.seed) for seed in range(args.seed, args.seed + args.seeds)]
    name = "Omniglot, new alphabets" if args.data_dir else "digits, new images"
    rows = [
        (str(number), common.mean([100 * run[1][k][1] for run in runs])) for k, (number, _) in enumerate(runs[0][1])
    ]
    rows.append(("nearest neighbour, pixels", common.mean([100 * run[2] for run in runs])))
    title = f"{args.method}, {WAYS}-way 1-shot, {args.tasks} tasks per episode, {name}; {args.seeds} seed(s)"
    common.print_table(title, ("episodes", "accuracy after adaptation, %"), rows)
    curve, tests, nearest = runs[-1]
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(range(1, len(curve) + 1), curve, color="0.75", lw=0.8, label="training episodes")
    axes.plot(*zip(*tests, strict=True), "o-", label=name)
    axes.axhline(nearest, color="tab:orange", ls="--", label="nearest neighbour, pixels")
    axes.axhline(1 / WAYS, color="0.5", ls=":", label="chance")
    title = {"imaml": "iMAML", "maml": "MAML"}[args.method]
    axes.set(xlabel="episode", ylabel="query accuracy after adaptation", ylim=(0, 1), title=f"{title}, 5-way 1-shot")
    axes.legend()
    figure.savefig(args.out_dir / f"{args.method}.png", dpi=130)
    print(f"saved {args.out_dir / f'{args.method}.png'}; took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
