"""One step of the user's own optimizer as a differentiable function.

``(theta, gradient, state, settings) -> (theta', state')`` is obtained by running the optimizer's real ``step`` on other
tensors: a shallow copy of the optimizer, whose groups hold clones and whose state is given, in PyTorch's own
differentiable mode where it has one. So every optimizer works whose ``step`` is made of differentiable operations, and
nothing is rebuilt from defaults; the user's optimizer is not touched.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mlopt.errors import UpdateError

# Group entries that choose between implementations of the same update; only the plain one can be differentiated.
_PLAIN = {"foreach": False, "fused": False, "differentiable": True, "capturable": False}


@dataclasses.dataclass
class OptimizerState:
    """What an optimizer remembers, for the trained parameters of one problem in layout order.

    Attributes:
        tensors: Per parameter: name -> tensor (floating point, like a momentum; differentiable).
        others: Per parameter: name -> anything else (step counters, None).
        settings: Per parameter group: its entries but the parameters.
        groups: Per parameter: the number of its group.
    """

    tensors: list[dict[str, torch.Tensor]]
    others: list[dict[str, Any]]
    settings: list[dict[str, Any]]
    groups: list[int]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor]) -> OptimizerState:
        """Copy the present state of a live optimizer."""
        groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        tensors: list[dict[str, torch.Tensor]] = []
        others: list[dict[str, Any]] = []
        for parameter in parameters:
            state = optimizer.state.get(parameter, {})
            moving = {k: v for k, v in state.items() if _is_differentiable(k, v, parameter)}
            tensors.append({k: v.detach().clone() for k, v in moving.items()})
            others.append({k: _copied(v) for k, v in state.items() if k not in moving})
        settings = [{k: _copied(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return cls(tensors, others, settings, [groups[id(p)] for p in parameters])

    def flat(self) -> list[torch.Tensor]:
        """Return all tensors in a fixed order."""
        return [t for tensors in self.tensors for t in tensors.values()]

    def with_tensors(self, flat: Sequence[torch.Tensor]) -> OptimizerState:
        """Return the same state around other tensors, in the order of `flat`."""
        values = iter(flat)
        return dataclasses.replace(self, tensors=[{k: next(values) for k in tensors} for tensors in self.tensors])

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.flat())


def apply_update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    state: OptimizerState,
    hyperparameters: Sequence[Mapping[str, torch.Tensor]] = (),
    *,
    problem: str = "",
) -> tuple[list[torch.Tensor], OptimizerState]:
    """Make one step of an optimizer on given tensors; differentiable if gradients are enabled.

    Args:
        optimizer: The user's optimizer; only its class, its attributes and its ``step`` are used.
        parameters: theta, one tensor per trained parameter.
        gradients: One per parameter; None leaves the parameter alone, as in PyTorch.
        state: What the optimizer remembers.
        hyperparameters: Per parameter group, 0-d tensors that take the place of its entries.
        problem: The problem's name, for messages.

    Returns:
        The new parameters and the new state.

    Raises:
        UpdateError: The optimizer's step cannot be run this way.
    """
    name = type(optimizer).__name__
    values = [p.clone() for p in parameters]
    shadow = copy.copy(optimizer)
    shadow.param_groups = []
    for i, settings in enumerate(state.settings):
        given = dict(hyperparameters[i]) if hyperparameters else {}
        plain = {k: v for k, v in _PLAIN.items() if k in settings}
        if given and "differentiable" not in settings:
            raise UpdateError(
                f"problem {problem!r}: {name} has no differentiable mode, so its settings ({', '.join(given)}) cannot "
                "be learned"
            )
        members = [v for v, group in zip(values, state.groups, strict=True) if group == i]
        now = {**settings, **given}
        shadow.param_groups.append({**now, **plain, **_without_zero_rate(optimizer, now, members), "params": members})
    shadow.state = collections.defaultdict(dict)
    for value, gradient, tensors, others in zip(values, gradients, state.tensors, state.others, strict=True):
        if tensors or others:
            # Clones: a step writes to its state in place, and the counters are needed again.
            kept = {k: t.clone() for k, t in tensors.items()}
            shadow.state[value] = {**kept, **{k: _widened(v) for k, v in others.items()}}
        value.grad = None if gradient is None else gradient.clone()
    # Without its decorators: the profiler's hook, and those that switch gradients off.
    step = inspect.unwrap(type(optimizer).step)
    try:
        with warnings.catch_warnings(), _Differentiable():
            warnings.simplefilter("ignore")  # .grad of a tensor that is no leaf is what is wanted here
            step(shadow)
    except Exception as error:
        raise UpdateError(
            f"problem {problem!r}: the step of {name} cannot be differentiated: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}. Use an optimizer of torch.optim that acts element by "
            "element (SGD, Adam, AdamW, RMSprop, ...), or another estimator"
        ) from error
    new_tensors: list[dict[str, torch.Tensor]] = []
    new_others: list[dict[str, Any]] = []
    for value, before in zip(values, state.others, strict=True):
        found = shadow.state.get(value, {})
        moving = {k: v for k, v in found.items() if _is_differentiable(k, v, value)}
        new_tensors.append(moving)
        new_others.append({k: _like(v, before.get(k)) for k, v in found.items() if k not in moving})
    return values, dataclasses.replace(state, tensors=new_tensors, others=new_others)


def update_factor(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor | None],
    state: OptimizerState,
    *,
    problem: str = "",
) -> list[torch.Tensor]:
    """Return ``-d theta'/d gradient`` of an optimizer that acts element by element: one factor per element.

    With bias correction and everything else that the real step does; it contains the learning rate (plain SGD: the
    learning rate itself). The preconditioner of SAMA (Choe et al. 2023, arXiv 2310.05674, section 3.2).

    Args:
        optimizer: The user's optimizer.
        parameters: theta.
        gradients: The gradients of the step; a parameter without one gets zeros.
        state: The optimizer's state before the step.
        problem: The problem's name, for messages.

    Raises:
        UpdateError: The step cannot be differentiated, or mixes the elements of a gradient.
    """
    with torch.enable_grad():
        leaves = [None if g is None else g.detach().clone().requires_grad_() for g in gradients]
        updated, _ = apply_update(optimizer, [p.detach() for p in parameters], leaves, state, problem=problem)
        pairs = [(u, g) for u, g in zip(updated, leaves, strict=True) if g is not None and u.requires_grad]
        outputs, inputs = [u for u, _ in pairs], [g for _, g in pairs]
        if not outputs:
            raise UpdateError(f"problem {problem!r}: the step of {type(optimizer).__name__} does not use the gradient")
        ones = torch.autograd.grad(outputs, inputs, [torch.ones_like(u) for u in outputs], retain_graph=True)
        # A diagonal Jacobian J has J^T s = s * (J^T 1) for signs s.
        generator = torch.Generator().manual_seed(0)
        signs = [
            (2 * torch.randint(0, 2, u.shape, generator=generator) - 1).to(device=u.device, dtype=u.dtype)
            for u in outputs
        ]
        signed = torch.autograd.grad(outputs, inputs, signs)
    for one, other, sign in zip(ones, signed, signs, strict=True):
        if not torch.allclose(other * sign, one, rtol=1e-4, atol=1e-30):
            raise UpdateError(
                f"problem {problem!r}: {type(optimizer).__name__} mixes the elements of a gradient, so its update has "
                "no factor per element; use an optimizer that acts element by element, or another estimator than SAMA"
            )
    factors = iter(ones)
    used = {id(g) for g in inputs}
    return [
        -next(factors) if g is not None and id(g) in used else torch.zeros_like(p)
        for g, p in zip(leaves, parameters, strict=True)
    ]


class _Differentiable(TorchFunctionMode):
    """Make two things in optimizers' code differentiable that are not by themselves.

    - The square root gets the derivative 0 at 0. Adaptive optimizers divide by ``sqrt(v) + eps``; an element whose
      gradients were all zero has v = 0, and the infinite slope there times the zero slope of ``v = g^2`` is NaN, where
      the update has a finite derivative.
    - ``detach`` does nothing. SGD's first momentum buffer is a detached copy of the gradient.

    And new counters are in float64; see `_widened`.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.Tensor.sqrt, torch.sqrt) and not kwargs:
            return _safe_sqrt(args[0])
        if function is torch.Tensor.sqrt_:
            return args[0].copy_(_safe_sqrt(args[0].clone()))
        if function is torch.Tensor.detach:
            return args[0].clone()
        result = function(*args, **kwargs)
        if function in (torch.tensor, torch.zeros, torch.ones) and result.ndim == 0 and result.is_floating_point():
            return result.double()
        return result


def _without_zero_rate(
    optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], parameters: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Return a learning rate that makes the same step as one of 0, as far as floats can tell, for who divides by it.

    Adam's differentiable mode computes ``m / (sqrt(v) / rate + eps / rate)``: at 0, where a warm-up begins and a
    cosine ends, the step is right and every derivative NaN. Small enough not to move a parameter, large enough that its
    inverse may be squared.
    """
    rate = settings.get("lr")
    if not isinstance(optimizer, torch.optim.Adam) or rate is None or float(rate) != 0 or not parameters:
        return {}
    return {"lr": rate + torch.finfo(parameters[0].dtype).tiny ** 0.4}


def _safe_sqrt(x: torch.Tensor) -> torch.Tensor:
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), torch.where(x == 0, x, float("nan")))


def _is_differentiable(key: str, value: Any, parameter: torch.Tensor) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and key != "step"
        and value.shape == parameter.shape
    )


def _widened(value: Any) -> Any:
    """Copy an entry; counters in float64, since plain steps take their powers in Python's double precision."""
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.is_floating_point():
        return value.detach().double().clone()
    return _copied(value)


def _like(value: Any, before: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(before.dtype) if isinstance(before, torch.Tensor) else value.detach()
    return value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)
