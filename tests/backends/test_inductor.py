"""Compiled graphs against eager ones, in float64; what is not compiled; processes that die."""

import fcntl
import logging
import os
import re
import sys
import threading

import pytest
import sympy
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mlopt
from mlopt import backends, ops
from mlopt.backends import Lowering, inductor
from mlopt.backends.inductor import backend as backend_module
from mlopt.backends.inductor import pool
from mlopt.backends.inductor.cache import Entry
from mlopt.backends.inductor.interface import Argument, Computed, Literal, Size, cut_interface
from mlopt.backends.inductor.lowered import LoweredGraph
from mlopt.backends.inductor.spec import (
    GraphSpec,
    InputSpec,
    NodeSpec,
    Ref,
    SymbolSpec,
    UnsupportedGraphError,
    sympy_symbol,
)
from mlopt.backends.inductor.worker import Job, options
from mlopt.errors import BackendWarning, VerificationWarning
from tests.helpers import bilevel

needs_compiler = pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing()))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """A cache with the packages of every program below, compiled at once and once for all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "packages"
    directory.mkdir(exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compile_into(directory, (make_mlp, make_trace, make_branching), [small_graph(), operator_graph()])
    return directory


def compile_into(directory, makes, graphs=()):
    """Compile all graphs of programs, and others, at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLOPT_COMPILE_JOBS", "2")
        collector = Collector()
        patch.setattr(sys.modules["mlopt.compile"], "get_backend", lambda *args: collector)
        for make in makes:
            train(make, "eager", None, num_steps=0)
        backends.InductorBackend(directory).prepare([*collector.modules, *graphs])


class Collector(backends.EagerBackend):
    """Keeps the graphs that it is given."""

    compiles = True

    def __init__(self):
        self.modules = []

    def prepare(self, modules, progress=None):
        self.modules += modules


@pytest.fixture(autouse=True)
def _two_processes(monkeypatch):
    monkeypatch.setenv("MLOPT_COMPILE_JOBS", "2")


def lowerings(plan):
    """(problem, graph) -> backend that runs it."""
    return {
        (name, graph): lowering.backend
        for name, (derivatives, *_) in plan._report.graphs.items()
        for graph, lowering in derivatives.lowerings().items()
    }


def make_mlp():
    """Free batch sizes (the last batch is smaller), buffers that are written, random numbers."""
    return bilevel.make(dropout=0.3, batch_norm=True, dtype=torch.float64, sizes=(12, 12, 7))


def train(make, backend, cache_dir, num_steps=6):
    torch.manual_seed(0)
    graph = mlopt.Graph(list(problems := make()))
    plan = mlopt.compile(graph, backend=backend, cache_dir=cache_dir, progress=False, strict=True)
    losses = [torch.stack([r["loss"] for r in plan.step().values()]) for _ in range(num_steps)]
    state = [t.clone() for p in problems for t in p.module.state_dict().values()]
    return plan, losses, state


def assert_same_training(make, cache_dir):
    eager, *expected = train(make, "eager", cache_dir)
    plan, *got = train(make, "inductor", cache_dir)
    assert set(lowerings(eager).values()) == {"eager"}
    assert set(lowerings(plan).values()) == {"inductor"}, plan.explain()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    return plan


@needs_compiler
def test_mlp_with_dropout_and_batch_norm_trains_as_eager_does(cache_dir):
    """Dropout: any mask but eager's would show in the first loss. The last batch is smaller: sizes are free."""
    plan = assert_same_training(make_mlp, cache_dir)
    assert {graph for _, graph in lowerings(plan)} == {"gradient", "primal", "hvp", "mixed", "step", "update"}


@needs_compiler
def test_second_compilation_of_a_program_starts_no_process(cache_dir, monkeypatch):
    monkeypatch.setattr(backend_module, "compile_jobs", lambda *args, **options: pytest.fail("compiled again"))
    plan, *_ = train(make_mlp, "inductor", cache_dir, 1)
    assert set(lowerings(plan).values()) == {"inductor"}
    assert plan.explain().count("from the cache") == len(lowerings(plan))


