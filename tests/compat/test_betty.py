"""Betty's scripts run with their imports changed, and end where they end with Betty."""

import ast
import json
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import mlopt
from mlopt.compat import betty
from mlopt.compat.betty import BettyWarning, Config, Engine, EngineConfig, Env, ImplicitProblem, IterativeProblem
from mlopt.compat.betty import configs as betty_configs
from mlopt.errors import GraphError, IslandWarning, ProblemError, StructureWarning
from tests.compat import running

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("MLOPT_BACKEND", "eager")
    monkeypatch.setattr(betty_configs, "_said", set())


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", running.CASES)
@pytest.mark.filterwarnings("ignore::mlopt.compat.betty.BettyWarning")
def test_scripts_end_where_betty_ends(case, double):
    """Parameters as Betty 0.1.1 leaves them, recorded by tests/compat/running.py."""
    name, options = running.CASES[case]
    recorded = json.loads(running.RECORDED.read_text())[case]
    expected = {key: torch.tensor(values) for key, values in recorded.items()}
    # Betty clips to a norm of max_norm / (norm + 1e-6).
    tolerance = 1e-6 if name == "logging_and_memory" else 1e-10
    assert running.difference(expected, running.train(name, **options)) < tolerance


@pytest.mark.parametrize("solver", ["darts", "sama", "neumann", "cg"])
@pytest.mark.filterwarnings("ignore::mlopt.compat.betty.BettyWarning")
def test_every_type_learns_the_hyperparameters(solver):
    result = running.load("hpo").main(type=solver, cg_iterations=5, neumann_iterations=20, iters=400)
    decay = result["hpo"].values
    assert bool((decay >= 1e-3).all()) and float((decay - 0.1).detach().abs().max()) > 0.02  # param_callback; it moved
    assert result["engine"].global_step == 400


def test_validation_runs_in_evaluation_mode_and_is_logged(caplog):
    caplog.set_level(logging.INFO, "mlopt.compat.betty")
    engine = running.load("quick_start").main(type="neumann", neumann_alpha=0.1)["engine"]
    assert engine.seen == [6, 12]
    assert all(p.module.training for p in engine.problems)
    text = caplog.text
    assert len(re.findall(r"\[step (6|12)\] validation.acc", text)) == 2
    assert len(re.findall(r"\[step (4|8|12)\] reweight.loss: .*reweight.acc", text)) == 3
    assert "classifier.loss" not in text  # has no log_step


def test_memory_options():
    """Four micro-batches per step, counted as global steps; epochs end every two steps of 4 of the 8 batches."""
    script = running.load("logging_and_memory")
    result = script.main(gradient_accumulation=4, iters=48)
    engine, inner = result["engine"], result["inner problem"]
    assert engine.global_step == 48 and engine.plan.num_steps == 12 and inner.count == 48
    assert inner.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert script.Inner.num_epochs >= 5
    assert inner.gradient_accumulation == 4 and inner.clip_norm == 0.5


def test_environments_and_inner_loop_start():
    result = running.load("imaml").main(iters=60)
    engine = result["engine"]
    inner, outer = engine.inner, engine.outer
    assert inner.env is outer.env is engine.env and engine.env.inner is inner
    assert inner.count == 60 and outer.count == 20
    start = running.load("imaml").make_net()
    x = torch.linspace(-2, 2, 50)[:, None]
    assert float((result["outer"](x) - start(x)).detach().abs().max()) > 0.05


def test_early_stopping_custom_steps_and_nested_metrics(caplog):
    caplog.set_level(logging.INFO, "mlopt.compat.betty")
    result = running.load("early_stopping").main()
    engine = result["engine"]
    # 0.5 is reached at the 5th validation; equal values count as improvements, as in Betty: it never stops by itself.
    assert engine.num_validations > 20 or engine.global_step < 1000
    assert "fit.errors/rmse" in caplog.text
    x = torch.eye(3)
    torch.testing.assert_close(result["fit"](x).detach().squeeze(1), torch.ones(3), atol=0.05, rtol=0.0)


