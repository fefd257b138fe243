"""Problems with quadratic losses, whose hypergradients have closed forms."""

import torch
from torch import nn

import mlopt

N = 4


class Vector(nn.Module):
    """A module that is one parameter vector."""

    def __init__(self, value):
        super().__init__()
        self.w = nn.Parameter(value)

    def forward(self):
        return self.w


def spd(seed, n=N, dtype=torch.float64):
    """A symmetric positive definite matrix with eigenvalues in [0.5, 2]."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q @ torch.diag(torch.linspace(0.5, 2, n, dtype=torch.float64)) @ q.T).to(dtype)


def matrix(seed, n=N, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(n, n, generator=generator, dtype=torch.float64).to(dtype)


class Quadratic(mlopt.Problem):
    """Loss ``w.A w / 2 + shift.w + sum_r (w.B_r r + slope_r.r + r.r / 2)`` over own w and read problems r."""

    def __init__(self, name, reads, seed, **options):
        dtype = options.pop("dtype", torch.float64)
        module = Vector(matrix(seed + 50, dtype=dtype)[0].clone())
        options.setdefault("optimizer", torch.optim.SGD(module.parameters(), lr=0.1))
        super().__init__(name, module=module, **options)
        self.A = spd(seed, dtype=dtype)
        self.shift = matrix(seed + 60, dtype=dtype)[0]
        self.B = {r: matrix(seed + 10 * (i + 1), dtype=dtype) for i, r in enumerate(reads)}
        self.slope = {r: matrix(seed + 10 * (i + 1) + 5, dtype=dtype)[0] for i, r in enumerate(reads)}

    def training_step(self, batch):
        w = self.module()
        loss = 0.5 * w @ self.A @ w + self.shift @ w
        for r, B in self.B.items():
            value = getattr(self, r)()
            loss = loss + w @ B @ value + self.slope[r] @ value + 0.5 * value @ value
        return loss


def program(spec, **options):
    """Make problems from ``{name: [names read]}``, lowest first; `options` go to every problem."""
    return [Quadratic(name, reads, 7 * i + 1, **options) for i, (name, reads) in enumerate(spec.items())]
