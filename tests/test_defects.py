"""Mistakes that other libraries make silently; each test fails on the wrong behaviour.

The numbers are those of a list of defects found in Betty (arXiv 2207.02849, v0.2): D1 conjugate gradients with mixed
scales, D4 optimizers rebuilt from defaults, D5 and D6 hypergradients that are silently zero, D7 two dropout masks in
one difference, D8 repeated side effects, D9 one micro-batch of several, D10 one replayed step of several, D16 and D17
wrong factors of adaptive optimizers, D18 series that diverge unnoticed, D19 enumeration of paths, D20 nested programs
refused, D21 drift of perturbed parameters, D22 tensors taken for tuples. D9, D10, D16, D17 and D19 have their tests
beside the features (`runtime/test_accumulation.py`, `runtime/test_rollback.py`, `autodiff/test_update.py`,
`planner/test_ladder.py`).
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from tests.helpers.bilevel import Classifier, compiled, make
from tests.helpers.double_backward import flat
from tests.helpers.quadratics import program


def bilevel(estimator):
    lower, upper = program({"lower": ["upper"], "upper": ["lower"]})
    lower.hypergradient = estimator
    return mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True), lower, upper


def relative_error(plan, lower, upper, damping=0.0):
    v = torch.autograd.grad(upper.training_step(None), lower.module.w)[0]
    direct = torch.autograd.grad(upper.training_step(None), upper.module.w)[0]
    H = lower.A + damping * torch.eye(len(lower.A), dtype=lower.A.dtype)
    expected = direct - lower.B["upper"].T @ torch.linalg.solve(H, v)
    return float((plan.hypergradient("upper")["w"] - expected).norm() / expected.norm())


@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
def test_d1_cg_converges_as_it_iterates(damping):
    errors = [relative_error(*bilevel(mlopt.CG(n, rtol=0.0, damping=damping)), damping) for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12
    assert relative_error(*bilevel(mlopt.CG(20, rtol=0.0, damping=damping)), damping) < 1e-12


def test_d4_the_optimizer_is_used_as_given():
    def groups(net):
        return [
            {"params": net[0].parameters(), "lr": 0.5, "weight_decay": 0.1},
            {"params": [net[2].weight], "lr": 0.001},
        ]

    torch.manual_seed(0)
    lower, upper = make()
    lower.optimizer = optimizer = torch.optim.SGD(groups(lower.module), lr=0.01, momentum=0.9)
    before = {n: p.detach().clone() for n, p in lower.module.named_parameters()}
    graph = mlopt.Graph([lower, upper])
    gradient = torch.autograd.grad(lower.training_step(lower.data[0]), list(lower.module.parameters()))
    plan = mlopt.compile(graph, progress=False, strict=True)
    plan._executor.step("classifier")
    assert lower.optimizer is optimizer
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1), (0.001, 0)]
    for (name, p), g in zip(lower.module.named_parameters(), gradient, strict=True):
        expected = {
            "0.weight": before[name] - 0.5 * (g + 0.1 * before[name]),
            "0.bias": before[name] - 0.5 * (g + 0.1 * before[name]),
            "2.weight": before[name] - 0.001 * g,
            "2.bias": before[name],  # the optimizer does not hold it
        }[name]
        torch.testing.assert_close(p.detach(), expected, msg=name)
    assert len(optimizer.state) == 3


def test_d5_d6_the_indirect_gradient_is_never_left_out():
    """No switch and no dependency list can turn it off: it is found in the losses."""
    lower, upper = make(dtype=torch.float64)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)
    assert flat(plan.hypergradient("reweight").values()).norm() > 0
    before = flat(upper.module.parameters()).detach().clone()
    plan.run(2)
    assert (flat(upper.module.parameters()) - before).norm() > 0
    with pytest.raises(mlopt.errors.GraphError, match="do not declare the upper_to_lower edge 'reweight'"):
        mlopt.compile(mlopt.Graph([lower, upper], {"u2l": {}, "l2u": {"classifier": ["reweight"]}}), progress=False)


ESTIMATORS = [
    mlopt.CG(5, damping=1.0),
    mlopt.Neumann(3, 0.5),
    mlopt.FiniteDifference(exact=False),
    mlopt.Nystrom(4, 1.0),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_d7_repeated_calls_have_no_noise(rate, estimator):
    plan, _, upper = compiled(dropout=rate, hypergradient=estimator)
    plan.run(2)
    upper_batch = upper.data[0]
    state = torch.get_rng_state()
    found = []
    for _ in range(5):
        torch.set_rng_state(state)  # the upper loss has dropout of its own
        found.append(flat(plan.hypergradient("reweight", batch=upper_batch).values()))
    assert all(torch.equal(found[0], f) for f in found)


def test_d7_the_difference_has_one_mask():
    """With two masks the difference quotient would be off by (difference of masks) / epsilon."""
    found = []
    for exact in (True, False):
        torch.manual_seed(0)
        plan, _, upper = compiled(
            dropout=0.5,
            dtype=torch.float64,
            hypergradient=mlopt.FiniteDifference(exact=exact, step=1e-5),
            classifier=Smooth,
        )
        torch.manual_seed(1)
        plan._executor.step("classifier")
        torch.manual_seed(2)
        found.append(flat(plan.hypergradient("reweight", batch=upper.data[0]).values()))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-9)


class Smooth(Classifier):
    """Weights that do not depend on a detached loss, so that derivative and difference mean the same."""

    def training_step(self, batch):
        x, y = batch
        losses = F.cross_entropy(self.module(x), y, reduction="none")
        return (self.reweight(x[:, :1]).squeeze(1) * losses).mean()


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_d8_side_effects_happen_with_real_steps_only(estimator):
    plan, lower, upper = compiled(batch_norm=True, hypergradient=estimator)
    calls = lower.num_calls, upper.num_calls
    plan.run(1)
    # One step of each problem; the upper loss runs the classifier in training mode, too.
    assert int(lower.module[1].num_batches_tracked) == 2
    plan.hypergradient("reweight")
    assert int(lower.module[1].num_batches_tracked) == 2
    plan.run(3)
    assert (lower.num_calls, upper.num_calls) == calls


def test_d18_a_diverging_series_is_noticed():
    plan, lower, upper = bilevel(mlopt.Neumann(num_terms=20, scale=1.5))  # the largest eigenvalue is 2
    with pytest.warns(mlopt.errors.SolverWarning, match="'lower'.*diverging.*scale is larger than 2 /"):
        plan.hypergradient("upper")
    assert relative_error(plan, lower, upper) > 1


def test_d20_a_middle_problem_may_be_an_upper_one():
    problems = program({"b": ["w"], "w": ["b", "u"], "u": ["w"]})
    for estimator in (mlopt.CG(), mlopt.Neumann(), mlopt.Dense(), mlopt.FiniteDifference()):
        for problem in problems:
            problem.hypergradient = estimator
        plan = mlopt.compile(mlopt.Graph(problems), progress=False, strict=True)
        assert plan.hypergradient("u")["w"].norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_d21_parameters_do_not_drift(dtype):
    """At a learning rate of zero, hypergradients by differences leave the bits of the lower parameters alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    weights = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).to(dtype)
    lower, upper = make(dtype=dtype)
    lower = Classifier(
        "classifier",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        data=lower.data,
        hypergradient=mlopt.FiniteDifference(exact=False),
    )
    upper = type(upper)(
        "reweight", module=weights, optimizer=torch.optim.SGD(weights.parameters(), lr=0.1), data=upper.data
    )
    before = [p.detach().clone() for p in net.parameters()]
    mlopt.compile(mlopt.Graph([lower, upper]), progress=False).run(50)
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_d22_a_tensor_is_a_batch():
    class Rows(mlopt.Problem):
        def training_step(self, batch):
            assert isinstance(batch, torch.Tensor)
            assert batch.shape == (5, 2)
            return self.module(batch).square().mean()

    net = nn.Linear(2, 1)
    problem = Rows("rows", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), data=[torch.ones(5, 2)])
    mlopt.compile(mlopt.Graph([problem]), progress=False, strict=True).run(2)
