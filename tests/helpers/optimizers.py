"""A table of optimizers with options, and optimizers as users write them."""

import copy
import math

import torch
from torch import nn, optim

# name -> (class, options). Every control-flow option of the supported optimizers appears.
SUPPORTED = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "sgd-maximize": (optim.SGD, {"lr": 0.1, "maximize": True, "weight_decay": 0.1}),
    "sgd-momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "sgd-nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (optim.Adam, {"lr": 0.01}),
    "adam-amsgrad": (optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adam-maximize": (optim.Adam, {"lr": 0.01, "maximize": True, "betas": (0.5, 0.9), "eps": 1e-4}),
    "adam-no-betas": (optim.Adam, {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-2}),
    "adamw": (optim.AdamW, {"lr": 0.01}),
    "adamw-amsgrad": (optim.AdamW, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01}),
    "rmsprop-centered": (optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    "rmsprop-momentum": (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "maximize": True}),
    "adadelta": (optim.Adadelta, {"lr": 0.5}),
    "adadelta-decay": (optim.Adadelta, {"lr": 0.5, "weight_decay": 0.1, "maximize": True}),
    "nadam": (optim.NAdam, {"lr": 0.01}),
    "nadam-decay": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "nadam-decoupled": (optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adagrad": (optim.Adagrad, {"lr": 0.1}),
    "adagrad-decay": (
        optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    "adamax": (optim.Adamax, {"lr": 0.01}),
    "adamax-decay": (optim.Adamax, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "radam": (optim.RAdam, {"lr": 0.01}),
    "radam-decay": (optim.RAdam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    "radam-decoupled": (optim.RAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "asgd": (optim.ASGD, {"lr": 0.1, "weight_decay": 0.1}),
}


class OldAdam(optim.Optimizer):
    """Adam as repositories of 2018 have it: Python counters, ``math.sqrt``, ``.data``, deprecated signatures."""

    def __init__(self, params, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad.data
                state = self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p.data)
                    state["exp_avg_sq"] = torch.zeros_like(p.data)
                exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
                beta1, beta2 = group["betas"]
                state["step"] += 1
                if group["weight_decay"] != 0:
                    grad = grad.add(p.data, alpha=group["weight_decay"])
                exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
                exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denom = exp_avg_sq.sqrt().add_(group["eps"])
                step_size = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                p.data.addcdiv_(exp_avg, denom, value=-step_size)


class Lion(optim.Optimizer):
    """Chen et al. 2023, with a warm-up that counts steps in the param group."""

    def __init__(self, params, lr=0.01, betas=(0.9, 0.99), warmup=3):
        super().__init__(params, {"lr": lr, "betas": betas, "k": 0, "warmup": warmup})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            lr = group["lr"] * min(1.0, group["k"] / group["warmup"])
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                m = state["exp_avg"]
                update = torch.tanh(10 * (m * beta1 + p.grad * (1 - beta1)))
                p.add_(update, alpha=-lr)
                m.lerp_(p.grad, 1 - beta2)


class ClippedAdamW(optim.AdamW):
    """A subclass that changes the gradients and calls PyTorch's step."""

    def __init__(self, params, clip=0.5, **kwargs):
        super().__init__(params, **kwargs)
        for group in self.param_groups:
            group["clip"] = clip

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.clamp_(-group["clip"], group["clip"])
        return super().step(closure)


class NormalizedSGD(optim.Optimizer):
    """Not element-wise: the gradient is divided by its norm."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / (p.grad.norm().item() + 1e-3))


USER_WRITTEN = {
    "old-adam": (OldAdam, {"weight_decay": 0.1}),
    "lion": (Lion, {}),
    "clipped-adamw": (ClippedAdamW, {"lr": 0.01}),
}
ELEMENTWISE = SUPPORTED | USER_WRITTEN
# One of each class, for the tests that take long.
ONE_EACH = [
    *("sgd-nesterov", "adam-amsgrad", "adamw", "rmsprop-centered", "adadelta", "nadam", "adagrad-decay", "adamax"),
    *("radam", "asgd", "old-adam", "lion"),
]


def parameters(dtype=torch.float64, seed=0):
    """A matrix, a vector, a scalar and an empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (4, 3), "vector": (5,), "scalar": (), "empty": (0, 2)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in shapes.items()
    }


def gradients(params, step):
    """Gradients of one step: random, with entries that are 0 at every step."""
    generator = torch.Generator().manual_seed(100 + step)
    made = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for name, p in params.items()
    }
    if "vector" in made:
        made["vector"][1] = 0
    return made


def set_gradients(params, grads):
    for name, p in params.items():
        p.grad = grads[name].clone()


def make(name, dtype=torch.float64, only=None, **changes):
    """Return parameters (all of `parameters`, or `only` some) and an optimizer of the table over them."""
    cls, options = {**ELEMENTWISE, "normalized": (NormalizedSGD, {})}[name]
    params = {key: p for key, p in parameters(dtype).items() if only is None or key in only}
    return params, cls(params.values(), **{**options, **changes})


def walk(params, optimizer, steps, start=1):
    """Make real steps."""
    for t in range(start, start + steps):
        set_gradients(params, gradients(params, t))
        optimizer.step()


def twin(params, optimizer):
    """An independent copy of live parameters and their optimizer."""
    memo = {}
    copies = {name: copy.deepcopy(p, memo) for name, p in params.items()}
    other = object.__new__(type(optimizer))
    other.__dict__.update(copy.deepcopy({k: v for k, v in vars(optimizer).items() if k != "step"}, memo))
    return copies, other