def test_early_stopping_stops():
    class Worse(Engine):
        calls = 0

        def validation(self):
            self.calls += 1
            return {"score": -float(self.calls)}

    fit = tiny("fit")
    config = EngineConfig(
        train_iters=500,
        valid_step=2,
        early_stopping=True,
        early_stopping_metric="score",
        early_stopping_mode="max",
        early_stopping_tolerance=3,
    )
    engine = Worse([fit], config, {"u2l": {}, "l2u": {}})
    engine.run()
    assert engine.calls == 4 and engine.global_step == 8


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
@pytest.mark.filterwarnings("ignore::mlopt.compat.betty.BettyWarning")
def test_a_logger_that_is_not_installed(package, monkeypatch, caplog):
    """As in Betty, a warning, and the script runs; the numbers are there as messages."""
    caplog.set_level(logging.INFO, "mlopt.compat.betty")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.warns(UserWarning, match=rf"logger_type='{package}'\): numbers are not logged.*pip install {package}"):
        engine = pair(up=Config(log_step=2), logger_type=package)
    engine.run()
    assert engine.global_step == 4 and "up.loss" in caplog.text


@pytest.mark.filterwarnings("ignore::mlopt.compat.betty.BettyWarning")
def test_distributed_in_one_process_is_a_run_on_one_device(monkeypatch):
    alone, plain = pair(distributed=True), pair()
    for engine in (alone, plain):
        engine.run()
    assert torch.equal(alone.up.module.w, plain.up.module.w)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProblemError, match="there are several processes, .* without torchrun, or .* mlopt.Engine"):
        pair(distributed=True)


def test_a_loss_with_side_effects_survives(capsys):
    script = running.load("dirty")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = script.main(iters=12)
    assert any(issubclass(w.category, IslandWarning) for w in caught)  # it branches on a value
    assert len(script.STEPS) >= 12 and len(script.LOSSES) >= 1
    assert float(result["upper"].raw.abs().max()) > 0


class Vector(nn.Module):
    def __init__(self, value=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.full((2,), value))


class Tiny(ImplicitProblem):
    def training_step(self, batch):
        return self.module.w.square().sum()


class Reader(ImplicitProblem):
    def training_step(self, batch):
        return (self.low.module.w - 2).square().sum() + 0.01 * self.module.w.square().sum()


class Read(ImplicitProblem):
    def training_step(self, batch):
        return (self.module.w - self.up.module.w).square().sum()


class ReadIteratively(Read, IterativeProblem):
    pass


BATCH = [(torch.zeros(1),)]


def tiny(name, cls=Tiny, config=None, **options):
    module = Vector()
    options.setdefault("optimizer", torch.optim.SGD(module.parameters(), lr=0.1))
    options.setdefault("train_data_loader", BATCH)
    return cls(name, config or Config(), module, **options)


def pair(low=None, up=None, cls=Read, **engine):
    lower, upper = tiny("low", cls, low), tiny("up", Reader, up)
    dependencies = engine.pop("dependencies", {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}})
    if callable(dependencies):
        dependencies = dependencies(lower, upper)
    return Engine([upper, lower], EngineConfig(train_iters=4, **engine), dependencies)


def test_iterative_problems_are_unrolled():
    engine = pair(Config(unroll_steps=3), cls=ReadIteratively)
    assert engine.low.hypergradient == mlopt.Unroll(3)
    for _ in range(3):
        engine.train_step()
    # w_low = 1 after every step; d w_low / d w_up = 1 - 0.8^3 after three of them; lr 0.1.
    expected = 1 - 0.1 * (2 * (1 - 2) * (1 - 0.8**3) + 0.02)
    torch.testing.assert_close(engine.up.module.w.detach(), torch.full((2,), expected))


