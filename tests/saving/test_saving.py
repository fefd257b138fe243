"""Saved plans: the same bits in a process without the source, for every backend; what cannot be saved or loaded."""

import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlopt
from mlopt.errors import CaptureError, DataError, SaveError, StateError
from tests.helpers import bilevel
from tests.helpers.extras import extras

ROOT = Path(__file__).parents[2]
ESTIMATORS = {
    "cg": mlopt.CG(max_steps=5, damping=1.0, warm_start=True),
    "neumann": mlopt.Neumann(num_terms=4, scale=0.1),
    "nystrom": mlopt.Nystrom(rank=3, damping=1.0),
    "unroll": mlopt.Unroll(2),
    "sama": mlopt.SAMA(),
    "finite differences": mlopt.FiniteDifference(),
}


def make(estimator="cg", **options):
    torch.manual_seed(0)
    options = {"batch_norm": True, "dropout": 0.3, **options}
    return bilevel.make(hypergradient=ESTIMATORS[estimator], **options)


def compiled(problems, backend="eager"):
    return mlopt.compile(mlopt.Graph(problems), backend=backend, strict=True, progress=False)


def everything(plan):
    return [t.detach().clone() for p in plan.graph.problems.values() for t in p.module.state_dict().values()]


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def in_another_process(folder, tmp_path, *, steps):
    """Load a plan where nothing of the tests can be imported; return its hypergradient and what steps make of it."""
    code = f"""
    import sys, torch, mlopt
    assert not any("tests" in name for name in sys.modules)
    inputs = torch.load({str(tmp_path / "inputs.pt")!r})
    plan = mlopt.load({str(folder)!r}, data=inputs["data"])
    before = plan.hypergradient("reweight")
    torch.manual_seed(5)
    plan.run({steps})
    after = [t.detach() for p in plan.graph.problems.values() for t in p.module.state_dict().values()]
    torch.save({{"before": before, "after": after, "explain": plan.explain()}}, {str(tmp_path / "out.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=tmp_path, env=_environment())
    return torch.load(tmp_path / "out.pt")


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("estimator", extras(ESTIMATORS, lambda name: list(ESTIMATORS).index(name) % 3))
def test_same_bits(estimator, tmp_path):
    problems = make(estimator)
    plan = compiled(problems)
    plan.run(5)
    plan.save(tmp_path / "plan")
    # A loaded plan begins its data anew.
    data = {p.name: [p.data[i % len(p.data)] for i in range(5, 5 + len(p.data))] for p in problems}
    data["reweight"] = problems[1].data
    expected = plan.hypergradient("reweight", batch=problems[1].data[0])
    loaded = mlopt.load(tmp_path / "plan", data=data)
    assert loaded.num_steps == 5
    assert_equal(everything(loaded), everything(plan))
    assert_equal([*loaded.hypergradient("reweight").values()], [*expected.values()])
    problems[1].data[:] = problems[1].data[:1]
    position = plan._executor.states["reweight"].stream
    while position.peek().tensors[0].data_ptr() != problems[1].data[0][0].data_ptr():
        position.advance(1)
    data["reweight"] = problems[1].data[:1]
    loaded = mlopt.load(tmp_path / "plan", data=data)
    for made in (plan, loaded):
        torch.manual_seed(3)
        made.run(6)
    assert_equal(everything(loaded), everything(plan))


@pytest.mark.parametrize("backend", extras(["eager", "inductor", "auto"], lambda name: name != "auto"))
def test_in_a_process_without_the_source(backend, tmp_path):
    problems = make(dropout=0.0)
    plan = compiled(problems, backend)
    plan.run(4)
    for problem in problems:
        problem.data[:] = problem.data[:1]
    data = {p.name: p.data for p in problems}
    for state in plan._executor.states.values():
        state.stream._waiting.clear()
        state.stream._cycles[0]._iterator = None
    plan.save(tmp_path / "plan")
    torch.save({"data": data}, tmp_path / "inputs.pt")
    found = in_another_process(tmp_path / "plan", tmp_path, steps=6)
    expected = plan.hypergradient("reweight")
    assert_equal([*found["before"].values()], [*expected.values()])
    torch.manual_seed(5)
    plan.run(6)
    assert_equal(found["after"], everything(plan))
    if backend == "inductor":
        assert "from the cache" in found["explain"] and "compiled in" not in found["explain"]
        assert "not compiled" not in found["explain"]


def test_free_sizes_stay_free(tmp_path):
    plan = compiled(make(dropout=0.0, sizes=(12, 7)))
    plan.run(1)
    plan.save(tmp_path / "plan")
    x, y = bilevel.data((29,))[0]
    loaded = mlopt.load(tmp_path / "plan", data={"classifier": [(x, y)], "reweight": [(x, y)]})
    loaded.run(2)
    with pytest.raises(
        CaptureError, match=r"holds graphs for .*float64 \[12, 6\].*got float64 \[29, 6\]$|kinds of batches"
    ):
        mlopt.load(tmp_path / "plan").hypergradient("reweight", batch={"x": x, "y": y})


def test_modules_and_optimizers_may_be_handed_over(tmp_path):
    class Own(torch.optim.SGD):
        pass

    lower, upper = make(dropout=0.0)
    lower.optimizer = Own(lower.module.parameters(), lr=0.05, momentum=0.9)
    lower.scheduler = torch.optim.lr_scheduler.LambdaLR(lower.optimizer, lambda step: 1 / (1 + step))
    plan = compiled([lower, upper])
    plan.run(3)
    plan.save(tmp_path / "plan")
    with pytest.raises(SaveError, match="problem 'classifier': its optimizer .*Own is none of torch.optim; hand over"):
        mlopt.load(tmp_path / "plan")
    optimizers = {"classifier": lambda module: Own(module.parameters(), lr=1.0)}
    with pytest.raises(SaveError, match=r"had a scheduler \(LambdaLR\).*schedulers=\{'classifier'"):
        mlopt.load(tmp_path / "plan", optimizers=optimizers)
    other = make(dropout=0.0)[0].module
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    loaded = mlopt.load(
        tmp_path / "plan",
        data={"classifier": lower.data, "reweight": upper.data},
        modules={"classifier": other},
        optimizers=optimizers,
        schedulers={"classifier": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))},
    )
    assert_equal(everything(loaded), everything(plan))
    assert loaded.graph.problems["classifier"].optimizer.param_groups[0]["lr"] == 0.05 / 4
    loaded.run(1)
    assert not torch.equal(other[0].weight, lower.module[0].weight)
    with pytest.raises(SaveError, match="argument `modules`: there is no problem 'x'"):
        mlopt.load(tmp_path / "plan", modules={"x": other})


def test_tasks(tmp_path):
    torch.manual_seed(0)

    class Base(mlopt.Problem):
        def training_step(self, batch):
            x, y = batch
            near = sum(((p - q) ** 2).sum() for p, q in zip(self.parameters(), self.meta.parameters(), strict=True))
            return F.mse_loss(self(x), y) + near

    class Meta(mlopt.Problem):
        def training_step(self, batch):
            return F.mse_loss(self.base(batch[0]), batch[1])

    base, meta = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    data = [(torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(4, 5, 1, dtype=torch.float64))]
    problems = [
        Base("base", module=base, optimizer=torch.optim.Adam(base.parameters(), lr=0.1), data=data, tasks=4,
             hypergradient=mlopt.CG(max_steps=4)),
        Meta("meta", module=meta, optimizer=torch.optim.SGD(meta.parameters(), lr=0.1), data=data),
    ]  # fmt: skip
    plan = compiled(problems)
    plan.run(3)
    plan.save(tmp_path / "plan")
    loaded = mlopt.load(tmp_path / "plan", data={"base": data, "meta": data})
    assert_equal([*loaded.hypergradient("meta").values()], [*plan.hypergradient("meta").values()])
    plan.run(3)
    loaded.run(3)
    assert_equal(everything(loaded), everything(plan))


def test_half_precision(tmp_path):
    problems = make(dropout=0.0, precision="fp16", dtype=torch.float32)
    plan = mlopt.compile(mlopt.Graph(problems), backend="eager", progress=False)
    plan.run(3)
    plan.save(tmp_path / "plan")
    loaded = mlopt.load(tmp_path / "plan", data={p.name: p.data for p in problems})
    batch = problems[1].data[0]
    expected = plan.hypergradient("reweight", batch=batch)
    assert_equal([*loaded.hypergradient("reweight", batch=batch).values()], [*expected.values()])


def test_what_cannot_be_saved(tmp_path):
    class Printing(bilevel.Classifier):
        def training_step(self, batch):
            print("", end="")
            return super().training_step(batch)

    class Clipped(bilevel.Classifier):
        def param_callback(self):
            pass

    problems = bilevel.make(classifier=Printing)
    with pytest.warns(mlopt.errors.IslandWarning):
        plan = mlopt.compile(mlopt.Graph(problems), backend="eager", progress=False)
    with pytest.raises(SaveError, match="problem 'classifier' runs by plain autograd on its training_step"):
        plan.save(tmp_path / "plan")
    plan = mlopt.compile(mlopt.Graph(bilevel.make(classifier=Clipped)), backend="eager", progress=False)
    with pytest.raises(SaveError, match="problem 'classifier' overrides param_callback, which is code"):
        plan.save(tmp_path / "plan")
    assert not list(tmp_path.iterdir())


def test_a_loaded_plan_says_what_it_lacks(tmp_path):
    plan = compiled(make())
    plan.run(1)
    plan.save(tmp_path / "plan")
    loaded = mlopt.load(tmp_path / "plan")
    with pytest.raises(DataError, match=r"problem 'classifier': its data is no part .*data=\{'classifier': loader\}"):
        loaded.step()
    with pytest.raises(StateError, match="has no training_step to compare with"):
        loaded.check()
    with pytest.raises(CaptureError, match="has no training_step"):
        loaded.graph.problems["classifier"].training_step(None)


def test_saving_a_loaded_plan_again(tmp_path):
    problems = make(dropout=0.0)
    plan = compiled(problems)
    plan.run(2)
    plan.save(tmp_path / "a")
    data = {p.name: p.data for p in problems}
    mlopt.load(tmp_path / "a", data=data).save(tmp_path / "b")
    batch = problems[1].data[0]
    found = mlopt.load(tmp_path / "b").hypergradient("reweight", batch=batch)
    assert_equal([*found.values()], [*plan.hypergradient("reweight", batch=batch).values()])


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        plan = compiled(make())
        plan.run(1)
        plan.save(tmp_path / "plan")
        return tmp_path / "plan"

    def test_is_replaced_whole(self, folder, monkeypatch):
        before = (folder / "manifest.json").read_text()
        plan = compiled(make())
        plan.run(2)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
            with pytest.raises(OSError, match="no space left"):
                plan.save(folder)
        assert (folder / "manifest.json").read_text() == before
        plan.save(folder)
        assert mlopt.load(folder).num_steps == 2
        assert [p.name for p in folder.parent.iterdir()] == ["plan"]

    def test_something_else_is_not_overwritten(self, tmp_path):
        plan = compiled(make())
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").touch()
        with pytest.raises(SaveError, match="exists and is no saved plan"):
            plan.save(tmp_path / "mine")
        assert (tmp_path / "mine" / "thesis.tex").exists()

    @pytest.mark.parametrize("name", ["program.pkl", "state.pt", "problems.json"])
    def test_damage_is_noticed(self, folder, name):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(SaveError, match=f"{name} is damaged"):
            mlopt.load(folder)
        (folder / name).unlink()
        with pytest.raises(SaveError, match=f"{name} is missing"):
            mlopt.load(folder)

    def test_other_versions_and_no_plan_at_all(self, folder, tmp_path):
        manifest = json.loads((folder / "manifest.json").read_text())
        for key, match in (("torch", "saved with version of torch 1.0"), ("format", "saved with format 1.0")):
            (folder / "manifest.json").write_text(json.dumps(manifest | {key: "1.0"}))
            with pytest.raises(SaveError, match=match):
                mlopt.load(folder)
        (folder / "manifest.json").write_text("{")
        with pytest.raises(SaveError, match="manifest.json is damaged"):
            mlopt.load(folder)
        with pytest.raises(SaveError, match="is no saved plan"):
            mlopt.load(tmp_path)

    def test_nothing_of_the_user_is_in_the_program(self, folder):
        names = set()

        class Finder(pickle.Unpickler):
            def find_class(self, module, name):
                names.add(module.split(".")[0])
                return super().find_class(module, name)

            def persistent_load(self, pid):
                return None

        with (folder / "program.pkl").open("rb") as file:
            Finder(file).load()
        assert names <= {"mlopt", "torch", "builtins", "collections"}
