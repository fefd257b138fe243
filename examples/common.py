"""What the examples share: options, splits, tables."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")

Data = tuple[torch.Tensor, torch.Tensor]


def parser(description: str | None, out_dir: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every example."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=0, help="(first) seed; default %(default)s")
    made.add_argument("--seeds", type=int, default=1, help="number of seeds; prints mean and spread")
    made.add_argument("--backend", choices=["auto", "eager", "inductor"], default="eager", help="what runs the graphs")
    made.add_argument("--out-dir", type=Path, default=Path(out_dir), help="default %(default)s")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, make the output folder, and use one thread: the matrices are small."""
    args = made.parse_args()
    if args.seeds < 1:
        made.error("--seeds must be at least 1")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return args


def read(data_dir: Path, name: str) -> dict[str, np.ndarray]:
    """Return the arrays of ``name.npz`` in a folder."""
    with np.load(data_dir / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def split(x: torch.Tensor, y: torch.Tensor, sizes: Sequence[int], seed: int) -> list[Data]:
    """Return disjoint random parts of these sizes, and what is left."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([*sizes, len(x) - sum(sizes)])
    return [(x[part], y[part]) for part in parts]


def mean(values: Sequence[float], digits: int = 1) -> str:
    """Print a mean, and with several values the standard deviation and the extremes."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} +- {statistics.stdev(values):.{digits}f}  ({min(values):.{digits}f} to {max(values):.{digits}f})"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text under a title."""
    widths = [max(len(row[k]) for row in [columns, *rows]) for k in range(len(columns))]
    print(f"\n{title}")
    for row in (columns, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
