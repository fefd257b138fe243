"""A copy of an optimizer that has left its first steps behind.

A first step makes the optimizer's state and is another graph than all later ones. What is compiled before training
begins is a later one, so it is captured from a copy that has made some steps, on copies of the parameters.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Mapping
from typing import Any

import torch

from mlopt.capture.output import silenced
from mlopt.capture.update_trace import check_update
from mlopt.errors import UpdateError

# RAdam has its final formula from the 6th step on, with its usual settings.
_WARM_STEPS = 8


def warmed_twin(
    problem: str,
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    scales: Mapping[str, float] | None = None,
) -> tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
    """Copy an optimizer and the parameters that receive a gradient, and let the copy make a few steps.

    The steps are the real ones, on random gradients. Afterwards the copies of the parameters have the values of the
    originals again. Nothing of the user's is written.

    Args:
        problem: Name of the problem, for messages.
        optimizer: The live optimizer.
        parameters: The parameters that receive a gradient, by name.
        scales: Size of the random gradients by name; default 1.

    Returns:
        The copy, and the copies of the parameters.

    Raises:
        UpdateError: The optimizer cannot be captured, or cannot be copied.
    """
    check_update(problem, optimizer, parameters)
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    memo: dict[int, Any] = {id(p): copies[name] for name, p in parameters.items()}
    for group in optimizer.param_groups:  # those without a gradient stay behind: their copies never get one
        for p in group["params"]:
            memo.setdefault(id(p), torch.nn.Parameter(torch.empty(0, dtype=p.dtype, device=p.device)))
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    attributes = {key: value for key, value in vars(optimizer).items() if key not in ("state", "step")}
    state = {p: optimizer.state[p] for p in parameters.values() if p in optimizer.state}
    generator = torch.Generator().manual_seed(0)
    devices = list({p.device for p in parameters.values() if p.device.type == "cuda"})
    try:
        vars(twin).update(copy.deepcopy(attributes, memo))
        twin.state = collections.defaultdict(dict, copy.deepcopy(state, memo))
        with torch.random.fork_rng(devices=devices), silenced():
            for _ in range(_WARM_STEPS):
                for name, p in copies.items():
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                    p.grad = (noise * (scales or {}).get(name, 1.0)).to(p)
                type(twin).step(twin)
    except Exception as error:
        raise UpdateError(
            f"problem {problem!r}: its optimizer {type(optimizer).__name__} cannot be copied and stepped: "
            f"{type(error).__name__}: {error}"
        ) from error
    with torch.no_grad():
        for name, p in parameters.items():
            copies[name].copy_(p)
            copies[name].grad = None
    return twin, copies
