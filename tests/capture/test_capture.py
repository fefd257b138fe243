"""Capture: what of a user's Python becomes a graph, and that the graph differentiates like the code."""

import collections
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.capture import flatten_batch
from mlopt.errors import ProblemError


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    tag: str


Pair = collections.namedtuple("Pair", ["x", "y"])
X, Y = torch.randn(8, 4), torch.randint(0, 3, (8,))


def compile_loss(step, batch=(X, Y), module=None, **options):
    module = module or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    cls = type("Custom", (mlopt.Problem,), {"training_step": step})
    problem = cls("p", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data=[batch], **options)
    plan = mlopt.compile(mlopt.Graph([problem]), strict=True, progress=False)
    return plan, problem


def check(step, **options):
    """Compile strictly (every derivative is compared with autograd) and step once."""
    plan, problem = compile_loss(step, **options)
    return plan.step()["p"], problem


def test_no_grad_regions():
    def step(self, batch):
        x, y = batch
        logits = self.module(x)
        with torch.no_grad():
            scale = logits.softmax(1).max(1).values
            with torch.no_grad():
                scale = scale * 2
        return (scale * F.cross_entropy(logits, y, reduction="none")).mean()

    check(step)


def test_enable_grad_inside_no_grad():
    def step(self, batch):
        with torch.no_grad():
            a = self.module(batch[0]) * 2
            with torch.enable_grad():
                b = self.module(batch[0]).square().mean()
            c = self.module(batch[0]).mean()
        return b + a.mean() + c

    check(step)


def test_metrics_of_every_kind():
    def step(self, batch):
        x, y = batch
        logits = self.module(x)
        loss = F.cross_entropy(logits, y)
        return {
            "loss": loss,
            "tensor": logits.norm(),
            "number": loss.item(),
            "constant": 3,
            "text": "note",
            "size": x.shape[0],
        }

    result, _ = check(step)
    assert result["number"] == pytest.approx(float(result["loss"]))
    assert isinstance(result["number"], float) and isinstance(result["tensor"], torch.Tensor)
    assert (result["constant"], result["text"], result["size"]) == (3, "note", 8)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        {"x": X, "y": Y, "name": "train", "weight": 0.5, "nothing": None},
        {"inner": {"x": X}, "y": (Y, 3)},
        Pair(X, Y),
        Sample(X, Y, "tag"),
    ],
    ids=["tuple", "list", "dict", "nested", "namedtuple", "dataclass"],
)
def test_batches(batch):
    def step(self, batch):
        if isinstance(batch, dict):
            x = batch["x"] if "x" in batch else batch["inner"]["x"]
            y = batch["y"] if "x" in batch else batch["y"][0]
        elif isinstance(batch, Pair | Sample):
            x, y = batch.x, batch.y
        else:
            x, y = batch
        return F.cross_entropy(self.module(x), y)

    check(step, batch=batch)


def test_bare_tensor_batch_is_not_taken_apart():
    def step(self, batch):
        assert isinstance(batch, torch.Tensor) and batch.shape[1] == 4
        return self.module(batch).square().mean()

    check(step, batch=X)


def test_no_data():
    def step(self, batch):
        assert batch is None
        return self.module(torch.ones(1, 4)).square().sum()

    module = nn.Linear(4, 1)
    cls = type("Custom", (mlopt.Problem,), {"training_step": step})
    problem = cls("p", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    mlopt.compile(mlopt.Graph([problem]), strict=True, progress=False).run(2)


def test_changed_python_values_of_a_batch_are_captured_anew():
    def step(self, batch):
        return batch["factor"] * self.module(batch["x"]).square().mean()

    cls = type("Custom", (mlopt.Problem,), {"training_step": step})
    module = nn.Linear(4, 1)
    data = [{"x": X, "factor": 1.0}, {"x": X, "factor": 3.0}]
    problem = cls("p", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-9), data=data)
    plan = mlopt.compile(mlopt.Graph([problem]), strict=True, progress=False)
    first, second = plan.step()["p"]["loss"], plan.step()["p"]["loss"]
    torch.testing.assert_close(second, 3 * first)


def test_branch_on_the_batch_size_is_captured_per_branch():
    def step(self, batch):
        factor = 2.0 if batch.shape[0] > 5 else 1.0
        return factor * self.module(batch).square().mean()

    cls = type("Custom", (mlopt.Problem,), {"training_step": step})
    module = nn.Linear(4, 1)
    data = [torch.ones(n, 4) for n in (8, 7, 3, 4, 9)]
    problem = cls("p", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-12), data=data)
    plan = mlopt.compile(mlopt.Graph([problem]), strict=True, progress=False)
    losses = [float(plan.step()["p"]["loss"]) for _ in range(5)]
    assert losses == pytest.approx([losses[0], losses[0], losses[0] / 2, losses[0] / 2, losses[0]])
    assert len(plan._report.graphs["p"]) == 2


