"""Recording of native loops as CUDA graphs: what torch is asked for, and, with a GPU, that results are the same."""

import contextlib
import threading
import types

import pytest
import torch

import mlopt
from mlopt import linalg, ops
from mlopt.backends import inductor
from mlopt.ops import recorder as module
from mlopt.ops.recorder import CudaGraphRecorder, recorder_for
from tests.helpers.recording import Recorder


class Cuda:
    """Stands for what the recorder uses of ``torch.cuda``; writes down what it is asked for."""

    def __init__(self):
        self.log, self.capturing, self.broken = [], False, False
        cuda = self

        class Stream:
            def __init__(self, name):
                self.name = self.cuda_stream = name

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

        class CUDAGraph:
            num = 0

            def __init__(self):
                CUDAGraph.num += 1
                self.num = CUDAGraph.num

            def capture_begin(self, pool, capture_error_mode):
                assert capture_error_mode == "thread_local"
                cuda.capturing = True
                cuda.log.append(f"begin {self.num} with {pool}")

            def capture_end(self):
                cuda.capturing = False
                cuda.log.append("end")
                if cuda.broken:
                    raise RuntimeError("operation failed due to a previous error during capture")

            def replay(self):
                cuda.log.append(f"replay {self.num}")

        @contextlib.contextmanager
        def stream(which):
            self.log.append(f"on {which.name}")
            try:
                yield
            finally:
                self.log.append(f"off {which.name}")

        self.current = Stream("current")
        self.module = types.SimpleNamespace(
            CUDAGraph=CUDAGraph,
            Stream=lambda device: Stream("side"),
            stream=stream,
            device=lambda device: contextlib.nullcontext(),
            current_stream=lambda device=None: self.current,
            graph_pool_handle=lambda: "pool",
            current_device=lambda: 0,
            is_current_stream_capturing=lambda: self.capturing,
        )


@pytest.fixture
def cuda(monkeypatch):
    fake = Cuda()
    monkeypatch.setattr(module.torch, "cuda", fake.module)
    monkeypatch.setattr(module, "_recorders", threading.local())
    ended = lambda index, pool: fake.log.append(f"no more for {pool} of {index}")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)
    return fake


def test_a_recording_is_made_on_a_stream_of_its_own_and_shares_memory_with_the_last(cuda):
    recorder = CudaGraphRecorder(torch.device("cuda", 0))
    first = recorder.record(lambda: cuda.log.append("body"))
    begun = ["side waits for current", "on side"]
    assert cuda.log == [*begun, "begin 1 with pool", "body", "end", "off side"]
    cuda.log.clear()
    second = recorder.record(lambda: None)
    assert cuda.log == [*begun, "begin 2 with pool", "end", "off side"]
    cuda.log.clear()
    first(), second(), second()
    assert cuda.log == ["replay 1", "replay 2", "replay 2"]


def test_what_cannot_be_recorded_is_not_tried_again(cuda, caplog):
    device = torch.device("cuda")
    recorder = recorder_for(device)

    def synchronizes():
        cuda.broken = True
        raise RuntimeError("operation not permitted when stream is capturing\nwith a long trace")

    assert recorder.record(synchronizes) is None
    # Without the last call, torch's allocator would go on as if it recorded.
    assert cuda.log[-3:] == ["end", "no more for pool of 0", "off side"]
    assert recorder_for(device) is None
    (entry,) = caplog.messages
    assert entry.endswith("without CUDA graphs from now on: operation not permitted when stream is capturing")


def test_what_else_is_raised_comes_through_and_ends_the_recording(cuda):
    recorder = recorder_for(torch.device("cuda", 0))

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorder.record(interrupted)
    assert not cuda.capturing and "no more for pool of 0" in cuda.log
    assert recorder_for(torch.device("cuda", 0)) is None


def test_where_nothing_is_recorded(cuda, monkeypatch):
    assert recorder_for(torch.device("cpu")) is None
    assert recorder_for(torch.device("cuda")) is recorder_for(torch.device("cuda", 0)) is not None
    cuda.capturing = True  # by the caller
    assert recorder_for(torch.device("cuda")) is None
    cuda.capturing = False
    monkeypatch.setenv("MLOPT_CUDA_GRAPHS", "0")
    assert recorder_for(torch.device("cuda")) is None


def test_what_may_run_at_the_same_time_shares_no_memory(cuda):
    found = [recorder_for(torch.device("cuda"))]
    thread = threading.Thread(target=lambda: found.append(recorder_for(torch.device("cuda"))))
    thread.start()
    thread.join()
    cuda.current = types.SimpleNamespace(name="other", cuda_stream="other")
    found.append(recorder_for(torch.device("cuda")))
    assert None not in found and len(set(map(id, found))) == 3


