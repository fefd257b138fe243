"""A ladder: layers of problems, each reading every problem of the layer below; the lowest layer reads the top problem.

The number of paths from the top to the bottom is ``width ** depth``, the number of edges ``width ** 2 * depth``.
"""

from __future__ import annotations

import torch
from torch import nn

import mlopt


class Vector(nn.Module):
    """A parameter vector."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(value)

    def forward(self) -> torch.Tensor:
        return self.w


class Quadratic(mlopt.Problem):
    """``w.A w / 2 + sum_r w.B_r r``, so that hypergradients have closed forms."""

    def __init__(self, name: str, reads: list[str], size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        module = Vector(random(size))
        super().__init__(
            name,
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.0),
            hypergradient=mlopt.CG(max_steps=2 * size, rtol=1e-13),
        )
        half = random(size, size)
        self.A = torch.eye(size, dtype=torch.float64) + half @ half.T / size
        self.B = {r: random(size, size) / size for r in reads}

    def training_step(self, batch):
        w = self.module()
        loss = 0.5 * w @ self.A @ w
        for r, matrix in self.B.items():
            loss = loss + w @ matrix @ getattr(self, r)()
        return loss


def make(depth: int, width: int = 2, size: int = 4) -> mlopt.Graph:
    """Make a ladder with `depth` layers of `width` problems and one problem, "top", above them."""
    problems, below = [], ["top"]
    for layer in range(depth):
        names = [f"p{layer}_{i}" for i in range(width)]
        problems += [Quadratic(n, below, size, 100 * layer + i + 1) for i, n in enumerate(names)]
        below = names
    problems.append(Quadratic("top", below, size, 0))
    return mlopt.Graph(problems)


def by_paths(graph: mlopt.Graph) -> torch.Tensor:
    """Return the hypergradient of "top" by enumerating every path from it to the bottom, with explicit matrices."""
    problems = graph.problems
    top = problems["top"]
    w = top.module.w.detach()
    total = top.A @ w + sum(matrix @ problems[r].module.w.detach() for r, matrix in top.B.items())

    def follow(name: str, cotangent: torch.Tensor) -> torch.Tensor:
        problem = problems[name]
        q = torch.linalg.solve(problem.A, cotangent)
        parts = []
        for read, matrix in problem.B.items():
            sent = -(matrix.T @ q)
            parts.append(sent if read == "top" else follow(read, sent))
        return sum(parts)

    for read, matrix in top.B.items():
        total = total + follow(read, matrix.T @ w)
    return total
