"""Native programs of steps that fail, are interrupted, or are not to be used any more; and what they leave behind."""

import copy
import gc
import importlib
import itertools
import warnings
import weakref

import pytest
import torch
from torch import nn

import mlopt
from mlopt import ops
from mlopt.errors import SolverWarning, StateError
from mlopt.runtime.lowered_update import CompiledUpdate
from tests.helpers.packages import PackageBackend
from tests.helpers.twins import CG, Head, Twins, assert_same, batches, make

pytestmark = pytest.mark.skipif(not ops.available(), reason="the native extension is not built")


@pytest.mark.parametrize("what", ["module", "parameter", "buffer"])
def test_replaced_parts_are_the_same_errors_as_before(what, monkeypatch):
    twins = Twins(make, monkeypatch)
    twins.step(5)
    errors = []
    for plan, problems in ((twins.plan, twins.ours), (twins.reference, twins.theirs)):
        module = problems[1].module
        if what == "module":
            problems[1].module = Head(0.0)
        elif what == "parameter":
            module.rates = nn.Parameter(module.rates.detach().clone())
        else:
            module.one = module.one.clone()
        with pytest.raises(StateError) as caught:
            plan.step()
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert_same(twins.plan.state_dict(), twins.reference.state_dict())


def test_changing_over_from_eager_graphs(monkeypatch):
    """The upper problem changes over first; its programs need both."""
    monkeypatch.setattr("mlopt.compiler.background_backend", lambda *args: PackageBackend())
    twins = Twins(make, monkeypatch, "eager")
    assert twins.step(4) == 0
    warm = [plan.warm_up() for plan in (twins.plan, twins.reference)]
    for each in warm:
        accept = each._accept
        calls = itertools.count()
        each._accept = lambda name, *rest, accept=accept, calls=calls: (
            None if name == "lower" and next(calls) == 0 else accept(name, *rest)
        )
        each.wait()
        assert each.poll()
    assert twins.step(4) == 0
    for each in warm:
        assert each.poll()
    assert twins.step(4) == 2


def state_before_a_step(plan):
    """Return the state with the next batch of the upper problem fetched, as a step that is not made leaves it."""
    plan._executor.next_batches("upper", 1)
    plan._executor.states["upper"].stream.take_restart()
    return plan.state_dict()


def fail_at(backend, call, error):
    """Let one call of a package fail, counted from now on."""
    calls = itertools.count()

    def before(inputs):
        if next(calls) == call:
            raise error

    backend.before = before


def test_a_package_that_fails(monkeypatch):
    """Nothing was changed, and the step is made in the usual way: gradient, primal, three products, mixed, update."""
    backends = [PackageBackend(), PackageBackend()]
    twins = Twins(make, monkeypatch, backends)
    twins.plan._rounds.run = lambda limit: None
    twins.step(5)
    steps = twins.plan._executor.native
    native = steps.step
    for call in range(7):

        def step(*args, call=call):
            before = twins.plan.state_dict()
            fail_at(backends[0], call, RuntimeError("of the machine"))
            outcome = native(*args)
            backends[0].before = lambda inputs: None
            assert outcome is None
            assert_same(twins.plan.state_dict(), before)
            return outcome

        steps.step = step
        assert twins.step() == 0
        steps.step = native
        assert twins.step() == 0  # it is left aside from now on
        steps._programs._known.clear()
        assert twins.step(3) == 1