def recordings(monkeypatch):
    """What the recorders of a GPU returned, in order."""
    made = []
    record = CudaGraphRecorder.record

    def noted(self, body):
        made.append(record(self, body))
        return made[-1]

    monkeypatch.setattr(CudaGraphRecorder, "record", noted)
    return made


@pytest.mark.cuda
@pytest.mark.skipif(not ops.available(), reason="the extension is not built")
@pytest.mark.parametrize("shape", [(40,), (3, 40)], ids=["one", "three"])
def test_solves_on_a_gpu(shape, monkeypatch):
    import mlopt._C

    x = torch.randn(90, 40, dtype=torch.float64, device="cuda")
    curvature, columns = x.new_ones(90, 1), torch.arange(40, device="cuda")[None]
    b = torch.randn(*shape, dtype=torch.float64, device="cuda")
    native = mlopt._C.GlmOperator(x, "diagonal", curvature, columns, 40, False, None)
    operator = linalg.FunctionOperator(lambda v: v, 40, dtype=x.dtype, device="cuda", native=native)
    operator = linalg.DampedOperator(operator, 0.1)
    solvers = (
        lambda: linalg.cg(operator, b, max_steps=20, rtol=0.0),
        lambda: linalg.neumann(operator, b, num_terms=20, scale=1e-3),
    )
    with monkeypatch.context() as patch:
        patch.setenv("MLOPT_CUDA_GRAPHS", "0")
        plain = [solve().value for solve in solvers]
    made = recordings(monkeypatch)
    for _ in range(3):
        for solve, expected in zip(solvers, plain, strict=True):
            torch.testing.assert_close(solve().value, expected, rtol=0, atol=0)
    assert len(made) == 6 and all(made)


class Ridge(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        residual = self.module(x).squeeze(-1) - y
        loss = (residual**2).mean() + (self.decay.module.weight.exp() * self.module.weight**2).sum()
        return {"loss": loss, "first": self.module.weight[0, 0]}  # a view: of the step's own values, not of the next


class Decay(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        return ((self.ridge.module(x).squeeze(-1) - y) ** 2).mean()


def outer_iterations(device, backend, **options):
    """Three outer iterations of 12 lower steps: the parameters after them, [2, 8], and the last results, [2]."""
    torch.manual_seed(0)
    modules = {name: torch.nn.Linear(8, 1, bias=False).double() for name in ("ridge", "decay")}
    batches = {name: [(torch.randn(30, 8).double(), torch.randn(30).double()) for _ in range(2)] for name in modules}
    data = {name: [tuple(t.to(device) for t in batch) for batch in made] for name, made in batches.items()}
    lower = Ridge(
        "ridge",
        module=modules["ridge"].to(device),
        optimizer=torch.optim.SGD(modules["ridge"].parameters(), lr=0.05, momentum=0.9),
        data=data["ridge"],
        unroll_steps=12,
        hypergradient=mlopt.CG(max_steps=8, rtol=0.0),
    )
    upper = Decay(
        "decay",
        module=modules["decay"].to(device),
        optimizer=torch.optim.SGD(modules["decay"].parameters(), lr=0.1),
        data=data["decay"],
    )
    plan = mlopt.compile(mlopt.Graph([lower, upper]), backend=backend, progress=False, **options)
    results = plan.run(36)["ridge"]
    parameters = [m.weight.detach().cpu().squeeze(0) for m in modules.values()]
    return torch.stack(parameters), torch.stack([results["loss"].detach().cpu(), results["first"].detach().cpu()])


@pytest.mark.skipif(inductor.missing() is not None, reason=str(inductor.missing()))
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.cuda)]
)
def test_a_program_whose_steps_and_solves_are_recorded(device, monkeypatch, tmp_path):
    """By packages: the parameters that the eager backend gives on the CPU, and the results of unrecorded packages."""
    expected, _ = outer_iterations("cpu", "eager")
    with monkeypatch.context() as patch:
        patch.setenv("MLOPT_CUDA_GRAPHS", "0")
        _, unrecorded = outer_iterations(device, "inductor", strict=True, cache_dir=tmp_path)
    made, fake = recordings(monkeypatch), Recorder()
    if device == "cpu":
        monkeypatch.setattr(ops, "recorder_for", lambda device: fake)
    got, results = outer_iterations(device, "inductor", strict=True, cache_dir=tmp_path)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(results, unrecorded, rtol=1e-12, atol=1e-12)
    if device == "cpu":
        # Three times 12 lower steps and 8 of conjugate gradients. The first of each run as they are; so does the very
        # first step of the program, by itself.
        assert (fake.num_recorded, fake.num_replayed) == (6, 3 * (11 + 7) - 1)
    else:
        assert len(made) == 6 and all(made)
