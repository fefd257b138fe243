"""What the vector ops promise torch: counted writes, no silent gradients, no shared memory, capture in CUDA graphs."""

import pytest
import torch

from mlopt import ops
from mlopt.ops.reference import vector as reference

needs_extension = pytest.mark.skipif(not ops.available(), reason="the extension is not built")


def solve(n=5, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x, r, p = (torch.randn(n, generator=generator, dtype=dtype).to(device) for _ in range(3))
    return [x, r, p, 2 * p, ops.cg_init(r, torch.zeros((), dtype=dtype, device=device))]


@needs_extension
def test_writes_are_counted():
    """Autograd notices that a tensor saved for backward was changed by an op."""
    x, r, _, ap, _ = arguments = solve()
    before = [t._version for t in arguments]
    torch.ops.mlopt.cg_step_(*arguments)
    assert [t._version - b for t, b in zip(arguments, before, strict=True)] == [1, 1, 1, 0, 1]

    leaf = torch.ones(5, dtype=torch.float64, requires_grad=True)
    loss = (leaf * x).sum()
    ops.neumann_step_(x, r, ap, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
def test_native_ops_refuse_gradients():
    a, leaf = torch.ones(3), torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="mlopt::dot: not differentiable, but b requires a gradient"):
        torch.ops.mlopt.dot(a, leaf)
    with torch.no_grad():
        assert torch.ops.mlopt.dot(a, leaf) == 3


def test_wrappers_refuse_gradients_of_every_argument():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="perturb: not differentiable, but step requires a gradient"):
        ops.perturb(x, x, torch.ones((), requires_grad=True))
    x, r, p, ap, state = solve()
    with pytest.raises(ValueError, match="cg_step_: not differentiable, but ap requires a gradient"):
        ops.cg_step_(x, r, p, ap.requires_grad_(), state)


def test_scalars_have_the_accumulation_dtype():
    x, r, p, ap, state = solve()
    with pytest.raises(ValueError, match=r"cg_step_: expected state of shape \(5,\), torch.float64, cpu, got"):
        ops.cg_step_(x, r, p, ap, state.float())
    half = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"perturb: expected step of shape \(\), torch.float32, cpu, got"):
        ops.perturb(half, half, torch.ones((), dtype=torch.bfloat16))


def test_any_two_arguments_that_share_memory_are_found():
    """Also where all of them are parts of one buffer and the first one overlaps with none."""
    buffer = torch.ones(15, dtype=torch.float64)
    *_, ap, state = solve()
    x, r, p = buffer[:5], buffer[5:10], buffer[10:]
    ops.cg_step_(x, r, p, ap, state)  # apart
    with pytest.raises(ValueError, match="cg_step_: p and r share memory"):
        ops.cg_step_(x, r, buffer[9:14], ap, state)
    with pytest.raises(ValueError, match="cg_step_: ap and p share memory"):
        ops.cg_step_(x, r, p, p[:1].expand(5), state)
    singles = buffer.view(torch.float32)
    ops.neumann_step_(singles[:4], singles[4:8], torch.ones(4), 0.1)
    with pytest.raises(ValueError, match="neumann_step_: acc and v share memory"):
        ops.neumann_step_(singles[:4], singles[3:7], torch.ones(4), 0.1)


@needs_extension
def test_native_ops_refuse_shared_memory():
    x, r, _, ap, state = solve()
    with pytest.raises(RuntimeError, match="mlopt::cg_step_: r is written and shares memory with p"):
        torch.ops.mlopt.cg_step_(x, r, r, ap, state)
    with pytest.raises(RuntimeError, match="mlopt::neumann_step_: acc is written and shares memory with av"):
        torch.ops.mlopt.neumann_step_(x, r, r[:1].expand(5), 0.1)


@pytest.mark.cuda
@needs_extension
def test_a_step_replays_in_a_cuda_graph():
    """Nothing waits for the device and nothing depends on the host between the steps."""
    expected, captured = solve(100_003, device="cuda"), solve(100_003, device="cuda")
    start = [t.clone() for t in captured]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.cg_step_(*captured)  # loads the kernels
    torch.cuda.synchronize()
    for tensor, value in zip(captured, start, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.cg_step_(*captured)
    for _ in range(3):
        graph.replay()
        reference.cg_step_(*expected)
    for got, value in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-10)


@pytest.mark.cuda
@needs_extension
def test_kernels_run_on_the_current_stream():
    """Work queued before an op on the same side stream is done before it."""
    stream = torch.cuda.Stream()
    a = torch.zeros(1_000_003, device="cuda", dtype=torch.float64)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        a.fill_(1)
        total = ops.dot(a, a)
    stream.synchronize()
    assert total.item() == a.numel()