def test_ctrl_c_leaves_everything_as_it_was(monkeypatch):
    backends = [PackageBackend(), PackageBackend()]
    twins = Twins(make, monkeypatch, backends)
    twins.step(5)
    for call in range(7):
        before = state_before_a_step(twins.plan)
        fail_at(backends[0], call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            twins.plan._executor.step("upper")
        assert_same(twins.plan.state_dict(), before)
        backends[0].before = lambda inputs: None
        assert twins.step() == 1


def test_packages_that_have_failed_are_not_used_any_more(monkeypatch):
    """The eager graph runs from then on, and has other bits than machine code."""
    backends = [PackageBackend(), PackageBackend()]
    twins = Twins(make, monkeypatch, backends)
    assert twins.step(5) > 0
    for backend, plan in zip(backends, (twins.plan, twins.reference), strict=True):
        fail_at(backend, 1, RuntimeError("of the machine"))
        plan.hypergradient("upper")
        backend.before = lambda inputs: None
        assert "its package failed: of the machine" in plan.explain()
    assert twins.step(3) == 0


@pytest.mark.parametrize(
    ("estimator", "rate", "said"),
    [
        (mlopt.CG(max_steps=3), -2.0, "breakdown"),
        (mlopt.Neumann(num_terms=8, scale=0.1), 50.0, "diverging"),
        (CG, float("nan"), "non finite"),
    ],
    ids=["breakdown", "diverging", "non-finite"],
)
def test_solves_that_end_badly_are_told_of(estimator, rate, said, monkeypatch):
    """Once; where warnings are errors, no step was made."""
    twins = Twins(lambda: make(estimator=estimator), monkeypatch)
    assert twins.step(5) > 0

    def spoil(plan, problems):
        problems[1].module.rates.data.fill_(rate)

    twins.each(spoil)
    before = state_before_a_step(twins.plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SolverWarning)
        with pytest.raises(SolverWarning, match=said):
            twins.plan._executor.step("upper")
    assert_same(twins.plan.state_dict(), before)
    twins.plan._executor._warned.clear()
    assert twins.step(2) == 2
    assert said in twins.said


def test_results_are_plain_tensors(monkeypatch):
    """They stay what they were, and parameters are written as autograd has to know."""
    twins = Twins(make, monkeypatch)
    twins.step(5)
    module = twins.ours[1].module
    versions = [p._version for p in (module.rates, module.scale, module.one)]
    recorded = (module.scale * module.rates).sum()
    results = twins.plan.step()["upper"]
    assert not any(v.requires_grad for v in results.values() if torch.is_tensor(v))
    assert [p._version for p in (module.rates, module.scale, module.one)] == [v + 1 for v in versions]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        recorded.backward()
    before = copy.deepcopy(results)
    assert results["scale"] == module.last_scale != module.scale
    twins.plan.step()
    assert_same(results, before)
    (module.scale * 2).backward()
    assert float(module.scale.grad) == 2


class Fresh:
    """Batches that nobody else holds; remembers which are alive."""

    def __init__(self):
        self.made = []

    def __iter__(self):
        while True:
            x, y = batches([8])[0]
            self.made.append(weakref.ref(x))
            yield x, y


def test_programs_keep_no_batches(monkeypatch):
    data = []

    def fresh():
        data.append(Fresh())
        return data[-1]

    twins = Twins(lambda: make(data=fresh), monkeypatch)
    twins.plan.run(8)
    assert twins.num_native > 0
    gc.collect()
    for each in data[:2]:
        assert len(each.made) >= 8
        assert all(ref() is None for ref in each.made[:6])


def test_plans_can_be_saved_after_native_steps(tmp_path, monkeypatch):
    twins = Twins(make, monkeypatch)
    assert twins.step(5) > 0
    twins.plan.save(tmp_path / "plan")
    assert twins.step(2) == 2


def test_values_are_written_as_they_were_at_the_end(monkeypatch):
    """Whether they are computed or are other tensors that are written."""
    program = importlib.import_module("mlopt._C").Program(3)
    a, b, c = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0])
    total = program.add_sum(0, -1.0, 1)
    program.write(1, a)
    program.write(0, b.view(2, 1))
    program.write(total, c.expand(1).new_zeros(2))
    made = program.run([a, b, c], [0, 1, 2, total], None)
    assert (a.tolist(), b.tolist()) == ([1, 2], [3, 4])  # not yet
    made.write()
    assert (a.tolist(), b.tolist()) == ([3, 4], [1, 2])
    assert [v.tolist() for v in made.values] == [[1, 2], [3, 4], [5], [-2, -2]]
    assert made.values[2].data_ptr() == c.data_ptr()


def test_an_update_that_is_given_up(monkeypatch):
    """The optimizer's own step takes over."""
    twins = Twins(make, monkeypatch)
    twins.step(5)
    for plan in (twins.plan, twins.reference):
        (derivatives,) = plan._report.graphs["upper"]
        assert isinstance(derivatives.update, CompiledUpdate)
        derivatives.update.give_up("for a test")
    assert twins.step(3) == 0
