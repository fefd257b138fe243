"""Bilevel reinforcement learning: an intrinsic reward on CartPole, after Zheng, Oh and Singh (2018, arXiv 1804.06459).

CartPole's reward is hidden: all that is known is the length of an episode, when it has ended. The lower problem trains
a policy by policy gradients on a reward of state and action that is *learned*. The upper problem holds that reward.
Its loss is the policy gradient of the known lengths on new episodes; it reaches the reward through the policy's step.

    python examples/reward.py [--seeds 3]        # needs gymnasium

The policy never sees the lengths: what it learns of the task, it learns through the hypergradient. To show that, the
same program runs with a random reward that is not learned. Policy gradients on the lengths themselves are the
reference.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import common
import matplotlib.pyplot as plt
import torch
from torch import nn

import mlopt

EPISODES, LIMIT, DISCOUNT = 5, 200, 0.97
LR, ENTROPY = 0.3, 0.01  # of the policy's descent
REWARD_LR = 0.01


class Rollouts:
    """Episodes of the present policy, for ever; a loader.

    Args:
        policy: Gives logits of the two actions.
        seed: Of the environment and of the actions.
    """

    def __init__(self, policy: nn.Module, seed: int) -> None:
        import gymnasium

        self._policy = policy
        self._environments = [gymnasium.make("CartPole-v1", max_episode_steps=LIMIT) for _ in range(EPISODES)]
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self.lengths: list[float] = []  # mean length of every batch of episodes

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield states [E, T, 4], actions [E, T], which of them happened [E, T] and lengths [E]."""
        while True:
            yield self.sample()

    def sample(self) -> tuple[torch.Tensor, ...]:
        """Return one batch of episodes."""
        states = torch.zeros(EPISODES, LIMIT, 4)
        actions = torch.zeros(EPISODES, LIMIT, dtype=torch.int64)
        happened = torch.zeros(EPISODES, LIMIT)
        self._seed += EPISODES
        current = [e.reset(seed=self._seed + k)[0] for k, e in enumerate(self._environments)]
        alive = list(range(EPISODES))
        for t in range(LIMIT):
            states[alive, t] = torch.stack([torch.as_tensor(current[k]) for k in alive])
            with torch.no_grad():
                probabilities = self._policy(states[alive, t]).softmax(1)
            actions[alive, t] = torch.multinomial(probabilities, 1, generator=self._generator)[:, 0]
            happened[alive, t] = 1
            ended = []
            for k in alive:
                current[k], _, terminated, truncated, _ = self._environments[k].step(int(actions[k, t]))
                if terminated or truncated:
                    ended.append(k)
            alive = [k for k in alive if k not in ended]
            if not alive:
                break
        lengths = happened.sum(1)
        self.lengths.append(float(lengths.mean()))
        return states, actions, happened, lengths


def policy_loss(
    logits: torch.Tensor, actions: torch.Tensor, happened: torch.Tensor, returns: torch.Tensor
) -> torch.Tensor:
    """Return the loss whose gradient is the policy gradient, with the mean return as the baseline, and an entropy term.

    Args:
        logits: [E, T, 2].
        actions: [E, T].
        happened: [E, T]; 1 until an episode ends.
        returns: [E, T].
    """
    count = happened.sum()
    log_probabilities = logits.log_softmax(2)
    chosen = log_probabilities.gather(2, actions[:, :, None])[:, :, 0]
    entropy = -(log_probabilities.exp() * log_probabilities).sum(2)
    advantages = returns - (returns * happened).sum() / count
    return -((chosen * advantages + ENTROPY * entropy) * happened).sum() / count


def scaled_lengths(lengths: torch.Tensor, happened: torch.Tensor) -> torch.Tensor:
    """Return the length of its episode for every step, [E, T], with mean 0 and variance 1 over the steps."""
    returns, count = lengths[:, None].expand(-1, LIMIT), happened.sum()
    centered = returns - (returns * happened).sum() / count
    return centered / ((centered.square() * happened).sum() / count + 1e-6).sqrt()


def to_go(rewards: torch.Tensor) -> torch.Tensor:
    """Return discounted sums of the rewards from each step on, [E, T]."""
    steps = torch.arange(LIMIT)
    distance = (steps[:, None] - steps[None, :]).clamp_min(0)
    return rewards @ (DISCOUNT**distance * (steps[:, None] >= steps[None, :]))


