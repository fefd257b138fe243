"""Programs of all kinds, every operation a torch call: the numbers of the same program on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from tests.cuda.programs import (
    DEVICES,
    LONG,
    assert_close,
    assert_equal,
    compiled,
    convolutions,
    draw,
    moved,
    reweighting,
    train,
)
from tests.helpers.quadratics import program
from tests.hypergradient.test_random_programs import by_paths, random_graph
from tests.runtime.test_tasks import Adapted, Shared, batches, network


def on(device, make, steps=6, **options):
    """Train a program on a device by the eager backend."""
    return train(compiled(moved(make(), device), **options), steps)


def assert_same(make, device, steps=6, rtol=1e-8, atol=1e-10):
    assert_close(on(device, make, steps), on("cpu", make, steps, verify=False), rtol=rtol, atol=atol)


ESTIMATORS = {
    "cg": mlopt.CG(max_steps=4, damping=1.0, warm_start=True),
    "preconditioned": mlopt.CG(max_steps=4, damping=1.0, preconditioner=mlopt.Nystrom(3, 1.0)),
    "ggn": mlopt.CG(max_steps=4, damping=1.0, curvature="ggn"),
    "neumann": mlopt.Neumann(num_terms=4, scale=0.1),
    "nystrom": mlopt.Nystrom(rank=3, damping=1.0),
    "dense": mlopt.Dense(damping=1.0),
    "identity": mlopt.Identity(),
    "finite differences": mlopt.FiniteDifference(),
    "central differences": mlopt.FiniteDifference(step=1e-4, exact=False),
    "sama": mlopt.SAMA(),
    "unroll": mlopt.Unroll(2),
}


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_on_a_weighted_perceptron(estimator, device):
    tolerance = 1e-5 if estimator == "central differences" else 1e-8  # a difference of nearby numbers
    make = lambda: reweighting(hypergradient=ESTIMATORS[estimator])  # noqa: E731
    assert_same(make, device, rtol=tolerance, atol=tolerance / 100)


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize(
    ("estimator", "name"), [*(("sama", n) for n in OPTIMIZERS), ("unroll", "sgd"), ("unroll", "nadam")]
)
def test_updates_are_differentiated(estimator, name, device):
    optimizer, settings = OPTIMIZERS[name]
    make = lambda: reweighting(optimizer=optimizer, settings=settings, hypergradient=ESTIMATORS[estimator])  # noqa: E731
    assert_same(make, device, steps=4)


def without_dropout():
    return nn.Sequential(*(layer for layer in convolutions() if not isinstance(layer, nn.Dropout)))


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("estimator", ["cg", "ggn", "unroll"])
def test_convolutions_and_batch_norm(estimator, device):
    make = lambda: reweighting(without_dropout, (1, 4, 4), hypergradient=ESTIMATORS[estimator])  # noqa: E731
    assert_same(make, device, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("device", LONG)
def test_dropout_draws_from_the_generator_of_the_device(device):
    """The same masks from the same seed, others from another; a hypergradient moves no generator."""

    def made(seed):
        plan = compiled(moved(reweighting(convolutions, (1, 4, 4)), device))
        found = train(plan, 4, seed=seed)
        plan.hypergradient("weighting")
        return found | {"next": torch.rand(3, device=device).cpu()}

    first = made(1)
    assert_close(made(1), first, rtol=1e-12, atol=1e-12)
    assert all(value.isfinite().all() for value in first.values())
    assert not torch.equal(made(2)["classifier.0.weight"], first["classifier.0.weight"])


@pytest.mark.parametrize("device", LONG)
def test_single_precision(device):
    make = lambda dtype: reweighting(dtype=dtype)  # noqa: E731
    expected = on("cpu", lambda: make(torch.float64), verify=False)
    assert_close(on(device, lambda: make(torch.float32)), expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("device", LONG)
def test_three_levels(device):
    """The middle one shapes the lowest loss and is read by the top; the lowest one is read by both."""
    spec = {"low": ["mid", "top"], "mid": ["low", "top"], "top": ["mid", "low"]}
    assert_same(lambda: program(spec, unroll_steps=2, hypergradient=mlopt.CG(max_steps=8, rtol=1e-12)), device, 8)


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize("estimator", ["cg", "dense", "unroll"])
def test_tasks(estimator, device):
    def make():
        modules = {"adapted": network(), "shared": network()}
        lower = Adapted(
            "adapted",
            module=modules["adapted"],
            optimizer=torch.optim.Adam(modules["adapted"].parameters(), lr=0.05),
            data=batches(1),
            tasks=3,
            unroll_steps=2,
            hypergradient=ESTIMATORS[estimator],
        )
        parameters = modules["shared"].parameters()
        upper = Shared(
            "shared", module=modules["shared"], optimizer=torch.optim.SGD(parameters, lr=0.1), data=batches(2)
        )
        return [lower, upper]

    assert_same(make, device)


@pytest.mark.parametrize("device", LONG)
@pytest.mark.parametrize(
    "options",
    [{"gradient_accumulation": 2}, {"clip_norm": 0.1}, {"normalize_gradient": True}, {"roll_back": True}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_a_problem(options, device):
    def make():
        options_below = {k: v for k, v in options.items() if k != "roll_back"}
        lower, upper = reweighting(**options_below)
        upper.roll_back = options.get("roll_back", False)
        return [lower, upper]

    assert_same(make, device)


class WithConstants(mlopt.Problem):
    """Tensors that the loss makes itself: on the batch's device, and numbers on the CPU."""

    def training_step(self, batch):
        x, y = batch
        index = torch.arange(3, device=x.device)
        mask = (y[:, None] == index).to(x.dtype) * torch.tensor([1.0, 2.0, 0.5], dtype=x.dtype, device=x.device)
        losses = F.cross_entropy(self.module(x) * torch.tensor(1.5), y, reduction="none")
        return {"loss": (mask.sum(1) * losses).mean(), "scale": torch.tensor(2.0), "max": losses.max().item()}


