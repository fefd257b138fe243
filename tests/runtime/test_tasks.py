"""Problems with tasks: one batched program equals one program per task."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from tests.helpers.double_backward import flat
from tests.helpers.extras import extras

T, B, D, C = 3, 5, 4, 3


class Adapted(mlopt.Problem):
    """Lower: a classifier near the shared initialization (iMAML, Rajeswaran et al. 2019, arXiv 1909.04630)."""

    def training_step(self, batch):
        x, y = batch
        loss = F.cross_entropy(self.module(x), y)
        for mine, shared in zip(self.module.parameters(), self.shared.module.parameters(), strict=True):
            loss = loss + 0.5 * (mine - shared).square().sum()
        return loss


class Shared(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        logits = self.adapted(x)
        regularizer = sum(p.square().sum() for p in self.module.parameters())
        accuracy = (logits.argmax(1) == y).double().mean()
        return {"loss": F.cross_entropy(logits, y) + 0.01 * regularizer, "acc": accuracy}


def network(layers=()):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), *layers, nn.Linear(6, C)).double()


def batches(seed, count=2):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(T, B, D, generator=g, dtype=torch.float64), torch.randint(0, C, (T, B), generator=g))
        for _ in range(count)
    ]


def program(task=None, estimator=None, adapted=Adapted, optimizer=None, layers=(), **options):
    """All tasks, or the one of this index as a program without tasks."""
    lower_data, upper_data = batches(1), batches(2)
    if task is not None:
        lower_data, upper_data = ([tuple(t[task] for t in b) for b in data] for data in (lower_data, upper_data))
    nets = [network([layer() for layer in layers]) for _ in range(2)]
    optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    lower = adapted(
        "adapted",
        module=nets[0],
        optimizer=optimizer(nets[0].parameters()),
        data=lower_data,
        hypergradient=estimator or mlopt.CG(max_steps=60, rtol=1e-12),
        unroll_steps=3,
        tasks=T if task is None else None,
    )
    upper = Shared("shared", module=nets[1], optimizer=torch.optim.SGD(nets[1].parameters(), lr=0.1), data=upper_data)
    return mlopt.compile(mlopt.Graph([lower, upper]), progress=False, **options), lower, upper


ESTIMATORS = [
    mlopt.CG(max_steps=60, rtol=1e-12),
    mlopt.CG(max_steps=2),
    mlopt.Neumann(num_terms=4, scale=0.3),
    mlopt.Dense(damping=0.1),
    mlopt.FiniteDifference(),
    mlopt.Identity(0.1),
]


@pytest.mark.parametrize(
    "optimizer",
    [None, pytest.param(lambda p: torch.optim.Adam(p, lr=0.05), marks=pytest.mark.slow)],
    ids=["sgd", "adam"],
)
@pytest.mark.parametrize("estimator", extras(ESTIMATORS, lambda e: e not in ESTIMATORS[::4]), ids=repr)
def test_one_batched_call_equals_serial_ones(estimator, optimizer):
    plan, lower, _ = program(estimator=estimator, optimizer=optimizer, strict=True)
    for _ in range(2):
        plan._executor.step("adapted")
    got = flat(plan.hypergradient("shared").values())
    serial = []
    for t in range(T):
        single, single_lower, _ = program(t, estimator=estimator, optimizer=optimizer, strict=True)
        for _ in range(2):
            single._executor.step("adapted")
        for mine, theirs in zip(lower.module.parameters(), single_lower.module.parameters(), strict=True):
            torch.testing.assert_close(mine[t], theirs, rtol=1e-10, atol=1e-12)
        serial.append(flat(single.hypergradient("shared").values()))
    torch.testing.assert_close(got, torch.stack(serial).mean(0), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_central_difference():
    plan, *_ = program(estimator=mlopt.FiniteDifference(exact=False, step=1e-4), strict=True)
    exact, *_ = program(estimator=mlopt.FiniteDifference(), strict=True)
    for p in (plan, exact):
        p._executor.step("adapted")
    torch.testing.assert_close(
        flat(plan.hypergradient("shared").values()), flat(exact.hypergradient("shared").values()), rtol=1e-5, atol=1e-7
    )


def test_losses_and_metrics_are_means():
    plan, lower, _ = program(strict=True)
    singles = [program(t, strict=True)[0] for t in range(T)]
    for _ in range(3):  # afterwards the shared parameters differ
        result, parts = plan.step(), [s.step() for s in singles]
        for name, values in result.items():
            for key, value in values.items():
                torch.testing.assert_close(value, torch.stack([p[name][key] for p in parts]).mean())
    assert result.keys() == {"adapted", "shared"}
    assert f"{T} x {lower.num_trained:,} parameters" in plan.explain()
    x = batches(3)[0][0]
    expected = torch.stack(
        [
            torch.func.functional_call(lower.module, {n: p[t] for n, p in lower.trained_parameters().items()}, x[t])
            for t in range(T)
        ]
    )
    torch.testing.assert_close(lower.for_each_task(x), expected)


class Prints(Adapted):
    def training_step(self, batch):
        if float(batch[0].sum()) > 1e9:
            raise AssertionError
        return super().training_step(batch)


@pytest.mark.slow
def test_an_island_with_tasks_gives_the_same():
    compiled, *_ = program(strict=True)
    with pytest.warns(mlopt.errors.IslandWarning, match="'adapted'"):
        island, *_ = program(adapted=Prints)
    for plan in (compiled, island):
        plan.run(4)
    torch.testing.assert_close(
        flat(island.hypergradient("shared").values()), flat(compiled.hypergradient("shared").values())
    )


class Multiplied(mlopt.Problem):
    """The shared parameters enter through a network with dropout, so that the mixed product depends on the masks."""

    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.module(x) * self.shared.module(x), y)


@pytest.mark.slow
def test_dropout_draws_one_mask_per_task_and_step():
    plan, *_ = program(layers=(lambda: nn.Dropout(0.5),))
    assert "not verified: adapted: its tasks draw" in plan.explain()
    plan._executor.step("adapted")
    a, b = (flat(plan.hypergradient("shared").values()) for _ in range(2))
    assert torch.equal(a, b)
    # All graphs of a loss draw the same masks: the two ways to the mixed product run different ones.
    found = []
    for estimator in (mlopt.FiniteDifference(), mlopt.FiniteDifference(exact=False, step=1e-4)):
        plan, *_ = program(estimator=estimator, layers=(lambda: nn.Dropout(0.5),), adapted=Multiplied)
        torch.manual_seed(7)
        plan._executor.step("adapted")
        torch.manual_seed(8)
        found.append(flat(plan.hypergradient("shared").values()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_batch_norm_statistics_move_by_the_mean():
    plan, lower, _ = program(layers=(lambda: nn.BatchNorm1d(6),), strict=True)
    net, before = lower.module, lower.module[2].running_mean.clone()
    x = batches(1)[0][0]
    weight, bias = net[0].weight.detach().clone(), net[0].bias.detach().clone()
    means = [torch.tanh(F.linear(x[t], weight[t], bias[t])).mean(0) for t in range(T)]
    plan._executor.step("adapted")
    torch.testing.assert_close(net[2].running_mean, 0.9 * before + 0.1 * torch.stack(means).mean(0))
    assert int(net[2].num_batches_tracked) == 1


def test_bad_use():
    errors = mlopt.errors
    net = network()
    make = lambda **o: Adapted("adapted", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), **o)  # noqa: E731
    with pytest.raises(errors.ProblemError, match="argument `tasks`: expected an integer >= 1"):
        make(tasks=0)
    used = torch.optim.Adam(net.parameters())
    net(torch.ones(1, D).double()).sum().backward()
    used.step()
    with pytest.raises(errors.ProblemError, match="it has made steps already; with tasks=3"):
        Adapted("adapted", module=net, optimizer=used, tasks=T)
    lower = make(tasks=T, data=[(torch.ones(2, B, D).double(), torch.zeros(2, B).long())])
    other = network()
    upper = Shared("shared", module=other, optimizer=torch.optim.SGD(other.parameters(), lr=0.1), data=batches(2))
    with pytest.raises(
        errors.DataError, match=r"'adapted': with tasks=3 .* leading axis of 3, got the shape \(2, 5, 4\)"
    ):
        mlopt.compile(mlopt.Graph([lower, upper]), progress=False)
    third = network()
    more = Adapted("more", module=third, optimizer=torch.optim.SGD(third.parameters(), lr=0.1), tasks=2)
    with pytest.raises(errors.GraphError, match="'more' has tasks=2, problem 'adapted' tasks=3"):
        mlopt.Graph([lower, more])
