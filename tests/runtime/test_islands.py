"""Eager islands and guards: what could not be captured runs with the same results; what changed is not run stale."""

import logging

import pytest
import torch
import torch.nn.functional as F

import mlopt
from tests.helpers.bilevel import Classifier, compiled, make


class Printing(Classifier):
    def training_step(self, batch):
        loss = super().training_step(batch)
        print(f"loss {loss:.3f}")
        return loss


class Logging(Classifier):
    def training_step(self, batch):
        loss = super().training_step(batch)
        logging.getLogger("user").warning("loss %s", loss)
        return loss


class Branching(Classifier):
    def training_step(self, batch):
        loss = super().training_step(batch)
        return loss * 2 if loss > 0 else loss


def island(cls, **options):
    lower, upper = make(classifier=cls, **options)
    with pytest.warns(mlopt.errors.IslandWarning, match="'classifier'"):
        plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False)
    return plan, lower, upper


def test_prints_once_per_real_step(capsys):
    plan, *_ = island(Printing)
    assert capsys.readouterr().out == ""  # not while compiling
    plan.run(5)  # five steps of each problem; the upper's also run the lower's code, silently
    assert capsys.readouterr().out.count("loss ") == 5
    plan.hypergradient("reweight")
    assert capsys.readouterr().out == ""


def test_logs_once_per_real_step(caplog):
    plan, *_ = island(Logging)
    plan.run(4)
    assert sum(r.name == "user" for r in caplog.records) == 4


@pytest.mark.parametrize("estimator", [mlopt.CG(max_steps=3, damping=1.0), mlopt.FiniteDifference(exact=False)])
def test_an_island_trains_as_the_captured_program_does(estimator):
    options = {"dtype": torch.float64, "hypergradient": estimator, "batch_norm": True, "dropout": 0.2}
    torch.manual_seed(1)
    captured, *_ = compiled(**options)
    torch.manual_seed(1)
    eager, *_ = island(Printing, **options)
    for plan in (captured, eager):
        torch.manual_seed(2)
        plan.run(6)
    for name in ("classifier", "reweight"):
        a, b = (p.graph.problems[name].module.state_dict() for p in (captured, eager))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-11)


def test_islands_are_listed_and_drawn(tmp_path):
    plan, *_ = island(Branching)
    assert "eager islands" in plan.explain() and "if loss > 0" in plan.explain()
    plan.draw(tmp_path / "plan.svg")
    assert "eager island" in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize("cls", [Printing, Branching])
def test_strict_raises(cls):
    lower, upper = make(classifier=cls)
    with pytest.raises(mlopt.errors.CaptureError, match="'classifier'"):
        mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)


def test_upper_island():
    class Upper(mlopt.Problem):
        def training_step(self, batch):
            x, y = batch
            loss = F.cross_entropy(self.classifier(x), y)
            return loss if loss > 100 else loss * 3

    lower, upper = make(dtype=torch.float64)
    options = {"module": upper.module, "optimizer": upper.optimizer, "data": upper.data}
    plain = mlopt.compile(mlopt.Graph([lower, upper]), progress=False).hypergradient("reweight")
    with pytest.warns(mlopt.errors.IslandWarning, match="'reweight'"):
        plan = mlopt.compile(mlopt.Graph([lower, Upper("reweight", **options)]), progress=False)
    got = plan.hypergradient("reweight")
    for key, value in plain.items():
        torch.testing.assert_close(got[key], 3 * value, rtol=1e-10, atol=1e-12)


def test_mode_switch_is_captured_anew_and_back():
    plan, lower, _ = compiled(dropout=0.5)
    plan.run(2)
    lower.module.eval()
    first, second = (plan.hypergradient("reweight", batch=lower.data[0]) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not plan._executor.derive("classifier", plan._executor.states["classifier"].samples[0].batch).is_random
    lower.module.train()
    count = len(plan._report.graphs["classifier"])
    plan.run(2)
    assert len(plan._report.graphs["classifier"]) == count  # the graphs of training mode were kept


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda p: setattr(p, "module", torch.nn.Linear(6, 3)), "its module was replaced"),
        (lambda p: p.module.__setitem__(0, torch.nn.Linear(6, 8)), "a submodule, parameter or buffer of 'its module'"),
        (lambda p: p.module[0].register_parameter("extra", torch.nn.Parameter(torch.ones(1))), "of '0' was replaced"),
        (lambda p: p.module.double(), r"parameter '0.weight' is torch.float64 .*it was torch.float32"),
        (lambda p: p.module[0].weight.requires_grad_(False), "parameter '0.weight' is .*requires_grad=False"),
        (
            lambda p: p.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}),
            "its optimizer holds another number of parameters",
        ),
    ],
    ids=["module", "submodule", "parameter", "dtype", "frozen", "param group"],
)
def test_changed_modules_are_refused(change, text):
    plan, lower, _ = compiled()
    plan.run(1)
    change(lower)
    with pytest.raises(mlopt.errors.StateError, match=f"'classifier': .*{text}.*Call mlopt.compile"):
        plan.step()
    assert plan.num_steps == 1
