"""Changing over from eager graphs to compiled ones in the middle of a run; the backend is a stand-in.

The real one is in tests/backends/test_inductor.py.
"""

import dataclasses
import threading
import warnings

import pytest
import torch

import mlopt
from mlopt.backends import EagerBackend, Lowering
from mlopt.errors import BackendWarning, VerificationError, VerificationWarning
from tests.helpers import bilevel
from tests.helpers.double_backward import flat


class Counted:
    """An eager graph that says it is compiled, counts its calls, and may be wrong."""

    is_kernel = False

    def __init__(self, inner, backend):
        self.inner, self.backend = inner, backend
        self.lowering = Lowering("inductor", "compiled in 1 s")

    def __call__(self, *arguments):
        self.backend.num_calls += 1
        outputs = self.inner(*arguments)
        if self.backend.factor == 1.0:
            return outputs
        return [x * self.backend.factor if torch.is_tensor(x) and x.is_floating_point() else x for x in outputs]

    def native_operator(self, arguments, hole):
        return None

    def native_steps(self, arguments, changing):
        return None


class Backend(EagerBackend):
    """Compiles when it is told to."""

    name = "stand-in"

    def __init__(self, *, factor=1.0, error=None):
        self.factor, self.error = factor, error
        self.go = threading.Event()
        self.cancelled = None
        self.num_calls = 0
        self.sealed = False

    def prepare(self, modules, progress=None):
        while not self.go.wait(0.01):
            if self.cancelled.is_set():
                return
        if self.error is not None:
            raise self.error

    def seal(self):
        self.sealed = True

    def lower(self, module):
        return Counted(super().lower(module), self)


@pytest.fixture
def use(monkeypatch):
    def install(backend):
        def make(cache_dir, cancelled):
            if isinstance(backend, Backend):
                backend.cancelled = cancelled
            return backend

        monkeypatch.setattr("mlopt.compiler.background_backend", make)
        return backend

    return install


def make(**options):
    torch.manual_seed(0)
    lower, upper = bilevel.make(dropout=0.2, batch_norm=True, dtype=torch.float64, unroll_steps=2)
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend="eager", progress=False, **{"strict": True, **options})
    return plan, lower, upper


def backends(plan):
    return {
        lowering.backend
        for captures in plan._report.graphs.values()
        for derivatives in captures
        for lowering in derivatives.lowerings().values()
    }


class Release(mlopt.Callback):
    """Lets the backend finish after some steps, and waits for it."""

    def __init__(self, backend, step):
        self.backend, self.step = backend, step
        self.calls = []

    def on_step_end(self, engine, results):
        self.calls.append(self.backend.num_calls)
        if engine.step == self.step:
            self.backend.go.set()
            engine._warming.wait(30)


def test_changes_over_between_steps_with_the_same_numbers(use):
    expected = make()
    expected[0].run(12)
    plan, *problems = make()
    backend = use(Backend())
    release = Release(backend, 5)
    mlopt.Engine(plan, steps=12, warm_up="eager", callbacks=[release], progress=False).run()
    assert release.calls[:5] == [0] * 5  # eager until then
    assert release.calls[5] > 0 and release.calls[-1] > release.calls[6]
    assert backends(plan) == {"inductor"}
    assert backend.sealed and "graphs run by the stand-in backend" in plan.explain()
    for got, other in zip(problems, expected[1:], strict=True):
        # A step as one graph adds up in another order.
        torch.testing.assert_close(flat(got.module.parameters()), flat(other.module.parameters()), rtol=1e-12, atol=0)
        torch.testing.assert_close([*got.module.buffers()], [*other.module.buffers()], rtol=1e-12, atol=0)


def test_a_second_run_has_nothing_to_do(use):
    plan, *_ = make()
    backend = use(Backend())
    engine = mlopt.Engine(plan, steps=3, warm_up="eager", callbacks=[Release(backend, 1)], progress=False)
    engine.run()
    assert plan.warm_up() is None
    engine.run()
    assert engine.step == 3


def test_a_short_run_does_not_wait(use):
    plan, *_ = make()
    backend = use(Backend())
    mlopt.Engine(plan, steps=2, warm_up="eager", progress=False).run()
    assert backend.cancelled.is_set() and backends(plan) == {"eager"}
    assert not [t for t in threading.enumerate() if t.name == "mlopt warm-up"]
    plan.run(2)


@pytest.mark.slow
def test_an_error_in_training_ends_the_compilation(use):
    plan, *_ = make()
    backend = use(Backend())

    class Fail(mlopt.Callback):
        def on_step_end(self, engine, results):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlopt.Engine(plan, steps=5, warm_up="eager", callbacks=[Fail()], progress=False).run()
    assert backend.cancelled.is_set()


@pytest.mark.slow
def test_a_failure_is_reported_once(use):
    plan, *_ = make()
    backend = use(Backend(error=OSError("no space left")))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        mlopt.Engine(plan, steps=6, warm_up="eager", callbacks=[Release(backend, 2)], progress=False).run()
    (warning,) = [w for w in seen if w.category is BackendWarning]
    assert "compiling in the background failed (OSError: no space left); they run eagerly" in str(warning.message)
    assert backends(plan) == {"eager"} and plan.num_steps == 6


@pytest.mark.slow
def test_graphs_that_were_not_compiled_are_reported_once(use):
    class Refusing(Backend):
        def lower(self, module):
            call = super().lower(module)
            call.lowering = dataclasses.replace(Lowering("eager", "not compiled: operation foo"))
            return call

    plan, *_ = make()
    backend = use(Refusing())
    with pytest.warns(BackendWarning, match=r"7 of 7 graphs were not compiled .*\(not compiled: operation foo\)"):
        mlopt.Engine(plan, steps=6, warm_up="eager", callbacks=[Release(backend, 2)], progress=False).run()


def test_no_compiler(use):
    plan, *_ = make()
    use("no C++ compiler (g++) was found")
    with pytest.warns(BackendWarning, match=r"nothing can be compiled: no C\+\+ compiler"):
        mlopt.Engine(plan, steps=2, warm_up="eager", progress=False).run()
    assert plan.num_steps == 2


@pytest.mark.slow
def test_code_that_is_wrong_is_not_used(use):
    expected, lower, _ = make()
    expected.run(6)
    plan, got, _ = make(strict=False)
    backend = use(Backend(factor=1.01))
    with pytest.warns(
        VerificationWarning, match="'(classifier|reweight)': what was compiled in the background disagrees .* loss"
    ):
        mlopt.Engine(plan, steps=6, warm_up="eager", callbacks=[Release(backend, 2)], progress=False).run()
    assert backends(plan) == {"eager"}
    torch.testing.assert_close(flat(got.module.parameters()), flat(lower.module.parameters()), rtol=0, atol=0)
    plan, *_ = make()
    backend = use(Backend(factor=1.01))
    with pytest.raises(VerificationError, match="strict=True"):
        mlopt.Engine(plan, steps=6, warm_up="eager", callbacks=[Release(backend, 2)], progress=False).run()


def test_bad_argument():
    plan, *_ = make()
    with pytest.raises(ValueError, match="argument `warm_up`: expected 'eager' or None, got 'inductor'"):
        mlopt.Engine(plan, steps=1, warm_up="inductor")