WARNINGS = {
    "u2l": ({"dependencies": lambda low, up: {"u2l": {}, "l2u": {low: [up]}}}, "'low' depends on 'up'"),
    "roll back": ({"low": Config(unroll_steps=2), "roll_back": True}, "all unroll_steps again"),
    "first order": ({"up": Config(first_order=False)}, "does not learn"),
    "accumulation": ({"low": Config(gradient_accumulation=2)}, "sees all of them"),
    "bf16": ({"low": Config(precision="bf16")}, "float32 on CPUs"),
    "sama": ({"low": Config(type="sama")}, "bias correction"),
    "cg": ({"low": Config(type="cg", cg_iterations=2)}, "old residual"),
    "several devices": ({"distributed": True}, "the same on one"),
    "darts": ({"low": Config(type="darts")}, "perturbed point"),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_differs_is_said_once(name, monkeypatch):
    options, text = WARNINGS[name]
    if name == "several devices":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pair(**options)
        pair(**options)
    said = [str(w.message) for w in caught if issubclass(w.category, BettyWarning)]
    assert sum(text in message for message in said) == 1, said


def test_optimizers_stay_as_they_are():
    module = Vector()
    extra = nn.Parameter(torch.ones(1))
    module.extra = extra
    optimizer = torch.optim.SGD([module.w], lr=0.25, weight_decay=0.1)
    problem = Tiny("fit", Config(), module, optimizer, None, BATCH)
    with pytest.warns(BettyWarning, match="mlopt uses the one that you made"):
        engine = Engine([problem], EngineConfig(train_iters=3), {"u2l": {}, "l2u": {}})
    engine.run()
    assert problem.optimizer is optimizer and float(extra) == 1.0


def test_the_right_hypergradient_where_an_edge_was_forgotten():
    with pytest.warns(BettyWarning, match="leaves the gradient through it out"):
        engine = pair(dependencies=lambda low, up: {"u2l": {}, "l2u": {low: [up]}})
    before = engine.up.module.w.detach().clone()
    engine.run()
    assert float((engine.up.module.w - before).detach().abs().max()) > 0.1


def test_without_dependencies_the_order_decides():
    lower, upper = tiny("low", Read), tiny("up", Reader)
    engine = Engine(problems=[lower, upper], config=EngineConfig(train_iters=2))
    assert engine.leaves == [lower] and lower.parents == [upper] and upper.children == [lower]
    assert lower.leaf and not upper.leaf


class OnlyReader(ImplicitProblem):
    def training_step(self, batch):
        return (self.low.module.w - 2).square().sum()


@pytest.mark.parametrize(
    ("dependencies", "advice"),
    [
        (
            lambda low, up: {"u2l": {low: [up]}, "l2u": {up: [low]}},
            "are 'l2u' and 'u2l' swapped in the dependencies? l2u is {lower: [upper]}, u2l {upper: [lower]}, and from "
            "the lowest on the order should be low, up",
        ),
        (
            lambda low, up: None,
            "list the lowest first, problems=[low, up], or say what is above what by dependencies="
            "{'l2u': {low: [up]}, 'u2l': {up: [low]}}",
        ),
    ],
    ids=["swapped", "none"],
)
@pytest.mark.filterwarnings("ignore::mlopt.compat.betty.BettyWarning")
def test_problems_in_the_wrong_order(dependencies, advice):
    """The advice is about the engine's arguments; the right order has no warning."""
    told = "Problem 'low' reads it, but comes later and so counts as the upper of the two; "
    low, up = tiny("low", Read, Config(unroll_steps=2)), tiny("up", OnlyReader, Config(unroll_steps=2))
    with pytest.warns(StructureWarning, match=re.escape(f"'up': its hypergradient is zero. {told}{advice}")):
        Engine([up, low], EngineConfig(train_iters=4), dependencies(low, up))
    low, up = tiny("low", Read, Config(unroll_steps=2)), tiny("up", OnlyReader, Config(unroll_steps=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", StructureWarning)
        Engine([up, low], EngineConfig(train_iters=4), {"l2u": {low: [up]}, "u2l": {up: [low]}})


def test_arguments_of_both_versions():
    problem = tiny("fit", device="cpu")
    assert problem.device.type == "cpu"
    problem = Tiny("fit", Config(), Vector(), None, None, None, {"alpha": 1})
    assert problem.extra_config == {"alpha": 1}
    fit = tiny("fit")
    engine = Engine(EngineConfig(train_iters=1), [fit], {"u2l": {}, "l2u": {}})
    assert engine.problems == [fit]


def test_problems_of_one_name_are_numbered():
    a, b = tiny("fit"), tiny("fit")
    engine = Engine([a, b], EngineConfig(train_iters=1), {"u2l": {}, "l2u": {}})
    assert engine.fit_0 is a and engine.fit_1 is b


def test_state_of_a_problem():
    engine = pair()
    state = engine.low.state_dict()
    before = engine.low.module.w.detach().clone()
    weights = {k: {n: v.clone() for n, v in s.items()} if k == "module" else s for k, s in state.items()}
    engine.run()
    engine.low.load_state_dict(weights)
    assert torch.equal(engine.low.module.w, before)
    assert engine.low.cur_batch is not None and engine.low.is_implemented("training_step") and engine.is_rank_zero()


def test_several_loaders_and_get_batch():
    class Two(ImplicitProblem):
        def training_step(self, batch):
            (x,), (y,) = batch
            return (self.module.w.sum() + x.mean() - y.mean()).square()

        def get_batch(self):
            return super().get_batch()

    problem = tiny("fit", Two, train_data_loader=([(torch.zeros(1),)], [(torch.ones(2),), (torch.zeros(2),)]))
    Engine([problem], EngineConfig(train_iters=5), {"u2l": {}, "l2u": {}}).run()
    assert problem.count == 5


ERRORS = {
    "type": (lambda: pair(Config(type="foo")), ProblemError, "is 'darts', 'sama', 'neumann' or 'cg', got 'foo'"),
    "reinforce": (lambda: pair(Config(type="reinforce")), ProblemError, "an empty function in Betty"),
    "multitask": (lambda: pair(Config(darts_multitask=True)), ProblemError, "perturbed point"),
    "precision": (lambda: pair(Config(precision="fp8")), ProblemError, "got 'fp8'"),
    "strategy": (lambda: pair(strategy="accelerate"), ProblemError, "only 'default' is supported"),
    "valid_step": (lambda: pair(valid_step=0), ProblemError, "expected an integer >= 1, got 0"),
    "logger": (lambda: pair(logger_type="x"), ProblemError, "'tensorboard', 'wandb' or 'none', got 'x'"),
    "no problems": (lambda: Engine([]), ProblemError, "no problems"),
    "no module": (
        lambda: Engine([Tiny("fit", Config(), None, None, None, BATCH)], EngineConfig(), {"u2l": {}, "l2u": {}}),
        ProblemError,
        "no module",
    ),
    "no data": (
        lambda: Engine([tiny("fit", train_data_loader=None)], EngineConfig(), {"u2l": {}, "l2u": {}}),
        ProblemError,
        "no data",
    ),
    "no optimizer": (
        lambda: Engine([tiny("fit", optimizer=None)], EngineConfig(), {"u2l": {}, "l2u": {}}),
        ProblemError,
        "argument `optimizer`",
    ),
    "cycle": (
        lambda: pair(dependencies=lambda low, up: {"u2l": {}, "l2u": {low: [up], up: [low]}}),
        GraphError,
        "has a cycle",
    ),
    "metric": (lambda: run_with_wrong_metric(), ProblemError, "validation\\(\\) returned 'loss'"),
}


def run_with_wrong_metric():
    class Validated(Engine):
        def validation(self):
            return {"loss": 1.0}

    config = EngineConfig(train_iters=2, valid_step=1, early_stopping=True, early_stopping_metric="acc")
    Validated([tiny("fit")], config, {"u2l": {}, "l2u": {}}).run()


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.filterwarnings("ignore::mlopt.compat.betty.BettyWarning")
def test_errors_say_what_to_do(name):
    call, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        call()


def test_a_problem_belongs_to_one_engine():
    fit = tiny("fit")
    Engine([fit], EngineConfig(), {"u2l": {}, "l2u": {}})
    with pytest.raises(ProblemError, match="belongs to another Engine already"):
        Engine([fit], EngineConfig(), {"u2l": {}, "l2u": {}})


def test_environments_say_what_is_missing():
    with pytest.raises(NotImplementedError, match="does not define step"):
        Env().step()


def test_the_feature_table_names_tests_that_exist():
    table = (ROOT / "docs" / "betty.md").read_text()
    names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", table)
    assert len(names) >= 40
    for path, test in names:
        functions = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)}
        assert test in functions, f"{path}::{test}"


def test_every_public_name_is_there():
    assert set(betty.__all__) >= {
        "Engine",
        "Problem",
        "ImplicitProblem",
        "IterativeProblem",
        "Config",
        "EngineConfig",
        "Env",
    }
