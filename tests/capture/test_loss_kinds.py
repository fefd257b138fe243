"""Every kind of loss in the table: compiled, island or refused as stated, and its hypergradient right."""

import contextlib
import warnings
from pathlib import Path

import pytest
import torch

import mlopt
from tests.capture.loss_kinds import KINDS, Scale, classes
from tests.helpers.double_backward import flat, hypergradient
from tests.helpers.extras import extras

DOCS = Path(__file__).parents[2] / "docs" / "losses.md"
TERMS, SCALE = 4, 0.1


def upper_loss(self, batch):
    output = self.lower.module(**batch) if isinstance(batch, dict) and "input_ids" in batch else self._outputs(batch)
    output = output["logits"] if isinstance(output, dict) else output
    return (output[0] if isinstance(output, tuple) else output).square().mean()


def _outputs(self, batch):
    if batch is None:
        return self.lower.module(torch.ones(2, 4, dtype=next(self.lower.parameters()).dtype))
    if isinstance(batch, dict):
        return self.lower.module(batch["x"])
    if hasattr(batch, "x"):
        return self.lower.module(batch.x)
    if isinstance(batch, tuple | list):
        return self.lower.module(batch[0][0].x if isinstance(batch[0], list) else batch[0])
    return self.lower.module(batch)


def build(kind, dtype):
    torch.manual_seed(0)
    module, scale = kind.module().to(dtype), Scale().to(dtype)
    batch = (kind.batch or classes)(dtype)
    data = None if batch is None else [batch]
    lower_class = type("Lower", (mlopt.Problem,), {"training_step": kind.step})
    upper_class = type(
        "Upper", (mlopt.Problem,), {"training_step": kind.upper_step or upper_loss, "_outputs": _outputs}
    )
    lower = lower_class(
        "lower",
        module=module,
        optimizer=torch.optim.SGD(kind.held(module), lr=0.05),
        data=data,
        hypergradient=mlopt.Neumann(num_terms=TERMS, scale=SCALE),  # products only: no branch on curvature
    )
    upper = upper_class("upper", module=scale, optimizer=torch.optim.Adam([scale.w], lr=0.01), data=data)
    if kind.fix:
        kind.fix(lower, upper)
    return lower, upper


def expected_hypergradient(lower, upper, state, upper_state):
    """By plain double backward on the user's code, buffers and batches protected by copies."""

    def run(problem, random_state):
        torch.set_rng_state(random_state)
        batch = None if problem.data is None else problem.data[0]
        copied = torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, batch)
        if hasattr(copied, "__dataclass_fields__"):
            copied = type(copied)(**{k: v.clone() for k, v in vars(copied).items()})
        result = problem.training_step(copied)
        result = result["loss"] if isinstance(result, dict) else result
        return result.reshape(())

    def solve(hvp, v):
        term = total = v
        for _ in range(TERMS - 1):
            term = term - SCALE * hvp(term)
            total = total + term
        return SCALE * total

    theta = list(lower.trained_parameters().values())
    return hypergradient(lambda: run(lower, state), lambda: run(upper, upper_state), theta, [upper.module.w], solve)


@contextlib.contextmanager
def same_buffers(problem):
    """Put back buffers that a training_step has replaced."""
    saved = [(m, dict(m._buffers)) for m in problem.module.modules()]
    yield
    for module, buffers in saved:
        module._buffers.update(buffers)


def buffers(*problems):
    return [(b, b.clone()) for p in problems for b in p.module.buffers()]


@pytest.mark.parametrize(
    "dtype", extras([torch.float64, torch.float32], lambda dtype: dtype == torch.float32), ids=["f64", "f32"]
)
@pytest.mark.parametrize("name", KINDS)
def test_kind(name, dtype, capsys):
    kind = KINDS[name]
    lower, upper = build(kind, dtype)
    graph = mlopt.Graph([lower, upper])
    if kind.status not in ("compiled", "island"):
        with pytest.raises(getattr(mlopt.errors, kind.status), match="'lower'"):
            mlopt.compile(graph, progress=False)
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        plan = mlopt.compile(graph, progress=False, strict=kind.status == "compiled")
    said = [w for w in seen if issubclass(w.category, mlopt.errors.IslandWarning | mlopt.errors.VerificationWarning)]
    assert bool(said) == (kind.status == "island"), [str(w.message) for w in said]
    assert ("lower" in plan._report.islands) == (kind.status == "island")

    plan._executor.step("lower")
    state = plan._executor.states["lower"].samples[0].random_state
    state = torch.get_rng_state() if state is None else state.cpu
    upper_state = torch.get_rng_state()
    before = buffers(lower, upper)
    got = plan.hypergradient("upper")["w"]
    assert all(torch.equal(now, then) for now, then in before)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), same_buffers(lower):
        expected = expected_hypergradient(lower, upper, state, upper_state)
    tolerance = 1e-7 if dtype == torch.float64 else 1e-4
    if "bf16" in name:
        tolerance = 0.05
    assert torch.isfinite(expected).all() and expected.norm() > 0
    assert (flat([got]) - expected).norm() <= tolerance * expected.norm(), (got, expected)
    plan.run(2)


def test_the_docs_list_every_kind():
    """The table in the docs is this one. To write it anew: python -m tests.capture.test_loss_kinds."""
    assert DOCS.read_text() == table()


def table():
    lines = [
        "# What a loss may contain",
        "",
        "What each kind of `training_step` becomes. *compiled*: captured as a graph. *island*: the problem runs by",
        "plain autograd on its own code, with the same results; a warning quotes the line, `explain()` lists it, and",
        "`strict=True` makes it an error. Otherwise the error that refuses it. For every row a test compares the",
        "hypergradient with plain double backward (float64 to 1e-7, float32 to 1e-4), or matches the error; see",
        "`tests/capture/loss_kinds.py`.",
        "",
        "| the loss | becomes | |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {kind.status} | {kind.why} |" for name, kind in KINDS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCS.write_text(table())
