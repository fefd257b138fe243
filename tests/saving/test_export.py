"""Hypergradients for C++: against the plan's and against dense algebra, in Python and by the example program."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mlopt
from mlopt.backends import inductor
from mlopt.errors import SaveError
from tests.helpers import bilevel

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("export")  # one build of the program
needs_compiler = pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing()))
needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")


def trained(**options):
    torch.manual_seed(0)
    problems = bilevel.make(dtype=torch.float64, batch_norm=True, **options)
    plan = mlopt.compile(mlopt.Graph(problems), backend="eager", strict=True, progress=False)
    plan.run(3)
    return plan


def flat(gradients):
    return torch.cat([g.reshape(-1) for g in gradients.values()])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The example, built as its CMakeLists.txt says."""
    build = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (
        ["cmake", "-S", ROOT / "examples" / "cpp", "-B", build, prefix],
        ["cmake", "--build", build],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "hypergradient"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    plan = trained(hypergradient=mlopt.CG(max_steps=60, rtol=1e-14, damping=1.0))
    folder = tmp_path_factory.mktemp("exported") / "hypergradient"
    plan.export_hypergradient("reweight", folder)
    return plan, folder


def assert_program_agrees(program, plan, folder, result):
    done = subprocess.run([program, folder, result], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got, expected = torch.load(result), flat(plan.hypergradient("reweight"))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)
    assert done.stdout == f"hypergradient of {len(got)} elements, norm {got.norm().item():.6g}\n"


@pytest.mark.slow
@needs_compiler
@needs_cmake
def test_the_program_computes_what_the_plan_does(program, exported, tmp_path):
    assert_program_agrees(program, *exported, tmp_path / "result.pt")


@pytest.mark.slow
@needs_compiler
@needs_cmake
@pytest.mark.parametrize(
    "estimator",
    [mlopt.CG(max_steps=3, rtol=0.1, curvature="ggn"), mlopt.Neumann(5, scale=0.1)],
    ids=["ggn", "neumann"],
)
def test_the_program_with_other_estimators(estimator, program, tmp_path):
    plan = trained(hypergradient=estimator)
    plan.export_hypergradient("reweight", tmp_path / "exported")
    assert_program_agrees(program, plan, tmp_path / "exported", tmp_path / "result.pt")


@pytest.mark.slow
@needs_compiler
def test_packages_against_dense_algebra(exported):
    """Of other inputs than those they were made of: no value is baked in."""
    plan, folder = exported
    lower, upper = plan.graph.problems.values()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*lower.module.parameters(), *upper.module.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    names = [x["name"] for x in json.loads((folder / "hypergradient.json").read_text())["inputs"]]
    live = {f"{p.name}.{key}": t.detach() for p in (lower, upper) for key, t in p.module.named_parameters()}
    assert live.keys() < set(names)
    inputs = torch.load(folder / "inputs.pt")
    moved = [live.get(name, t) for name, t in zip(names, inputs, strict=True)]
    point, hvp, mixed = (torch._inductor.aoti_load_package(str(folder / f"{n}.pt2")) for n in ("point", "hvp", "mixed"))
    direct, v, *residuals = point(*moved)
    matrix = torch.stack([hvp(*residuals, e)[0] for e in torch.eye(len(v), dtype=v.dtype)])
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    q = torch.linalg.solve(matrix + torch.eye(len(v), dtype=v.dtype), v)
    expected = direct - mixed(*residuals, q)[0]
    torch.testing.assert_close(flat(plan.hypergradient("reweight")), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(SaveError, match="draws random numbers"):
        trained(dropout=0.3).export_hypergradient("reweight", tmp_path / "a")
    with pytest.raises(SaveError, match="can be exported, got SAMA"):
        trained(hypergradient=mlopt.SAMA()).export_hypergradient("reweight", tmp_path / "a")
    with pytest.raises(SaveError, match="ReverseSteps"):
        trained(hypergradient=mlopt.Unroll(2), unroll_steps=2).export_hypergradient("reweight", tmp_path / "a")
    with pytest.raises(SaveError, match="no second-order instruction"):
        trained().export_hypergradient("classifier", tmp_path / "a")
    with pytest.raises(SaveError, match="2 micro-batches"):
        trained(gradient_accumulation=2).export_hypergradient("reweight", tmp_path / "a")
    with pytest.raises(KeyError, match="unknown problem 'upper'"):
        trained().export_hypergradient("upper", tmp_path / "a")
    assert not (tmp_path / "a").exists()