class Policy(mlopt.Problem):
    """Lower problem: policy gradient of the learned reward; the lengths are not used."""

    def training_step(self, batch):
        """Return the loss."""
        states, actions, happened, _ = batch
        features = torch.cat([states, nn.functional.one_hot(actions, 2).to(states.dtype)], 2)
        rewards = self.reward.module(features)[:, :, 0] * happened
        return policy_loss(self.module(states), actions, happened, to_go(rewards))


class Reward(mlopt.Problem):
    """Upper problem: policy gradient of the lengths, on new episodes."""

    def training_step(self, batch):
        """Return the loss."""
        states, actions, happened, lengths = batch
        return policy_loss(self.policy(states), actions, happened, scaled_lengths(lengths, happened))


def make_policy(seed: int) -> nn.Module:
    """Return the policy that every method starts from."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))


def train_with_reward(seed: int, updates: int, lr: float, backend: str, *, verbose: bool = False) -> list[float]:
    """Learn policy and reward; return the mean lengths of all batches of episodes."""
    policy = make_policy(seed)
    reward = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
    if lr:  # it begins as zero: whatever the policy learns comes from what the reward learns
        nn.init.zeros_(reward[2].weight)
        nn.init.zeros_(reward[2].bias)
    rollouts = Rollouts(policy, 1000 * seed)
    lower = Policy(
        "policy",
        module=policy,
        # Plain descent: Adam would make steps of full length of a reward that is nearly zero.
        optimizer=torch.optim.SGD(policy.parameters(), lr=LR),
        data=rollouts,
        hypergradient=mlopt.Unroll(1),
        unroll_steps=1,
    )
    optimizer = torch.optim.Adam(reward.parameters(), lr=lr)
    graph = mlopt.Graph([lower, Reward("reward", module=reward, optimizer=optimizer, data=rollouts)])
    plan = mlopt.compile(graph, backend=backend, progress=False)
    if verbose:
        print(plan.explain())
    plan.run(updates)
    return rollouts.lengths


def train_directly(seed: int, updates: int) -> list[float]:
    """Train a policy on the lengths, with as many episodes."""
    policy = make_policy(seed)
    rollouts = Rollouts(policy, 1000 * seed)
    optimizer = torch.optim.SGD(policy.parameters(), lr=LR)
    for _ in range(2 * updates):
        states, actions, happened, lengths = rollouts.sample()
        optimizer.zero_grad()
        policy_loss(policy(states), actions, happened, scaled_lengths(lengths, happened)).backward()
        optimizer.step()
    return rollouts.lengths


def main() -> None:
    """Run the example."""
    made = common.parser(__doc__, "reward_out")
    made.add_argument("--updates", type=int, default=100, help="steps of the policy; default %(default)s")
    args = common.parse(made)
    start = time.perf_counter()
    names = ("a fixed random reward", "learned reward, mlopt", "lengths, directly")
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    for seed in range(args.seed, args.seed + args.seeds):
        options = (seed, args.updates)
        curves[names[1]].append(train_with_reward(*options, REWARD_LR, args.backend, verbose=seed == args.seed))
        curves[names[0]].append(train_with_reward(*options, 0.0, args.backend))
        curves[names[2]].append(train_directly(*options))
    last = max(1, args.updates // 5)
    rows = [(name, common.mean([sum(c[-last:]) / last for c in found])) for name, found in curves.items()]
    title = f"CartPole, at most {LIMIT} steps; {2 * args.updates * EPISODES} episodes; {args.seeds} seed(s)"
    common.print_table(title, ("reward", f"mean length of the last {last * EPISODES} episodes"), rows)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, found in curves.items():
        shortest = min(map(len, found))
        mean = torch.tensor([c[:shortest] for c in found]).mean(0)
        axes.plot(torch.arange(1, shortest + 1) * EPISODES, mean, label=name)
    axes.set(xlabel="episodes", ylabel="length", title=f"CartPole, mean of {args.seeds} seed(s)")
    axes.legend()
    figure.savefig(args.out_dir / "reward.png", dpi=130)
    print(f"saved {args.out_dir / 'reward.png'}; took {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
