"""The solvers' loops in C++ against the same loops in Python: same bits, same outcomes, same errors."""

import signal
import threading
import time

import pytest
import torch

from mlopt import linalg, ops
from mlopt.linalg import DampedOperator, FunctionOperator, MatrixOperator, Outcome
from tests.helpers.quadratics import spd
from tests.helpers.recording import Recorder

pytestmark = pytest.mark.skipif(not ops.available(), reason="needs the native extension")


def operators(matrix):
    """The same matrix for the loop in Python and for the one in C++."""
    calls = []

    def product(v):
        calls.append(1)
        return matrix @ v

    options = {"dtype": matrix.dtype}
    python = FunctionOperator(product, len(matrix), **options)
    native = FunctionOperator(
        lambda v: pytest.fail("the loop ran in Python"), len(matrix), native=linalg.native_callback(product), **options
    )
    return python, native, calls


def assert_same(a, b):
    for name in ("value", "outcomes", "num_steps", "relative_residual"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)


def right_hand_sides(n, dtype):
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(3, n, generator=generator, dtype=torch.float64).to(dtype)
    b[1] = 0
    return {"one": b[0].contiguous(), "three": b, "strided": b.repeat_interleave(2, 1)[:, ::2], "none": b[:0]}


@pytest.mark.parametrize("kind", ["one", "three", "strided", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_cg_and_neumann(kind, dtype, damping):
    n = 9
    python, native, _ = operators(spd(3, n, dtype))
    b = right_hand_sides(n, dtype)[kind]
    if damping:
        python, native = DampedOperator(python, damping), DampedOperator(native, damping)
    for options in ({"max_steps": 3, "rtol": 0.0}, {"max_steps": 50, "rtol": 1e-4}, {"check_every": 4}):
        assert_same(linalg.cg(native, b, **options), linalg.cg(python, b, **options))
    for num_terms in (1, 2, 7):
        options = {"num_terms": num_terms, "scale": 0.4}
        assert_same(linalg.neumann(native, b, **options), linalg.neumann(python, b, **options))


def test_number_of_products():
    _, native, calls = operators(spd(3, 9))
    b = right_hand_sides(9, torch.float64)["one"]
    linalg.cg(native, b, max_steps=4, rtol=0.0)
    assert len(calls) == 4
    calls.clear()
    linalg.neumann(native, b, num_terms=4, scale=0.1)
    assert len(calls) == 3


def test_outcomes():
    indefinite = torch.diag(torch.tensor([1.0, -1.0, 2.0]))
    b = torch.tensor([1.0, 1.0, 1.0])
    for matrix, expected in (
        (torch.eye(3), Outcome.CONVERGED),
        (indefinite, Outcome.BREAKDOWN),
        (torch.full((3, 3), torch.nan), Outcome.NON_FINITE),
    ):
        python, native, _ = operators(matrix)
        got = linalg.cg(native, b, max_steps=5)
        assert got.outcome is expected
        assert_same(got, linalg.cg(python, b, max_steps=5))
    _, native, _ = operators(10 * torch.eye(3))
    assert linalg.neumann(native, b, num_terms=5, scale=1.0).outcome is Outcome.DIVERGING


def test_other_operators_and_dtypes_take_the_loop_in_python():
    matrix = spd(3, 5)
    assert linalg.cg(MatrixOperator(matrix), matrix[0]).outcome is Outcome.CONVERGED
    _, _, calls = operators(matrix)
    half = FunctionOperator(
        lambda v: calls.append(1) or v * 2,
        5,
        dtype=torch.bfloat16,
        native=linalg.native_callback(lambda v: pytest.fail("there are no kernels for bfloat16")),
    )
    linalg.cg(half, torch.ones(5, dtype=torch.bfloat16), max_steps=2)
    assert calls


def test_errors_come_back_as_python_exceptions():
    b = torch.ones(4, dtype=torch.float64)

    def fail(v):
        raise KeyError("from the product")

    def operator(function):
        return FunctionOperator(function, 4, dtype=torch.float64, native=linalg.native_callback(function))

    with pytest.raises(KeyError, match="from the product"):
        linalg.cg(operator(fail), b)
    with pytest.raises(KeyError, match="from the product"):
        linalg.neumann(DampedOperator(operator(fail), 1.0), b, num_terms=3, scale=0.1)
    with pytest.raises(RuntimeError, match=r"expected ap of shape \[4\], got \[3\]$"):
        linalg.cg(operator(lambda v: v[:3].clone()), b)
    with pytest.raises(RuntimeError, match="shares memory"):
        linalg.cg(operator(lambda v: v), b)
    with pytest.raises(RuntimeError, match="[Uu]nable to cast"):
        linalg.cg(operator(lambda v: None), b)


def test_products_build_no_autograd_graph():
    weight = torch.ones(4, requires_grad=True)
    seen = []

    def product(v):
        seen.append(torch.is_grad_enabled())
        return v * weight

    native = FunctionOperator(product, 4, native=linalg.native_callback(product))
    value = linalg.cg(native, torch.arange(4.0), max_steps=2).value
    assert not value.requires_grad and not any(seen)


def test_ctrl_c_ends_a_loop():
    def slow(v):
        time.sleep(0.01)
        return v * 1.0

    native = FunctionOperator(slow, 4, native=linalg.native_callback(slow))
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    # Shells start background jobs with the signal ignored, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            linalg.neumann(native, torch.ones(4), num_terms=2000, scale=1e-3)
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_run_during_a_loop():
    """A callback takes the GIL only for itself; what is native does not hold it."""
    counted = []
    stop = threading.Event()

    def count():
        while not stop.is_set():
            counted.append(1)
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    _, native, _ = operators(spd(3, 9))
    for _ in range(50):
        linalg.neumann(native, torch.ones(9, dtype=torch.float64), num_terms=200, scale=0.1)
    stop.set()
    thread.join()
    assert len(counted) > 3


def kernel(n):
    """A native operator that can be recorded, damped, and the same as a matrix."""
    import mlopt._C

    x = torch.randn(2 * n, n, dtype=torch.float64)
    native = mlopt._C.GlmOperator(x, "diagonal", x.new_ones(2 * n, 1), torch.arange(n)[None], n, False, None)
    linear = FunctionOperator(lambda v: pytest.fail("the loop ran in Python"), n, dtype=x.dtype, native=native)
    return DampedOperator(linear, 0.1), x.T @ x + 0.1 * torch.eye(n, dtype=x.dtype)


@pytest.mark.parametrize("kind", ["one", "three"])
def test_steps_are_recorded_once_per_solve(kind, monkeypatch):
    """The first step runs as it is, the second is recorded, and it and the others are replayed."""
    operator, matrix = kernel(9)
    b = right_hand_sides(9, torch.float64)[kind]
    plain = linalg.cg(operator, b, max_steps=6, rtol=0.0), linalg.neumann(operator, b, num_terms=7, scale=1e-3)
    recorder = Recorder()
    monkeypatch.setattr(ops, "recorder_for", lambda device: recorder)
    for _ in range(2):
        recorder.num_recorded = recorder.num_replayed = 0
        recorded = linalg.cg(operator, b, max_steps=6, rtol=0.0), linalg.neumann(operator, b, num_terms=7, scale=1e-3)
        for got, expected in zip(recorded, plain, strict=True):
            assert_same(got, expected)
        assert (recorder.num_recorded, recorder.num_replayed) == (2, 10)
    full = linalg.cg(operator, b, max_steps=50, rtol=1e-12)
    torch.testing.assert_close(full.value, b @ torch.linalg.inv(matrix), rtol=1e-8, atol=1e-10)


def test_what_is_not_recorded(monkeypatch):
    """Functions in Python, loops of a few steps, and whatever the recorder cannot record: these run as they are."""
    operator, _ = kernel(9)
    _, callback, _ = operators(spd(3, 9))
    b = right_hand_sides(9, torch.float64)["one"]
    for solved, fails, recorded in (
        (lambda: linalg.cg(callback, b, max_steps=6), False, 0),
        (lambda: linalg.cg(operator, b, max_steps=3), False, 0),
        (lambda: linalg.neumann(operator, b, num_terms=4, scale=1e-3), False, 0),
        (lambda: linalg.cg(operator, b, max_steps=6, rtol=0.0), True, 1),
    ):
        plain, recorder = solved(), Recorder(fails=fails)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "recorder_for", lambda device, given=recorder: given)
            assert_same(solved(), plain)
        assert (recorder.num_recorded, recorder.num_replayed) == (recorded, 0)


def test_what_recording_raises_comes_back(monkeypatch):
    operator, _ = kernel(9)

    class Interrupted:
        def record(self, body):
            raise KeyboardInterrupt

    monkeypatch.setattr(ops, "recorder_for", lambda device: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        linalg.cg(operator, torch.ones(9, dtype=torch.float64), max_steps=6)
