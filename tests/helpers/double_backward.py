"""Hypergradients by plain `torch.autograd` double backward: an oracle that shares no code with mlopt.

Written for one upper and one lower problem given as closures over live modules.
"""

import torch


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def unflat(vector, like):
    parts = vector.split([t.numel() for t in like])
    return [p.reshape(t.shape) for p, t in zip(parts, like, strict=True)]


def grad(output, inputs, vectors=None, **options):
    found = torch.autograd.grad(output, inputs, vectors, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def cg(matvec, b, x, max_steps, rtol):
    """Textbook conjugate gradients."""
    r = b - matvec(x)
    p = r.clone()
    for _ in range(max_steps):
        if r.norm() <= rtol * b.norm():
            break
        ap = matvec(p)
        alpha = (r @ r) / (p @ ap)
        x = x + alpha * p
        r_new = r - alpha * ap
        p = r_new + (r_new @ r_new) / (r @ r) * p
        r = r_new
    return x


def hypergradient(lower_loss, upper_loss, theta, lam, solve):
    """Return the total gradient of ``upper_loss`` with respect to `lam`, flat.

    `lower_loss` and `upper_loss` are functions without arguments; ``solve(hvp, v) -> q``.
    """
    upper = upper_loss()
    direct = flat(grad(upper, lam, retain_graph=True))
    v = flat(grad(upper, theta))
    gradient = torch.autograd.grad(lower_loss(), theta, create_graph=True, allow_unused=True)

    def product(vector, inputs):
        pairs = zip(gradient, unflat(vector, theta), strict=True)
        pairs = [(g, part) for g, part in pairs if g is not None and g.requires_grad]
        if not pairs:
            return flat([torch.zeros_like(x) for x in inputs])
        return flat(grad([g for g, _ in pairs], inputs, [part for _, part in pairs], retain_graph=True))

    q = solve(lambda vector: product(vector, theta), v)
    return direct - product(q, lam)
