"""Several Hessian products by one graph, against one at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.linalg import ROWS_AT_ONCE
from tests.helpers.extras import extras


class Lower(mlopt.Problem):
    def training_step(self, batch):
        penalty = self.upper.module.weight.exp().sum() * sum((p**2).sum() for p in self.module.parameters())
        return F.cross_entropy(self.module(batch[0]), batch[1]) + penalty


class Upper(mlopt.Problem):
    def training_step(self, batch):
        return F.cross_entropy(self.lower(batch[0]), batch[1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.layer(x).mean(1))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, stride=2), nn.GELU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3)),
        ),
        (1, 8, 8),
    ),
    "attention": (Attention, (4, 8)),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 3)), (5,)),
}


def compiled(model, estimator, sizes=(6, 9)):
    torch.manual_seed(0)
    make, shape = MODELS[model]
    net, above = make().double(), nn.Linear(1, 1, bias=False).double()
    data = [(torch.randn(n, *shape, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in sizes]
    problems = [
        Lower("lower", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.01), data=data,
              hypergradient=estimator),
        Upper("upper", module=above, optimizer=torch.optim.SGD(above.parameters(), lr=0.01), data=data),
    ]  # fmt: skip
    return mlopt.compile(mlopt.Graph(problems), backend="eager", progress=False, strict=True)


@pytest.mark.parametrize("model", extras(MODELS, lambda name: name in ("attention", "dropout")))
def test_one_graph_makes_the_products(model):
    plan = compiled(model, mlopt.Nystrom(rank=7, damping=0.5))
    executor = plan._executor
    for num_steps in (1, 2):  # the second batch has another size
        plan.run(1)
        linearization = executor.linearize("lower")
        size = executor.layouts["lower"].size
        for num_rows in (1, 7, 7 * num_steps + 3):
            rows = torch.randn(num_rows, size, dtype=torch.float64)
            expected = torch.stack([linearization.hvp(row) for row in rows])
            torch.testing.assert_close(linearization.hvps(rows), expected, rtol=1e-10, atol=1e-12)
        assert linearization._rows_at_once == (7 if num_steps == 1 or len(plan._report.graphs["lower"]) == 2 else 0)


def test_estimators_say_how_many():
    assert mlopt.Nystrom(rank=7).hvps_at_once(100) == 7 and mlopt.Nystrom(rank=7).hvps_at_once(3) == 3
    assert mlopt.Dense().hvps_at_once(10) == 10 and mlopt.Dense().hvps_at_once(10**4) == ROWS_AT_ONCE
    assert mlopt.CG(preconditioner=mlopt.Nystrom(rank=4)).hvps_at_once(100) == 4
    assert mlopt.CG().hvps_at_once(100) == mlopt.Neumann().hvps_at_once(100) == 0


def test_where_nothing_is_made_at_once_there_is_no_such_graph():
    assert "hvps" not in compiled("mlp", mlopt.CG(damping=1.0))._report.graphs["lower"][0].graphs.modules()


def test_a_wrong_graph_is_noticed(monkeypatch):
    import mlopt.autodiff.linearization as linearization
    from mlopt.autodiff.rows import over_rows

    def wrong(half, num_rows):
        module = over_rows(half, num_rows)
        output = next(n for n in module.graph.nodes if n.op == "output")
        with module.graph.inserting_before(output):
            changed = module.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], 1.001))
        output.args = ((changed,),)
        module.recompile()
        return module

    monkeypatch.setattr(linearization, "over_rows", wrong)
    with pytest.raises(mlopt.errors.VerificationError, match="products at once: relative difference 1.00e-03"):
        compiled("mlp", mlopt.Nystrom(rank=7, damping=0.5))
