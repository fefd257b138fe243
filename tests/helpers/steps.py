"""Programs of one problem, and a backend that runs step graphs without compiling them."""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.backends import EagerBackend, Lowering
from mlopt.backends.eager import EagerGraph


class GraphBackend(EagerBackend):
    """Says that it compiles, so that step graphs are made and used; they run by torch calls."""

    name = "graphs"
    compiles = True

    def lower(self, module):
        graph = EagerGraph(module)
        graph.lowering = Lowering("graphs")
        return graph


def is_step(module):
    """Whether a graph of `problem` with Adam is that of the step: it returns moments, too."""
    return len(next(n for n in module.graph.nodes if n.op == "output").args[0]) > 12


class Regression(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        logits = self.module(x)
        return {"loss": F.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).double().mean()}


class Net(nn.Module):
    """With everything that makes a step more than a gradient: a frozen, an unused and two equally shaped parameters."""

    def __init__(self, dropout=0.0, batch_norm=False):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.hidden = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5))
        self.norm = nn.BatchNorm1d(5) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.last(self.dropout(self.norm(torch.tanh(self.hidden(torch.tanh(self.first(x)) * self.frozen)))))


def batches(count=3, size=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (size,), generator=g))
        for _ in range(count)
    ]


def problem(optimizer, *, scheduler=None, net=None, data=None, **options):
    """Return a problem; `optimizer` and `scheduler` are functions."""
    torch.manual_seed(3)
    net = (net or Net)().double()
    made = optimizer(net)
    options.setdefault("hypergradient", None)
    return Regression(
        "net",
        module=net,
        optimizer=made,
        data=batches() if data is None else data,
        scheduler=scheduler(made) if scheduler else None,
        **options,
    )


def compiled(problems, backend, monkeypatch, *, strict=True, **options):
    """Compile with a backend object, or by name."""
    problems = problems if isinstance(problems, list) else [problems]
    with monkeypatch.context() as patch:
        if not isinstance(backend, str):
            patch.setattr(sys.modules["mlopt.compile"], "get_backend", lambda *args, given=backend: given)
            backend = "eager"
        return mlopt.compile(mlopt.Graph(problems), backend=backend, progress=False, strict=strict, **options)


def state_of(problem):
    """Everything that a step changes, copied."""
    scheduler = problem.scheduler
    return copy.deepcopy(
        {
            "module": problem.module.state_dict(),
            "optimizer": problem.optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }
    )


def assert_same_state(a, b, tolerance=1e-12):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key], tolerance)
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y, tolerance)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    elif isinstance(a, float):
        assert a == b or abs(a - b) <= 1e-12 * abs(b)
    else:
        assert a == b