def test_batch_of_one():
    def step(self, batch):
        return self.module(batch).square().mean()

    cls = type("Custom", (mlopt.Problem,), {"training_step": step})
    module = nn.Linear(4, 1)
    data = [torch.randn(n, 4) for n in (4, 1, 5)]
    problem = cls("p", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data=data)
    mlopt.compile(mlopt.Graph([problem]), strict=True, progress=False).run(6)


def test_slices_of_a_large_tensor_do_not_compile_again():
    def step(self, batch):
        return self.module(batch).square().mean()

    everything = torch.randn(40, 4)
    cls = type("Custom", (mlopt.Problem,), {"training_step": step})
    module = nn.Linear(4, 1)
    data = [everything[i : i + 8] for i in range(0, 40, 8)]
    problem = cls("p", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data=data)
    plan = mlopt.compile(mlopt.Graph([problem]), strict=True, progress=False)
    plan.run(5)
    assert len(plan._report.graphs["p"]) == 1


def test_in_place_writes():
    def step(self, batch):
        x, y = batch
        x = x.clone()
        x[:, 0] = 0
        logits = self.module(x)
        logits.add_(1.0)
        buffer = torch.zeros(8, 3)
        buffer[:] = logits * 2
        batch[0].mul_(1.0)
        return F.cross_entropy(buffer, y)

    check(step)


def test_write_to_a_parameter_is_refused():
    def step(self, batch):
        with torch.no_grad():
            self.module[0].weight.clamp_(-1, 1)
        return self.module(batch[0]).square().mean()

    with pytest.raises(ProblemError, match="'p'.*writes in place to the own tensor '0.weight'"):
        compile_loss(step)


def test_read_through_a_written_view_is_an_edge():
    """The upper parameter reaches the loss only through a slice assignment: losing it would be a silent zero."""

    class Lower(mlopt.Problem):
        def training_step(self, batch):
            scale = torch.ones(3, dtype=torch.float64)
            scale[1:] = self.upper.module.weight[0]
            return (self.module.weight * scale).square().sum() + self.module.weight.sum()

    class Upper(mlopt.Problem):
        def training_step(self, batch):
            return (self.lower.module.weight - 1).square().sum()

    problems = []
    for cls, name, shape in ((Lower, "lower", (3, 1)), (Upper, "upper", (2, 1))):
        module = nn.Linear(*shape, bias=False).double()
        problems.append(cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1)))
    plan = mlopt.compile(mlopt.Graph(problems), strict=True, progress=False)
    assert plan.graph.reads("lower") == {"upper": ("weight",)}
    assert (plan.hypergradient("upper")["weight"] != 0).all()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [1, 2])
def test_batch_norm(train, affine, dims):
    norm = (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(3, affine=affine, momentum=0.3)
    first = nn.Linear(4, 3) if dims == 1 else nn.Conv2d(2, 3, 3)
    x = torch.randn(8, 4) if dims == 1 else torch.randn(5, 2, 6, 6)
    module = nn.Sequential(first, norm, nn.Tanh()).double().train(train)
    check(lambda self, batch: self.module(batch).square().mean(), batch=x.double(), module=module)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)), (4, 1, 6, 6)),
        (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)), (8, 4)),
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (3, 5, 8)),
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), (3, 5, 8)),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)), (8, 4)),
    ],
    ids=["conv", "layer norm", "transformer", "transformer with dropout", "dropout"],
)
def test_modules(module, x):
    check(lambda self, batch: self.module(batch).square().mean(), batch=torch.randn(*x), module=module)


def test_tensor_attribute_is_read_live():
    """A tensor that training_step takes from the problem is an input of the graph, not a copy in it."""

    class Scaled(mlopt.Problem):
        def training_step(self, batch):
            return (self.module(batch) * self.scale).square().mean()

    module = nn.Linear(4, 1)
    problem = Scaled("p", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=1e-12), data=[X])
    problem.scale = torch.tensor(2.0)
    plan = mlopt.compile(mlopt.Graph([problem]), strict=True, progress=False)
    first = plan.step()["p"]["loss"]
    problem.scale.fill_(4.0)
    torch.testing.assert_close(plan.step()["p"]["loss"], 4 * first)


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False)])
def test_a_batch_is_copied_to_a_gpu_without_waiting_and_from_one_with(device, waits):
    """Who reads it on the host would not wait."""
    asked = []

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

        def to(self, *args, **kwargs):
            asked.append((args, kwargs))
            return self

    flatten_batch("p", (torch.zeros(2).as_subclass(Elsewhere),), torch.device(device))
    assert asked == [((torch.device(device),), {"non_blocking": not waits})]
