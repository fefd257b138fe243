"""Examples run, at a small size."""

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.helpers.extras import extras

ROOT = Path(__file__).parents[1]


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["imaml", "maml"])
def test_few_shot(method, tmp_path):
    small = ["--method", method, "--tasks", 3, "--filters", 4, "--inner-steps", 3]
    result = run(ROOT / "examples" / "imaml.py", *small, "--episodes", 4, "--out-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^\d+ +[\d.]+$", result.stdout, flags=re.MULTILINE)) == 5
    assert (tmp_path / f"{method}.png").exists()
    result = run(ROOT / "examples" / "imaml.py", *small, "--check")
    assert result.returncode == 0, result.stderr
    (difference,) = re.findall(r"relative difference ([\d.e+-]+);", result.stdout)
    assert float(difference) < 1e-8


SMALL = {
    "logistic": ("--steps", 2),
    "cleaning": ("--steps", 2),
    "longtail": ("--steps", 120),
    "pretraining": ("--steps", 205),
    "darts": ("--steps", 6, "--train-steps", 3, "--random", 1),
    "reward": ("--updates", 2),
}


@pytest.mark.parametrize("name", extras(SMALL, lambda name: name in ("darts", "reward", "longtail", "pretraining")))
def test_example(name, tmp_path):
    """It runs, prints the plan and a table, and saves its figure; the figures of the README need the whole run."""
    if name == "reward":
        pytest.importorskip("gymnasium")
    result = run(ROOT / "examples" / f"{name}.py", *SMALL[name], "--out-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mlopt plan: " in result.stdout
    *_, table = result.stdout.split("\n\n")
    assert len(re.findall(r"\d+\.\d", result.stdout[result.stdout.index(" seed(s)") :])) >= 3, table
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_own_loop():
    result = run(ROOT / "examples" / "own_loop.py", "--steps", 300)
    assert result.returncode == 0, result.stderr
    (accuracy,) = re.findall(r"test accuracy: ([\d.]+) %", result.stdout)
    assert float(accuracy) > 70 and result.stdout.count("step ") == 5


@pytest.fixture
def examples(monkeypatch):
    """Let the examples be imported, as they import each other."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield
    for name in ("lightning_loop", "hf_callback", "reweighting", "digits"):
        sys.modules.pop(name, None)


def test_lightning_loop(examples):
    """The hooks that Lightning calls, in its order; without Lightning the module is an ordinary one."""
    import lightning_loop

    module, logged = lightning_loop.make(), {}
    module.log = lambda name, value: logged.setdefault(name, []).append(float(value))
    assert module.automatic_optimization is False and module.configure_optimizers() == []
    for k in range(110):
        module.training_step(torch.tensor(k), k)
    module.validation_step(torch.tensor(0), 0)
    assert len(logged["classifier/loss"]) == 110 and len(logged["reweight/loss"]) == 2
    assert 0 < logged["accuracy"][0] <= 1
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    module.training_step(None, 0)
    expected = [p.detach().clone() for p in module.parameters()]
    module.on_load_checkpoint(checkpoint)
    module.training_step(None, 0)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), expected, strict=True))


def test_callback_beside_a_trainer(examples):
    """A loop like Trainer's steps the classifier; the callback learns the weights of its samples."""
    import digits
    import hf_callback
    import reweighting

    import mlopt

    data = digits.load(0)
    graph = reweighting.make_program(data, 0, mlopt.CG(max_steps=10, rtol=1e-3, damping=1.0))
    plan = mlopt.compile(graph, backend="eager")
    callback = hf_callback.HypergradientCallback(plan, "reweight", every=5, after=100)
    classifier, state = graph.problems["classifier"], types.SimpleNamespace(global_step=0)
    before = [p.detach().clone() for p in graph.problems["reweight"].parameters()]
    for _ in range(15):
        for batch in digits.Batches(data.train, 100, 0):
            classifier.optimizer.zero_grad()
            classifier.training_step(batch).backward()
            classifier.optimizer.step()
            state.global_step += 1
            callback.on_step_end(None, state, None)
    assert callback.num_steps == (state.global_step - 100) // 5 > 5
    moved = [
        float((p - q).detach().abs().max())
        for p, q in zip(graph.problems["reweight"].parameters(), before, strict=True)
    ]
    assert max(moved) > 1e-3


def test_every_example_is_described_and_tested():
    names = {p.stem for p in (ROOT / "examples").glob("*.py")} - {"common", "digits"}
    loops = {"own_loop", "lightning_loop", "hf_callback"}
    assert names == {*SMALL, *loops, "reweighting", "imaml"}  # the last but one is `make demo`: tests/test_readme.py
    described = (ROOT / "examples" / "README.md").read_text()
    assert all(f"]({name}.py)" in described for name in names)
