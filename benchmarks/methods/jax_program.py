"""A program written by hand in JAX: one `jax.jit` of the whole outer iteration, loops by `lax.scan`.

The gradient is linearized once per solve (`jax.linearize`), as an expert would; state is donated. Two problem kinds are
written down here; the others have no JAX counterpart of their modules.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from benchmarks.methods.base import AbstractRunner, UnavailableError
from benchmarks.problems import Instance


def _losses(name: str, instance: Instance):
    import jax
    import jax.numpy as jnp

    def cross_entropy(logits, y):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]

    def decay(theta, rates):
        return sum(0.5 * (jnp.exp(r) * t**2).sum() for r, t in zip(rates, theta, strict=True))

    def binary(theta, x, y):
        z = (x @ theta[0].T)[:, 0]
        return (jnp.maximum(z, 0) - z * y + jnp.log1p(jnp.exp(-jnp.abs(z)))).mean()

    def perceptron(theta, x, y):
        hidden = jnp.tanh(x @ theta[0].T + theta[1])
        return cross_entropy(hidden @ theta[2].T + theta[3], y).mean()

    if name == "logistic":
        return lambda t, r, b: binary(t, *b) + decay(t, r), lambda t, r, b: binary(t, *b)
    if name == "mlp":
        return lambda t, r, b: perceptron(t, *b) + decay(t, r), lambda t, r, b: perceptron(t, *b)
    if name == "cleaning":

        def weighted(theta, rates, batch):
            x, y = batch
            losses = cross_entropy(x @ theta[0].T, y)
            return (jax.nn.sigmoid(rates[0]) * losses).mean() + 0.5e-3 * (theta[0] ** 2).sum()

        return weighted, lambda t, r, b: cross_entropy(b[0] @ t[0].T, b[1]).mean()
    raise UnavailableError("not written in JAX")


class Jax(AbstractRunner):
    """One compiled function per outer iteration."""

    def __init__(self, instance: Instance, case: str, name: str) -> None:
        try:
            on_gpu = instance.device.type == "cuda"
            if on_gpu:
                os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too
            else:
                os.environ.setdefault("JAX_PLATFORMS", "cpu")
            if torch.get_num_threads() == 1:  # as many threads as the others, if it has not started yet
                os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
            import jax
        except ImportError as error:
            raise UnavailableError(f"not installed ({error})") from None
        if case not in ("cg", "neumann"):
            raise UnavailableError("not written in JAX")
        if on_gpu and jax.default_backend() != "gpu":
            raise UnavailableError("JAX sees no GPU")
        if on_gpu:  # torch's default: no products of shortened float32
            jax.config.update("jax_default_matmul_precision", "highest")
        dtype = next(instance.lower.parameters()).dtype
        jax.config.update("jax_enable_x64", dtype == torch.float64)
        lower_loss, upper_loss = _losses(name, instance)
        import jax.numpy as jnp
        from jax import lax

        def array(tensor):
            return jnp.asarray(np.array(tensor.detach().cpu()))  # a copy: the modules are trained by others

        def stack(batches):
            return tuple(jnp.stack([array(b[k]) for b in batches]) for k in range(2))

        def vdot(a, b):
            return sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))

        i = instance
        one = len(i.lower_data) == 1

        def lower_step(carry, index):
            theta, momentum, rates, data = carry
            batch = tuple(d[0] if one else d[index % len(i.lower_data)] for d in data)
            gradient = jax.grad(lower_loss)(theta, rates, batch)
            momentum = [i.momentum * m + g for m, g in zip(momentum, gradient, strict=True)]
            theta = [t - i.lower_lr * m for t, m in zip(theta, momentum, strict=True)]
            return (theta, momentum, rates, data), None

        def cg(hvp, b):
            def step(carry, _):
                x, r, p, rr = carry
                ap = hvp(p)
                alpha = rr / vdot(p, ap)
                x = [a + alpha * c for a, c in zip(x, p, strict=True)]
                r = [a - alpha * c for a, c in zip(r, ap, strict=True)]
                new = vdot(r, r)
                return (x, r, [a + new / rr * c for a, c in zip(r, p, strict=True)], new), None

            start = ([jnp.zeros_like(t) for t in b], b, b, vdot(b, b))
            return lax.scan(step, start, None, length=i.solver_steps)[0][0]

        def neumann(hvp, b):
            def step(carry, _):
                term, total = carry
                term = [t - i.neumann_scale * h for t, h in zip(term, hvp(term), strict=True)]
                return (term, [t + s for t, s in zip(term, total, strict=True)]), None

            total = lax.scan(step, (b, b), None, length=i.solver_steps)[0][1]
            return [i.neumann_scale * t for t in total]

        def outer(state, lower_data, upper_data):
            theta, momentum, rates, m, v, count = state
            first = count * i.unroll_steps
            (theta, momentum, rates, _), _ = lax.scan(
                lower_step, (theta, momentum, rates, lower_data), first + jnp.arange(i.unroll_steps)
            )
            last = tuple(d[(first + i.unroll_steps - 1) % len(i.lower_data)] for d in lower_data)
            held_out = tuple(d[count % len(i.upper_data)] for d in upper_data)
            cotangent = jax.grad(upper_loss)(theta, rates, held_out)
            _, hvp = jax.linearize(lambda t: jax.grad(lower_loss)(t, rates, last), theta)
            q = (cg if case == "cg" else neumann)(hvp, cotangent)
            _, mixed = jax.vjp(lambda r: jax.grad(lower_loss)(theta, r, last), rates)
            gradient = [-g for g in mixed(q)[0]]
            count = count + 1
            m = [0.9 * a + 0.1 * g for a, g in zip(m, gradient, strict=True)]
            v = [0.999 * a + 0.001 * g * g for a, g in zip(v, gradient, strict=True)]
            steps = [
                i.upper_lr * (a / (1 - 0.9**count)) / (jnp.sqrt(b / (1 - 0.999**count)) + 1e-8)
                for a, b in zip(m, v, strict=True)
            ]
            return theta, momentum, [r - s for r, s in zip(rates, steps, strict=True)], m, v, count

        self._outer = jax.jit(outer, donate_argnums=0)
        self._data = stack(i.lower_data), stack(i.upper_data)
        theta = [array(p) for p in i.lower.parameters()]
        rates = [array(p) for p in i.upper.parameters()]

        def zeros(tensors):
            return [jnp.zeros_like(t) for t in tensors]

        self._state = (theta, zeros(theta), rates, zeros(rates), zeros(rates), jnp.asarray(0))
        self._wait = jax.block_until_ready

    def outer(self) -> None:
        self._state = self._wait(self._outer(self._state, *self._data))

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        def vector(arrays):
            return torch.from_numpy(np.concatenate([np.asarray(a, dtype=np.float64).reshape(-1) for a in arrays]))

        return vector(self._state[0]), vector(self._state[2])