@pytest.mark.parametrize("device", DEVICES)
def test_constants_of_a_loss_and_numbers_among_its_metrics(device):
    def make():
        (problem,) = [p for p in reweighting() if p.name == "classifier"]
        return [
            WithConstants(
                "alone",
                module=problem.module,
                optimizer=problem.optimizer,
                data=problem.data,
                hypergradient=None,
            )
        ]

    assert_same(make, device)


class Learned(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.module(x), y)

    def optimizer_hyperparameters(self):
        return {"lr": self.tuner.module.value.exp()}


class Tuner(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)


@pytest.mark.parametrize("device", LONG)
def test_learned_settings_of_an_optimizer(device):
    def make():
        lower, upper = reweighting()
        value = nn.Module()
        value.value = nn.Parameter(draw(0, 1)[0] - 3)
        net = Learned(
            "net",
            module=lower.module,
            optimizer=torch.optim.SGD(lower.module.parameters(), lr=0.1, momentum=0.9),
            data=lower.data,
            hypergradient=mlopt.Unroll(3),
            unroll_steps=3,
        )
        optimizer = torch.optim.Adam([value.value], lr=0.1)
        return [net, Tuner("tuner", module=value, optimizer=optimizer, data=upper.data)]

    assert_same(make, device, steps=9)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("device", LONG)
def test_random_problem_graphs(device, seed):
    """Hypergradients through several levels, against the enumeration of all paths with explicit matrices."""
    graph = random_graph(seed)
    moved(graph.problems.values(), device)
    plan = mlopt.compile(graph, backend="eager", progress=False, strict=True)
    expected = by_paths(graph)
    for _ in range(2):  # once from scratch, once from a warm start
        torch.testing.assert_close(plan.hypergradient("top")["w"], expected, rtol=1e-8, atol=1e-9)
        plan.step()


class Eager(mlopt.Problem):
    """Branches on a value: an eager island."""

    def training_step(self, batch):
        x, y = batch
        loss = F.cross_entropy(self.module(x), y)
        return loss + 0.01 * self.module[0].weight.square().sum() if loss > 0 else loss


@pytest.mark.parametrize("device", LONG)
def test_an_eager_island(device):
    def make():
        lower, upper = reweighting()
        lower_options = {"module": lower.module, "optimizer": lower.optimizer, "data": upper.data}
        return [Eager("classifier", hypergradient=None, **lower_options)]

    with pytest.warns(mlopt.errors.IslandWarning):
        got = on(device, make, strict=False)
    with pytest.warns(mlopt.errors.IslandWarning):
        assert_close(got, on("cpu", make, strict=False), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("device", LONG)
def test_evaluation_twice_gives_the_same_bits(device):
    plan = compiled(moved(reweighting(convolutions, (1, 4, 4)), device))
    plan.run(3)
    first, second = ({k: v.cpu() for k, v in plan.hypergradient("weighting").items()} for _ in range(2))
    assert_equal(first, second)