@needs_compiler
def test_auto_keeps_the_faster_and_remembers_it(cache_dir, monkeypatch):
    monkeypatch.delenv("MLOPT_BACKEND")
    _, *expected = train(make_mlp, "eager", cache_dir)
    plan, *got = train(make_mlp, "auto", cache_dir)
    for a, b in zip(got, expected, strict=True):  # timing a dropout graph draws no numbers
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert " us eager, " in plan.explain()
    monkeypatch.setattr(
        "mlopt.backends.inductor.choice.least_time", lambda *args, **options: pytest.fail("measured again")
    )
    again, *_ = train(make_mlp, "auto", cache_dir)
    assert lowerings(again) == lowerings(plan)


def make_conv():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    weights = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()
    data = [(torch.randn(n, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (n,))) for n in (8, 8, 5)]
    lower = bilevel.Classifier(
        "classifier",
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data=data,
        hypergradient=mlopt.Neumann(num_terms=3, scale=0.1),
        unroll_steps=2,
    )
    upper = bilevel.Reweight(
        "reweight", module=weights, optimizer=torch.optim.Adam(weights.parameters(), lr=0.01), data=data
    )
    return lower, upper


@pytest.mark.slow
@needs_compiler
def test_convolutions_with_batch_norm_train_as_eager_does(tmp_path, monkeypatch):
    """The last batch is smaller: one graph holds for both sizes, torch's own second derivatives would not."""
    compile_into(tmp_path, [make_conv])
    monkeypatch.setattr(
        backend_module, "compile_jobs", lambda *args, **options: pytest.fail("compiled during training")
    )
    assert_same_training(make_conv, tmp_path)


class ByBatchSize(bilevel.Classifier):
    def training_step(self, batch):
        return super().training_step(batch) * (2 if len(batch[0]) < 10 else 1)


def make_branching():
    lower, upper = make_mlp()
    lower.__class__ = ByBatchSize
    return lower, upper


@pytest.mark.slow
@needs_compiler
def test_training_is_not_stopped_to_compile_what_a_later_batch_needs(cache_dir, monkeypatch):
    """The last batch takes another branch of the user's Python, and is captured when it comes."""
    _, *expected = train(make_branching, "eager", cache_dir)
    torch.manual_seed(0)
    plan = mlopt.compile(mlopt.Graph(list(problems := make_branching())), backend="inductor", cache_dir=cache_dir)
    monkeypatch.setattr(
        backend_module, "compile_jobs", lambda *args, **options: pytest.fail("compiled during training")
    )
    losses = [torch.stack([r["loss"] for r in plan.step().values()]) for _ in range(6)]
    assert "captured after training had begun" in plan.explain()
    got = [losses, [t.clone() for p in problems for t in p.module.state_dict().values()]]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


class Trace(mlopt.Problem):
    def training_step(self, batch):
        w = self.module.weight
        eye = torch.eye(3, dtype=w.dtype)
        return (1 / (w + torch.trace(w) * eye + 3)).mean() + (w * w).sum() + (w * self.shift.module.weight).sum()


class Shift(mlopt.Problem):
    def training_step(self, batch):
        return (self.trace.module.weight**3).sum() + (self.module.weight**2).sum()


def make_trace():
    modules = [nn.Linear(3, 3, bias=False).double() for _ in range(2)]
    classes = zip((Trace, Shift), ("trace", "shift"), modules, strict=True)
    return [
        c(
            n,
            module=m,
            optimizer=torch.optim.SGD(m.parameters(), lr=0.01),
            hypergradient=mlopt.CG(max_steps=3, damping=1),
        )
        for c, n, m in classes
    ]


