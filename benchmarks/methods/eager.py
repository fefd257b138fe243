"""What one writes by hand: double backward with ``create_graph=True``, lists of tensors, textbook solvers."""

from __future__ import annotations

import torch

from benchmarks.methods.base import FINITE_DIFFERENCE_STEP, TorchRunner, UnavailableError, cycle
from benchmarks.problems import Instance


def dot(a, b):
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


class Eager(TorchRunner):
    """The independent reference of every other method."""

    def __init__(self, instance: Instance, case: str) -> None:
        super().__init__(instance)
        if case == "cg-ggn":
            raise UnavailableError("written for exact Hessians")
        self.case = case
        self.lower_optimizer, self.upper_optimizer = self.optimizers()
        self.lower_batches, self.upper_batches = cycle(instance.lower_data), cycle(instance.upper_data)

    def outer(self) -> None:
        i = self.instance
        for _ in range(i.unroll_steps):
            batch = next(self.lower_batches)
            self.lower_optimizer.zero_grad()
            i.lower_loss(i.lower, i.upper, batch).backward(inputs=self.theta)
            self.lower_optimizer.step()
        v = torch.autograd.grad(i.upper_loss(i.lower, i.upper, next(self.upper_batches)), self.theta)
        for rate, product in zip(self.rates, self.indirect(batch, v), strict=True):
            rate.grad = -product
        self.upper_optimizer.step()

    def indirect(self, batch, v):
        i = self.instance
        if self.case == "finite-difference":
            return self.central_difference(batch, v)
        gradient = torch.autograd.grad(i.lower_loss(i.lower, i.upper, batch), self.theta, create_graph=True)

        def hvp(p):
            return torch.autograd.grad(gradient, self.theta, p, retain_graph=True)

        q = self.cg(hvp, v) if self.case == "cg" else self.neumann(hvp, v)
        return torch.autograd.grad(gradient, self.rates, q)

    def cg(self, hvp, b):
        x, r, p = [torch.zeros_like(t) for t in b], list(b), list(b)
        rr = dot(r, r)
        for _ in range(self.instance.solver_steps):
            ap = hvp(p)
            alpha = rr / dot(p, ap)
            x = [a + alpha * c for a, c in zip(x, p, strict=True)]
            r = [a - alpha * c for a, c in zip(r, ap, strict=True)]
            rr, before = dot(r, r), rr
            p = [a + rr / before * c for a, c in zip(r, p, strict=True)]
        return x

    def neumann(self, hvp, b):
        scale = self.instance.neumann_scale
        term = total = list(b)
        for _ in range(self.instance.solver_steps):
            term = [t - scale * h for t, h in zip(term, hvp(term), strict=True)]
            total = [t + s for t, s in zip(term, total, strict=True)]
        return [scale * t for t in total]

    def central_difference(self, batch, v):
        i = self.instance
        eps = FINITE_DIFFERENCE_STEP / dot(v, v).sqrt()
        sides = []
        for shift in (eps, -2 * eps):
            with torch.no_grad():
                torch._foreach_add_(self.theta, [shift * t for t in v])
            sides.append(torch.autograd.grad(i.lower_loss(i.lower, i.upper, batch), self.rates))
        with torch.no_grad():
            torch._foreach_add_(self.theta, [eps * t for t in v])
        return [(a - b) / (2 * eps) for a, b in zip(*sides, strict=True)]
