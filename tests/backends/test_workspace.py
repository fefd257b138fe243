"""Memory that native loops allocate is kept for the next ones, and is nobody else's while it is in use."""

import threading

import pytest
import torch

from mlopt import linalg, ops
from mlopt.linalg.native import run_cg

pytestmark = pytest.mark.skipif(not ops.available(), reason="the extension is not built")

KEPT_AT_MOST = 1 << 21  # kMaxKept of csrc/runtime/workspace.h


def solve(size=40, seed=0):
    """Conjugate gradients on a diagonal matrix, through a Python callback; what came of it, and the solution."""
    generator = torch.Generator().manual_seed(seed)
    diagonal = torch.rand(size, generator=generator, dtype=torch.float64) + 0.5
    b = torch.randn(size, generator=generator, dtype=torch.float64)
    x, _, _ = run_cg(linalg.native_callback(lambda v: diagonal * v), b, None, 1e-14, 3 * size, 1)
    return x, b / diagonal


def in_thread(function):
    """Run a function in a thread of its own, with lists of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_results_are_the_callers():
    """Later solves do not write into them, and take no more memory."""
    from mlopt import _C

    results = [solve(seed=seed) for seed in range(5)]
    for _ in range(20):
        solve(seed=99)
    for x, expected in results:
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)
    kept = _C.workspace_bytes()
    for _ in range(20):
        solve(seed=99)
    assert 0 < kept == _C.workspace_bytes()


def test_only_the_loops_take_from_it():
    """Tensors of the user's come from torch's allocator, as they did before."""
    from mlopt import _C

    solve()
    kept = _C.workspace_bytes()
    tensors = [torch.empty(40, dtype=torch.float64) for _ in range(50)]
    assert _C.workspace_bytes() == kept
    del tensors
    assert _C.workspace_bytes() == kept


def test_torch_is_as_it_was_after_an_error():
    from mlopt import _C

    def fail(v):
        raise ZeroDivisionError("in the product")

    with pytest.raises(ZeroDivisionError):
        run_cg(linalg.native_callback(fail), torch.ones(40), None, 1e-6, 5, 1)
    kept = _C.workspace_bytes()
    tensors = [torch.empty(40) for _ in range(10)]
    assert _C.workspace_bytes() == kept
    del tensors


def test_a_block_joins_the_thread_that_lets_go_of_it():
    from mlopt import _C

    def other():
        before = _C.workspace_bytes()
        box.clear()
        return before, _C.workspace_bytes()

    box = [solve(size=1000)[0]]
    before, after = in_thread(other)
    assert before == 0 and after >= 8000


def test_results_outlive_their_thread():
    x, expected = in_thread(solve)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)
    for seed in range(5):
        solve(seed=seed)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-12)


def test_threads_at_once():
    """Each solves on its own; a scope that ends in one does not end that of another wrongly."""
    failures = []

    def work(seed):
        for k in range(50):
            x, expected = solve(size=20 + seed, seed=k)
            if not torch.allclose(x, expected, rtol=1e-9, atol=1e-11):
                failures.append((seed, k))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    test_only_the_loops_take_from_it()


def test_what_is_kept_is_bounded():
    def fill():
        from mlopt import _C

        results = [solve(size=2000, seed=k)[0] for k in range(300)]  # 4.8 MB
        del results
        return _C.workspace_bytes()

    assert 0 < in_thread(fill) <= KEPT_AT_MOST


def test_large_and_empty_tensors_are_torchs():
    x, expected = solve(size=100_000)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-11)
    x, _ = solve(size=0)
    assert x.shape == (0,)


def test_memory_that_onednn_asks_for():
    """It gets bare pointers, and returns them inside of a loop or after it, whichever allocator they are from."""
    x = torch.randn(16, 8, 12, 12)
    inside, outside = torch.nn.Conv2d(8, 8, 3), torch.nn.Conv2d(8, 8, 3, stride=2)
    expected = inside(x), outside(x)  # memory of one, made outside
    seen = []

    def product(v):
        for _ in range(3):
            seen.append((inside(x), outside(x)))
            inside(torch.randn(17 + len(seen), 8, 12, 12))  # other sizes, so other memory that is kept
        return v * 1.0

    run_cg(linalg.native_callback(product), torch.ones(40), None, 1e-6, 5, 1)
    for k in range(20):
        inside(torch.randn(40 + k, 8, 12, 12))
    run_cg(linalg.native_callback(product), torch.ones(40), None, 1e-6, 5, 1)
    assert seen
    for got in seen:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