@needs_compiler
def test_second_derivatives_through_trace(cache_dir):
    """``torch.compile`` has these wrong (pytorch/pytorch#190855): it decomposes before it differentiates.

    mlopt differentiates first. The Hessian product has a size that depends on data and is left to torch.
    """
    _, *expected = train(make_trace, "eager", cache_dir)
    torch.manual_seed(0)
    problems = make_trace()
    plan = mlopt.compile(mlopt.Graph(problems), backend="inductor", cache_dir=cache_dir, progress=False, strict=True)
    found = lowerings(plan)
    assert found.pop(("trace", "hvp")) == "eager"
    assert set(found.values()) == {"inductor"}
    losses = [torch.stack([r["loss"] for r in plan.step().values()]) for _ in range(6)]
    torch.testing.assert_close(losses, expected[0], rtol=1e-9, atol=1e-11)


@needs_compiler
def test_a_package_that_computes_wrongly_is_noticed_and_not_used(cache_dir, monkeypatch):
    """Verification compares numbers: a product that is off by 1e-3 is found, named, and taken eagerly."""
    right = LoweredGraph.__call__

    def wrong(self, *arguments):
        results = right(self, *arguments)
        return [results[0] * (1 + 1e-3), *results[1:]] if len(results) == 1 else results

    monkeypatch.setattr(LoweredGraph, "__call__", wrong)
    torch.manual_seed(0)
    with pytest.warns(VerificationWarning) as caught:
        plan = mlopt.compile(mlopt.Graph(make_trace()), backend="inductor", cache_dir=cache_dir, progress=False)
    product, update = sorted(str(w.message) for w in caught)  # the update of "shift" has one result, too
    assert re.search(r"product.*the inductor backend is not", update + product)
    assert "compiled step disagrees with its optimizer's own" in update + product
    found = lowerings(plan)
    assert found["trace", "mixed"] == "eager" and found["shift", "gradient"] == "inductor"


def scaled(x, w):
    """A graph with all that is not a computed tensor among its outputs, and with a free size."""
    y = (x @ w).tanh()
    return y, x, None, x.size(0) * 2, y, (x * x).sum()


def trace_graph(function, *inputs, dynamic=True):
    mode = "symbolic" if dynamic else "fake"
    module = fx.experimental.proxy_tensor.make_fx(function, tracing_mode=mode)(*inputs)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.recompile()
    return module


def small_graph():
    return trace_graph(scaled, torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64))


def operator_graph():
    matrix = torch.randn(5, 5, dtype=torch.float64)
    return trace_graph(lambda m, v: (m @ v,), matrix, matrix[0], dynamic=False)


@pytest.fixture(scope="module")
def small(cache_dir):
    """A traced graph and its package."""
    module = small_graph()
    lowered = backends.InductorBackend(cache_dir).lower(module)
    assert lowered.lowering.backend == "inductor", lowered.lowering
    return module, lowered


def test_interface_keeps_only_computed_tensors_in_the_package():
    x, w = torch.randn(6, 4), torch.randn(4, 3)
    spec, plan = cut_interface(trace_graph(scaled, x, w))
    assert [type(o) for o in plan.outputs] == [Computed, Argument, Literal, Size, Computed, Computed]
    assert plan.outputs[0] == plan.outputs[4] and len(spec.outputs) == 2
    again, _ = cut_interface(trace_graph(scaled, x + 1, w - 1))
    assert spec.digest() == again.digest()  # no value of a tensor is in it
    other, _ = cut_interface(trace_graph(lambda x, w: scaled(x * 2, w), x, w))
    assert spec.digest() != other.digest() and spec.digest() != spec.digest("other options")
    assert spec.digest() != cut_interface(trace_graph(scaled, x.double(), w.double()))[0].digest()


