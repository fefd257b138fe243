"""How fast are the vector ops, against torch's own operations and against a copy that moves the same bytes?

    python benchmarks/run_vector.py --device cpu [--sizes 10000,10000000] [--rows 1,8] [--out benchmarks/results]

Every op is checked before it is timed. The bound is the time of a `copy_` that moves as many bytes as the op must.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import timing
import torch

from mlopt import ops
from mlopt.ops.reference import vector as reference

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape: ours, the same in torch operations, and the vectors read and written at the least."""

    op: str
    ours: Callable[[], object]
    torch_ops: Callable[[], object]
    num_vectors: int
    check: Callable[[], None] = lambda: None  # run before and after timing


def make_cases(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Make the cases of one shape; rows = 1 means vectors [N]."""
    shape = (size,) if rows == 1 else (rows, size)
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=generator, dtype=dtype).to(device) for _ in range(3))
    step = torch.full(shape[:-1], 0.5, dtype=dtype, device=device)
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * size**0.5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}

    def torch_dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.dot(x, y) if x.ndim == 1 else torch.linalg.vecdot(x, y)

    def check_values() -> None:
        exact = (a.double() * b.double()).sum(-1).to(dtype)
        torch.testing.assert_close(ops.dot(a, b), exact, **tolerance)
        torch.testing.assert_close(ops.norm(a), a.double().norm(dim=-1).to(dtype), **tolerance)
        torch.testing.assert_close(ops.perturb(a, b, step), reference.perturb(a, b, step))

    return [
        Case("dot", lambda: ops.dot(a, b), lambda: torch_dot(a, b), 2, check_values),
        Case("norm", lambda: ops.norm(a), lambda: torch.linalg.vector_norm(a, dim=-1), 1),
        Case("perturb", lambda: ops.perturb(a, b, step), lambda: torch.addcmul(a, b, step[..., None]), 3),
        neumann_case(a.clone(), b.clone(), c),
        cg_case(a, b, c, torch_dot),
    ]


def neumann_case(v: torch.Tensor, acc: torch.Tensor, hv: torch.Tensor) -> Case:
    """A step so small that the vectors stay finite however often it is repeated."""
    scale = 1e-9

    def torch_step() -> None:
        v.sub_(hv, alpha=scale)
        acc.add_(v)

    return Case("neumann_step_", lambda: ops.neumann_step_(v, acc, hv, scale), torch_step, 5)


def cg_case(x: torch.Tensor, r: torch.Tensor, e: torch.Tensor, torch_dot: Callable[..., torch.Tensor]) -> Case:
    """A solve that never ends: p is mostly along ap, nearly orthogonal to r, so alpha is tiny and beta close to 1."""
    ours = [x.clone(), r.clone(), r + 1e6 * e, e.clone()]
    theirs = [t.clone() for t in ours]
    state = ops.cg_init(ours[1], torch.zeros(r.shape[:-1], dtype=r.dtype, device=r.device))
    rr = torch_dot(theirs[1], theirs[1])

    def torch_step() -> None:
        nonlocal rr
        x_, r_, p_, ap_ = theirs
        alpha = (rr / torch_dot(p_, ap_))[..., None]
        x_.addcmul_(p_, alpha)
        r_.addcmul_(ap_, alpha, value=-1)
        new = torch_dot(r_, r_)
        p_.mul_((new / rr)[..., None]).add_(r_)
        rr = new

    def check() -> None:
        columns = ops.CgState(state)
        assert bool((columns.status == ops.CgState.RUNNING).all()), "a row has stopped: the times would mean nothing"
        if int(columns.num_steps.max()) > 0:
            return
        ops.cg_step_(*ours, state)
        torch_step()
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)

    # p.ap: 2 vectors; x, r updates with r.r: 6; p: 3. Two sums in between forbid fewer passes.
    return Case("cg_step_", lambda: ops.cg_step_(*ours, state), torch_step, 11, check)


def run_case(case: Case, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Check and time one case."""
    case.check()
    ours = timing.measure(case.ours, device)
    torch_ops = timing.measure(case.torch_ops, device)
    case.check()
    source = torch.ones(rows * size * case.num_vectors // 2 + 1, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    copy = timing.measure(lambda: target.copy_(source), device)
    return {
        "op": case.op,
        "rows": rows,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": dataclasses.asdict(ours),
        "torch_seconds": dataclasses.asdict(torch_ops),
        "copy_seconds": dataclasses.asdict(copy),
        "torch_over_ours": torch_ops.median / ours.median,
        "ours_over_copy": ours.median / copy.median,
    }


def main() -> None:
    """Parse options, measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", default="1000,100000,10000000")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--dtypes", default="float32,float64")
    parser.add_argument("--out", type=Path, help="folder for the JSON results; default: print only")
    options = parser.parse_args()
    device = torch.device(options.device)
    config = ops.build_config()
    if not config["extension"] or (device.type == "cuda" and config["cuda"] is None):
        parser.error(f"the extension is not built for {device.type}: {config}")

    rows_list, sizes = ([int(word) for word in text.split(",")] for text in (options.rows, options.sizes))
    print(f"{'op':<15}{'rows':>5}{'size':>10} {'dtype':<9}{'us':>10}{'+-':>8}{'torch/ours':>12}{'ours/copy':>11}")
    results = []
    for dtype in (DTYPES[name] for name in options.dtypes.split(",")):
        for rows in rows_list:
            for size in sizes:
                with torch.no_grad():
                    for case in make_cases(rows, max(1, size // rows), dtype, device):
                        result = run_case(case, rows, max(1, size // rows), dtype, device)
                        results.append(result)
                        print_row(result)
    if options.out is not None:
        record = {"environment": timing.environment(device), "build": config, "results": results}
        print(f"written: {timing.write_results(options.out, device, record)}")


def print_row(result: dict) -> None:
    """Print one line of the table; +- is half the distance of the quartiles."""
    seconds = result["seconds"]
    median, half_spread = seconds["median"] * 1e6, (seconds["upper"] - seconds["lower"]) * 0.5e6
    print(
        f"{result['op']:<15}{result['rows']:>5}{result['size']:>10} {result['dtype']:<9}{median:>10.1f}"
        f"{half_spread:>8.1f}{result['torch_over_ours']:>12.2f}{result['ours_over_copy']:>11.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
