"""The kinds of losses that people write, as data: what each becomes, and how to build it.

A kind is a lower problem under an upper one whose parameters (`Scale.w`, three numbers) enter its loss. `status` is
"compiled", "island" (plain autograd, same results) or the name of the error that refuses it.
"""

import collections
import contextlib
import dataclasses
import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

B, D, C = 8, 4, 3


class Scale(nn.Module):
    """The upper module: three positive numbers, and a buffer."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-0.5, 0.5, C))
        self.register_buffer("temperature", torch.tensor(1.5))

    def forward(self):
        return self.w.exp()


@dataclasses.dataclass
class Kind:
    """One kind of loss.

    Attributes:
        step: The lower `training_step`.
        status: See the module.
        module: Makes the lower module.
        batch: Makes its batch for a dtype.
        upper_step: The upper `training_step`; default: square of the lower module's output.
        held: Picks the parameters that the lower optimizer holds.
        fix: Changes the two problems before they are compiled.
        why: What the table says besides.
    """

    step: object
    status: str = "compiled"
    module: object = lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))
    batch: object = None
    upper_step: object = None
    held: object = lambda module: list(module.parameters())
    fix: object = None
    why: str = ""


KINDS = {}


def kind(name, **options):
    """Register the decorated lower `training_step` under a name."""

    def register(step):
        assert name not in KINDS
        KINDS[name] = Kind(step, **options)
        return step

    return register


def classes(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, C, (B,), generator=generator)


def inputs(*shape):
    return lambda dtype: torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def weighted(self, logits, y):
    return (F.cross_entropy(logits, y, reduction="none") * self.upper()[y]).mean()


def squares(self, out):
    """A loss on any output: its squares, scaled by the upper parameters."""
    return (out.reshape(-1, 1).square() * self.upper()).mean() + out.sin().mean() * self.upper().sum()


@kind("scalar loss")
def _(self, batch):
    x, y = batch
    return weighted(self, self.module(x), y)


@kind("dict loss with tensor metrics", why="also the lower problem's (Betty: assertion)")
def _(self, batch):
    x, y = batch
    logits = self.module(x)
    return {"loss": weighted(self, logits, y), "norm": logits.norm(), "acc": (logits.argmax(1) == y).float().mean()}


@kind("`.item()` metric", why="the value is read after the step")
def _(self, batch):
    x, y = batch
    loss = weighted(self, self.module(x), y)
    return {"loss": loss, "value": loss.item()}


@kind("list append of `loss.item()`", status="island", why="a captured one would append once: use a metric")
def _(self, batch):
    x, y = batch
    loss = weighted(self, self.module(x), y)
    self.__dict__.setdefault("log", []).append(loss.item())
    return loss


@kind("values kept by key in a dict of a module", why="looked up in the graph; the dict stays as it was")
def _(self, batch):
    x, y = batch
    cache = self.module.__dict__.setdefault("cache", {})
    mask = cache.setdefault(x.shape[1], torch.ones(x.shape[1], dtype=x.dtype))
    return weighted(self, self.module(x * mask), y)


def penalty(parameters):
    return 0.05 * sum(p.square().sum() for p in parameters)


@kind("penalty on `self.module.parameters()`")
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1]) + penalty(self.module.parameters())


@kind("penalty on `self.trained_parameters()`")
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1]) + penalty(self.trained_parameters().values())


def keep_list(lower, upper):
    lower.list = list(lower.module.parameters())


@kind(
    "penalty on a list of parameters made before",
    status="island",
    fix=keep_list,
    why="they would be constants of a graph: read them through the module",
)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1]) + penalty(self.list)


@kind("reading the optimizer, its learning rate say", status="island", why="a captured loss would read it once")
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1]) * (1 + self.optimizer.param_groups[0]["lr"])


@kind(
    "string-keyed batch with strings and numbers",
    batch=lambda t: {"x": classes(t)[0], "y": classes(t)[1], "id": "a", "f": 2},
)
def _(self, batch):
    return batch["f"] * weighted(self, self.module(batch["x"]), batch["y"])


Pair = collections.namedtuple("Pair", "x y")


@kind("nested and named tuples", batch=lambda t: ([Pair(*classes(t))], None))
def _(self, batch):
    ((pair,), _) = batch
    return weighted(self, self.module(pair.x), pair.y)


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    y: torch.Tensor


@kind("dataclass batch", batch=lambda t: Sample(*classes(t)))
def _(self, batch):
    return weighted(self, self.module(batch.x), batch.y)


@kind("bare tensor batch", batch=inputs(B, D), why="given as it is (Betty splits it into rows)")
def _(self, batch):
    return squares(self, self.module(batch))


@kind("no data", batch=lambda t: None)
def _(self, batch):
    return squares(self, self.module(torch.ones(2, D, dtype=self.module[0].weight.dtype)))


@kind("evaluation mode", module=lambda: nn.Sequential(nn.Linear(D, C), nn.Dropout(0.5)).eval())
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


@kind(
    "dropout",
    module=lambda: nn.Sequential(nn.Linear(D, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, C)),
    why="one mask in all passes",
)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


@kind(
    "BatchNorm, training",
    module=lambda: nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, C)),
    why="statistics move with real steps only",
)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


@kind("BatchNorm, evaluation", module=lambda: nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Linear(6, C)).eval())
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


@kind(
    "LayerNorm and GroupNorm",
    module=lambda: nn.Sequential(nn.Linear(D, 6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.GELU(), nn.Linear(6, C)),
)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


@kind(
    "convolution and pooling",
    module=lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(1), nn.Flatten(), nn.Linear(12, C)
    ),
    batch=inputs(5, 1, 6, 6),
)
def _(self, batch):
    return squares(self, self.module(batch))


@kind("LSTM", module=lambda: nn.LSTM(D, C, batch_first=True), batch=inputs(3, 4, D))
def _(self, batch):
    return squares(self, self.module(batch)[0])


@kind("GRU", module=lambda: nn.GRU(D, C, batch_first=True), batch=inputs(3, 4, D))
def _(self, batch):
    return squares(self, self.module(batch)[0])


@kind(
    "scaled_dot_product_attention",
    module=lambda: nn.Linear(D, 3 * D),
    batch=inputs(2, 5, D),
    why="math attention inside derivatives",
)
def _(self, batch):
    q, k, v = self.module(batch).chunk(3, -1)
    return squares(self, F.scaled_dot_product_attention(q, k, v))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


@kind("MultiheadAttention", module=Attention, batch=inputs(2, 5, D))
def _(self, batch):
    return squares(self, self.module(batch))


@kind(
    "TransformerEncoderLayer with dropout",
    module=lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.1, batch_first=True),
    batch=inputs(2, 5, D),
)
def _(self, batch):
    return squares(self, self.module(batch))


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, D)
        self.head = nn.Linear(D, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)))


def tokens(dtype):
    return torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(0))


@kind("embedding tied to the output layer", module=Tied, batch=tokens)
def _(self, batch):
    return squares(self, self.module(batch).log_softmax(-1))


def share_with_upper(lower, upper):
    upper.module.shared = lower.module[0]  # trained by the lower problem, seen by both


@kind(
    "module shared across problems",
    fix=share_with_upper,
    upper_step=lambda self, batch: self.module.shared(batch[0]).square().mean(),
    why="belongs to the problem whose optimizer holds it",
)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


def freeze(lower, upper):
    lower.module[0].requires_grad_(False)


@kind("frozen layer", fix=freeze, why="(Betty: crash)")
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


@kind(
    "parameters the optimizer does not hold",
    held=lambda m: list(m[2].parameters()),
    why="not trained (Betty trains them)",
)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


class WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(D, C), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


@kind("unused parameters", module=WithUnused, why="their gradient stays None (Betty: crash)")
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


@kind("parameters without second derivative", module=lambda: nn.Linear(D, C), why="a linear bias (Betty: crash)")
def _(self, batch):
    return (self.module(batch[0]) * self.upper()).mean() + self.module.weight.pow(4).sum()


@kind("linear loss: no curvature at all", module=lambda: nn.Linear(D, C))
def _(self, batch):
    return (self.module(batch[0]) * self.upper()).mean()


@kind("`detach`")
def _(self, batch):
    losses = F.cross_entropy(self.module(batch[0]), batch[1], reduction="none")
    return (losses * (losses.detach()[:, None] * self.upper()).sum(1)).mean()


@kind("`no_grad` region")
def _(self, batch):
    logits = self.module(batch[0])
    with torch.no_grad():
        confidence = logits.softmax(1).max(1).values
    return (confidence * F.cross_entropy(logits, batch[1], reduction="none") * self.upper()[batch[1]]).mean()


@kind("`enable_grad` inside `no_grad`")
def _(self, batch):
    with torch.no_grad():
        a = self.module(batch[0])
        with torch.enable_grad():
            b = weighted(self, self.module(batch[0]), batch[1])
    return b + a.mean()


@kind("bf16 autocast on the CPU", why="float32 parameters; compared at bf16 precision")
def _(self, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = self.module(batch[0])
    return weighted(self, logits.to(self.module[0].weight.dtype), batch[1])


@kind("in-place operations", why="on values and slices")
def _(self, batch):
    x = batch[0].clone()
    x[:, 0] = 0.5
    logits = self.module(x)
    out = torch.zeros_like(logits)
    out[:, 1:] = logits[:, 1:] * self.upper()[1:]
    out.add_(logits).mul_(2)
    return F.cross_entropy(out, batch[1])


@kind("in-place write to the batch", why="the batch itself is left alone")
def _(self, batch):
    batch[0].mul_(2.0)
    return weighted(self, self.module(batch[0]), batch[1])


class Right(torch.autograd.Function):
    """A custom function whose backward is the derivative of its forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class StraightThrough(torch.autograd.Function):
    """A rounding whose backward is the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@kind(
    "custom autograd.Function, true derivative",
    status="island",
    why="nothing can prove that its backward is the derivative",
)
def _(self, batch):
    return weighted(self, Right.apply(self.module(batch[0])), batch[1])


@kind(
    "custom autograd.Function, own derivative",
    status="island",
    why="a captured graph would not run the custom backward",
)
def _(self, batch):
    return weighted(self, StraightThrough.apply(4 * self.module(batch[0])), batch[1])


@kind("straight-through rounding by `detach`")
def _(self, batch):
    x = 4 * self.module(batch[0])
    return weighted(self, x + (x.round() - x).detach(), batch[1])


@kind("gradient hook on a tensor", status="island", why="the same for hooks")
def _(self, batch):
    x = self.module(batch[0])
    x.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
    return weighted(self, x, batch[1])


def _hook_parameter(lower, upper):
    next(iter(lower.module.parameters())).register_hook(lambda gradient: 0.5 * gradient)


@kind("gradient hook on a parameter", status="island", fix=_hook_parameter)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


def _hook_module(lower, upper):
    lower.module[2].register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))


@kind("backward hook of a module", status="island", fix=_hook_module)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


@kind("buffer of another problem as a constant")
def _(self, batch):
    return weighted(self, self.module(batch[0]) / self.upper.module.temperature, batch[1])


@kind("buffer written by the loss", module=lambda: _with_ema(), why="moves with real steps only")
def _(self, batch):
    logits = self.module(batch[0])
    self.module.ema.mul_(0.9).add_(0.1 * logits.detach().mean(0))
    return weighted(self, logits - self.module.ema, batch[1])


def _with_ema():
    module = nn.Sequential(nn.Linear(D, C))
    module.register_buffer("ema", torch.zeros(C))
    return module


@kind("buffer replaced by the loss", module=_with_ema, status="island", why="write it in place to have it captured")
def _(self, batch):
    logits = self.module(batch[0])
    self.module.ema = 0.9 * self.module.ema + 0.1 * logits.detach().mean(0)
    return weighted(self, logits - self.module.ema, batch[1])


@kind(
    "weight decay as a hyperparameter",
    why="the upper parameter enters the lower loss only, through `.sum()` (Betty: crash)",
)
def _(self, batch):
    decay = sum(p.square().sum() for p in self.module.parameters())
    return F.cross_entropy(self.module(batch[0]), batch[1]) + self.upper().sum() * decay


@kind("learned targets")
def _(self, batch):
    target = self.upper().softmax(0).expand(B, C)
    return -(target * self.module(batch[0]).log_softmax(1)).sum(1).mean()


@kind(
    "upper loss with its own regularizer",
    upper_step=lambda self, batch: self.lower.module(batch[0]).square().mean() + self.module.w.square().sum(),
    why="direct and indirect term (Betty: backward a second time)",
)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


@kind("einsum, gather, scatter, sort, cumsum")
def _(self, batch):
    logits = torch.einsum("bd,cd->bc", batch[0], self.module[0].weight[:C]) + self.module(batch[0])
    top = logits.sort(1).values.cumsum(1)
    picked = torch.zeros_like(top).scatter_add(1, batch[1][:, None], top.gather(1, batch[1][:, None]))
    return (picked.logsumexp(1) * self.upper()[batch[1]]).mean()


@kind("masks and `torch.where`")
def _(self, batch):
    logits = self.module(batch[0])
    mask = logits.detach() > 0
    return (torch.where(mask, logits, 0.1 * logits) * self.upper()).square().mean()


@kind("boolean indexing", why="its shape depends on values")
def _(self, batch):
    logits = self.module(batch[0])
    return squares(self, logits[logits.detach() > 0])


@kind("Python loop over the batch", why="fixes the batch size: another size is captured anew")
def _(self, batch):
    x, y = batch
    return sum(weighted(self, self.module(x[i : i + 1]), y[i : i + 1]) for i in range(x.shape[0])) / x.shape[0]


@kind("loop over `nonzero()`", status="island", why="data-dependent control flow")
def _(self, batch):
    x, y = batch
    loss = weighted(self, self.module(x), y)
    for i in (y == 1).nonzero().flatten().tolist():
        loss = loss + 0.1 * weighted(self, self.module(x[i : i + 1]), y[i : i + 1])
    return loss


@kind("branch on a value", status="island", why="data-dependent control flow")
def _(self, batch):
    loss = weighted(self, self.module(batch[0]), batch[1])
    return 2 * loss if loss > 0 else loss


@kind("print", status="island", why="prints once per real step")
def _(self, batch):
    loss = weighted(self, self.module(batch[0]), batch[1])
    print("loss", float(loss.detach()))
    return loss


@kind("logging", status="island", why="logs once per real step")
def _(self, batch):
    loss = weighted(self, self.module(batch[0]), batch[1])
    logging.getLogger("user").warning("a step")
    return loss


@kind("NumPy in between", status="island", why="leaves PyTorch")
def _(self, batch):
    logits = self.module(batch[0])
    scale = float(np.abs(logits.detach().numpy()).max())
    return weighted(self, logits / scale, batch[1])


@kind("activation checkpointing")
def _(self, batch):
    return weighted(self, checkpoint(self.module, batch[0], use_reentrant=False), batch[1])


@kind(
    "gradient penalty by `autograd.grad` in the loss",
    status="island",
    why="torch.export does not record autograd calls",
)
def _(self, batch):
    x = batch[0].clone().requires_grad_()
    logits = self.module(x)
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return weighted(self, logits, batch[1]) + slope.square().mean()


@kind("`torch.func.vmap` in the loss")
def _(self, batch):
    each = torch.func.vmap(lambda row: (row * self.upper()).sum())(self.module(batch[0]))
    return each.square().mean()


@kind(
    "weight_norm parametrization", module=lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(D, C)))
)
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])


class Output(dict):
    """Outputs by key and by attribute."""

    __getattr__ = dict.__getitem__


class Model(nn.Module):
    """In the style of pretrained models: keyword arguments, outputs in a dict, tied embeddings."""

    def __init__(self):
        super().__init__()
        self.tied, self.norm = Tied(), nn.LayerNorm(7)

    def forward(self, input_ids=None, attention_mask=None, labels=None, **unused):
        logits = self.norm(self.tied(input_ids))
        loss = None
        if labels is not None:
            flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            loss = (flat * attention_mask.flatten()).sum() / attention_mask.sum()
        return Output(loss=loss, logits=logits)


def texts(dtype):
    ids = tokens(dtype)
    return {"input_ids": ids, "labels": ids.roll(1, 1), "attention_mask": (ids > 1).to(dtype)}


@kind("pretrained-style model: kwargs, dict outputs, tied embeddings", module=Model, batch=texts)
def _(self, batch):
    output = self.module(**batch)
    return output.loss * self.upper().sum() + squares(self, output.logits)


@kind(
    "submodules called by name",
    module=lambda: nn.ModuleDict({"body": nn.Linear(D, 5), "head": nn.Linear(5, C)}),
    upper_step=lambda self, batch: self.lower.module["body"](batch[0]).square().mean(),
)
def _(self, batch):
    return weighted(self, self.module["head"](torch.tanh(self.module["body"](batch[0]))), batch[1])


@kind("complex numbers in between (FFT)")
def _(self, batch):
    return weighted(self, torch.fft.rfft(self.module(batch[0]), n=4).abs(), batch[1])


@kind("linear algebra (solve, logdet)")
def _(self, batch):
    a = self.module[2].weight @ self.module[2].weight.T + torch.eye(C, dtype=batch[0].dtype)
    return torch.logdet(a) + (torch.linalg.solve(a, self.module(batch[0]).T).T * self.upper()).square().mean()


@kind("loss of shape [1]")
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1])[None]


@kind("ExitStack and other context managers")
def _(self, batch):
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.nullcontext())
        return weighted(self, self.module(batch[0]), batch[1])


@kind("random noise in the loss", why="the same noise in all passes")
def _(self, batch):
    x, y = batch
    return weighted(self, self.module(x + 0.1 * torch.randn_like(x)), y)


@kind("upper parameters read live and detached", why="the detached value is a constant")
def _(self, batch):
    x, y = batch
    return weighted(self, self.module(x), y) * self.upper().detach().mean()


def two_groups(lower, upper):
    first, last = lower.module[0].parameters(), lower.module[2].parameters()
    groups = [{"params": list(first), "lr": 0.5, "weight_decay": 0.1}, {"params": list(last), "lr": 0.001}]
    lower.optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)


@kind("parameter groups with settings of their own", fix=two_groups, why="used as given (Betty: one group of defaults)")
def _(self, batch):
    x, y = batch
    return weighted(self, self.module(x), y)


@kind("loss that is no scalar", status="LossError")
def _(self, batch):
    return self.module(batch[0]) * self.upper()


@kind("loss without gradient", status="LossError")
def _(self, batch):
    return weighted(self, self.module(batch[0]), batch[1]).detach()


@kind("no return", status="LossError")
def _(self, batch):
    weighted(self, self.module(batch[0]), batch[1])


@kind("loose tensor that requires a gradient", status="ProblemError", why="its gradient would be lost")
def _(self, batch):
    return weighted(self, self.module(batch[0]) * LOOSE, batch[1])


LOOSE = torch.ones((), requires_grad=True)


@kind("in-place write to a parameter", status="ProblemError", why="use a callback between steps")
def _(self, batch):
    with torch.no_grad():
        self.module[0].weight.clamp_(-1, 1)
    return weighted(self, self.module(batch[0]), batch[1])


@kind("unknown problem name", status="UnknownNameError")
def _(self, batch):
    return weighted(self, self.moduel(batch[0]), batch[1])