@needs_compiler
@pytest.mark.parametrize("rows", [6, 2, 11, 6])
def test_all_kinds_of_outputs_and_free_sizes(small, rows):
    module, lowered = small
    x, w = torch.randn(rows, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    version = x._version
    got, expected = lowered(x, w), module(x, w)
    assert got[1] is x and got[2] is None and got[3] == 2 * rows
    assert not got[0].requires_grad and x._version == version
    for k in (0, 4, 5):
        torch.testing.assert_close(got[k], expected[k].detach(), rtol=1e-12, atol=1e-12)


@needs_compiler
def test_inputs_in_another_layout_are_copied_and_wrong_ones_run_eagerly(small, cache_dir, caplog):
    module, _ = small
    lowered = backends.InductorBackend(cache_dir).lower(module)
    x, w = torch.randn(4, 6, dtype=torch.float64).T, torch.randn(3, 8, dtype=torch.float64).T[2:6]
    torch.testing.assert_close(lowered(x, w)[0], module(x, w)[0], rtol=1e-12, atol=1e-12)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(lowered(x.float(), w.float())[0], (x.float() @ w.float()).tanh())
    assert "expected Double" in caplog.text
    assert lowered.lowering.backend == "eager" and "expected Double" in lowered.lowering.note
    torch.testing.assert_close(lowered(x, w)[0], module(x, w)[0], rtol=0, atol=0)  # eager for good


@needs_compiler
def test_sizes_that_a_package_does_not_hold_for_run_eagerly(small, cache_dir):
    module, lowered = small
    backend = backends.InductorBackend(cache_dir)
    eager = backends.EagerBackend().lower(module)
    backend.prepare([module])
    graph = backend._prepared[module]
    calls = []
    narrow = LoweredGraph(
        graph.spec,
        graph.plan,
        Entry(graph.entry.path, ("x0 + 1 <= 9",), 1.0),
        lambda *a: calls.append(1) or eager(*a),
        lowered.lowering,
    )
    w = torch.randn(4, 3, dtype=torch.float64)
    for rows, expected in ((8, 0), (9, 1), (9, 2), (8, 2), (1, 3)):  # a size of 1 is outside the traced range
        x = torch.randn(rows, 4, dtype=torch.float64)
        torch.testing.assert_close(narrow(x, w)[0], eager(x, w)[0], rtol=1e-12, atol=1e-12)
        assert len(calls) == expected


def test_sizes_are_read_from_numbers_and_multiples():
    """A tangent graph may be handed a size as a number, or only a tensor in which it occurs as a multiple."""

    module = trace_graph(lambda x: torch.cat([x, x, x, x]).sin(), torch.randn(6))
    placeholder = next(iter(module.graph.nodes))
    size = placeholder.meta["val"].size(0)
    graph = fx.Graph()
    flat, number = graph.placeholder("flat"), graph.placeholder("number")
    flat.meta["val"] = next(n for n in module.graph.nodes if n.target is torch.ops.aten.sin.default).meta["val"]
    number.meta["val"] = size
    view = graph.call_function(torch.ops.aten.view.default, (flat, [number, 4]))
    view.meta["val"] = flat.meta["val"]
    graph.output((view,))
    spec, plan = cut_interface(fx.GraphModule(nn.Module(), graph))
    assert (plan.bindings[0].argument, plan.bindings[0].dim, plan.bindings[0].factor) == (0, 0, 4)
    assert len(plan.carriers) == 1 and len(spec.inputs) == 2
    rebuilt, fakes, *_ = spec.rebuild()
    assert [str(n.target) for n in rebuilt.graph.nodes if n.op == "call_function"] == [
        "aten.sym_size.int",
        "aten.view.default",
    ]
    (out,) = rebuilt(*fakes)
    assert out.shape[1] == 4 and out.shape[0] is not None


@torch.library.custom_op("mlopt_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


double.register_fake(lambda x: torch.empty_like(x))
double.register_autograd(lambda ctx, g: double(g))


class Custom(mlopt.Problem):
    def training_step(self, batch):
        return (double(self.module.weight) ** 2).sum()


def test_a_graph_that_cannot_be_compiled_runs_eagerly_and_says_why(tmp_path):
    module = nn.Linear(3, 2).double()
    problem = Custom("custom", module=module, optimizer=torch.optim.SGD([module.weight], lr=0.1))
    backend = "inductor" if inductor.missing() is None else "eager"
    plan = mlopt.compile(mlopt.Graph([problem]), backend=backend, cache_dir=tmp_path, progress=False, strict=True)
    before = module.weight.detach().clone()
    plan.step()
    torch.testing.assert_close(module.weight, before - 0.8 * before)
    if backend == "inductor":
        assert "not compiled: custom operation mlopt_tests.double.default" in plan.explain()


@needs_compiler
@pytest.mark.parametrize(
    ("device", "reason"), [("cuda", "no toolkit"), ("xpu", "packages are for CPUs and CUDA GPUs, not for xpu")]
)
def test_devices_that_nothing_can_be_compiled_for(device, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(backend_module.toolkit, "missing", lambda: "no toolkit")
    monkeypatch.setattr(backend_module, "compile_jobs", lambda *args, **options: pytest.fail("tried"))
    backend = backends.InductorBackend(tmp_path)
    module = operator_graph()
    with FakeTensorMode():
        for node in module.graph.find_nodes(op="placeholder"):
            node.meta["val"] = torch.empty(node.meta["val"].shape, device=device)
    assert backend.lower(module).lowering == Lowering("eager", f"not compiled: {reason}")


def test_graphs_with_sizes_that_depend_on_data_are_refused():
    def function(x):
        return x.nonzero().sum(0)

    with (
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        module = trace_graph(function, torch.randn(4))
    node = next(n for n in module.graph.nodes if "nonzero" in str(n.target))
    module.graph.output_node().args = ((node.args[0], module.graph.output_node().args[0]),)
    spec, _ = cut_interface(module)  # inside a graph they are Inductor's business
    assert spec.nodes
    with pytest.raises(UnsupportedGraphError, match="depends on data"), module.graph.inserting_after(node):
        size = module.graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
        size.meta["val"] = node.meta["val"].size(0)
        module.graph.output_node().args = ((size, node),)
        cut_interface(module)


class _Dies:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)


class _Sleeps:
    """Keeps the process that unpickles it busy."""

    def __reduce__(self):
        import time

        return time.sleep, (600,)


@pytest.mark.slow
def test_processes_that_die_or_hang_cost_only_their_own_job(monkeypatch):
    monkeypatch.setenv("MLOPT_COMPILE_JOBS", "2")
    done = []
    jobs = [Job(_Dies(), (), "/none"), Job(_Sleeps(), (), "/none"), Job(None, (), "/none")]
    results = pool.compile_jobs(jobs, lambda: done.append(1), timeout=3)
    assert len(done) == 3
    assert "the compiling process ended (exit code 3)" in results[0].error
    assert "took longer than 3 s" in results[1].error
    assert "AttributeError" in results[2].error  # this one was served, by a process started anew


def test_background_jobs_end_when_they_are_cancelled(monkeypatch):
    monkeypatch.setenv("MLOPT_COMPILE_JOBS", "2")
    started, start = [], pool._start
    monkeypatch.setattr(pool, "_start", lambda *args, **options: started.append(start(*args, **options)) or started[-1])
    cancelled = threading.Event()
    timer = threading.Timer(1.0, cancelled.set)
    timer.start()
    results = pool.compile_jobs([Job(_Sleeps(), (), "/none")] * 3, lambda: None, cancelled=cancelled)
    assert [r.error for r in results] == ["it was cancelled"] * 3
    assert started and all(process.poll() is not None for process in started)


@pytest.mark.slow
@needs_compiler
def test_warm_up_changes_over_to_packages(cache_dir):
    *_, expected = train(make_mlp, "eager", cache_dir, 8)
    torch.manual_seed(0)
    problems = make_mlp()
    graph = mlopt.Graph(list(problems))
    plan = mlopt.compile(graph, backend="eager", cache_dir=cache_dir, progress=False, strict=True)
    first = plan.step()
    assert set(lowerings(plan).values()) == {"eager"} and torch.isfinite(first["classifier"]["loss"])

    class Wait(mlopt.Callback):
        def on_step_end(self, engine, results):
            if engine.step == 2:
                engine._warming.wait(300)

    mlopt.Engine(plan, steps=7, warm_up="eager", callbacks=[Wait()], progress=False).run()
    notes = [x.note for d in plan._report.graphs.values() for x in d[0].lowerings().values()]
    measured = re.compile(r"from the cache; (\d+ small products? by kernels; )?a call: ")
    assert notes and all(measured.match(note) for note in notes), notes
    got = [t for p in problems for t in p.module.state_dict().values()]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_number_of_processes(monkeypatch):
    monkeypatch.setenv("MLOPT_COMPILE_JOBS", "3")
    assert pool.num_processes() == 3
    monkeypatch.delenv("MLOPT_COMPILE_JOBS")
    assert 1 <= pool.num_processes() <= 4
    monkeypatch.setenv("MLOPT_COMPILE_JOBS", "none")
    with pytest.raises(ValueError, match="MLOPT_COMPILE_JOBS"):
        pool.num_processes()


def test_without_a_compiler_the_eager_backend_is_used(monkeypatch):
    monkeypatch.setattr(inductor, "missing", lambda: "no C++ compiler (g++) was found")
    with pytest.warns(BackendWarning, match="no C\\+\\+ compiler"):
        assert backends.get_backend("inductor").name == "eager"
    monkeypatch.delenv("MLOPT_BACKEND", raising=False)
    assert backends.get_backend("auto").name == "eager"  # asked for nothing in particular: no warning


def test_auto_is_inductor_where_it_can_be_used(monkeypatch):
    monkeypatch.delenv("MLOPT_BACKEND", raising=False)
    expected = "auto" if ops.available() and inductor.missing() is None else "eager"
    assert backends.get_backend("auto").name == expected
    monkeypatch.setenv("MLOPT_BACKEND", "eager")
    assert backends.get_backend("auto").name == "eager"
    monkeypatch.setenv("MLOPT_BACKEND", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        backends.get_backend("auto")


def test_options():
    def of(size, num_nodes, device="cpu"):
        one = InputSpec((sympy_symbol(0),), (sympy.Integer(1),), torch.float32, torch.device(device))
        node = NodeSpec("op:aten.sin.default", (Ref(0),), ())
        return dict(options(GraphSpec((SymbolSpec(size, 2, None),), (one,), (node,) * num_nodes, (1,))))

    assert of(8, 1)["cpp.threads"] == torch.get_num_threads()
    assert of(8, 200)["memory_planning"]
    assert not any("memory_planning" in of(*few) for few in ((8, 1), (1 << 20, 200), (8, 200, "cuda")))


@needs_compiler
def test_solver_loops_on_a_package_give_the_bits_of_the_loop_in_python(cache_dir, monkeypatch):
    used = []
    native_operator = LoweredGraph.native_operator
    monkeypatch.setattr(LoweredGraph, "native_operator", lambda *args: used.append(native_operator(*args)) or used[-1])
    _, *expected = train(make_mlp, "inductor", cache_dir)
    assert used and all(type(operator).__name__ == "PackageOperator" for operator in used)
    monkeypatch.setattr(LoweredGraph, "native_operator", lambda *args: None)
    _, *got = train(make_mlp, "inductor", cache_dir)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@needs_compiler
def test_a_package_as_an_operator(cache_dir):
    matrix = torch.randn(5, 5, dtype=torch.float64)
    lowered = backends.InductorBackend(cache_dir).lower(operator_graph())
    operator = lowered.native_operator([matrix, None], 1)
    v = torch.randn(10, dtype=torch.float64)[::2]
    torch.testing.assert_close(operator.apply(v), matrix @ v)
    with pytest.raises(RuntimeError, match=r"input 1 is Double of shape \[4\], expected Double of shape \[5\]"):
        operator.apply(v[:4])
