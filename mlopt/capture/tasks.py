"""Problems with tasks, seen as one task: how their parameters are shown to code that is written for one task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch.nn.utils.stateless import _reparametrize_module

from mlopt.problem import Problem


@contextlib.contextmanager
def showing_task(problems: Iterable[Problem], index: int) -> Iterator[None]:
    """Let the parameters of every problem with tasks hold those of one task; nothing recorded outlives the context."""
    before = [(p, p.data) for problem in problems if problem.tasks for p in problem.trained_parameters().values()]
    try:
        for parameter, data in before:
            parameter.data = data[index]
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


@contextlib.contextmanager
def leaves_of_task(problems: Iterable[Problem], index: int) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Put new leaf tensors, the parameters of one task, into the modules of all problems with tasks.

    Yields:
        Problem with tasks -> its leaves in the order of `Problem.trained_parameters`. What autograd records on them
        may be used after the context.
    """
    leaves: dict[str, list[torch.Tensor]] = {}
    with contextlib.ExitStack() as stack:
        for problem in problems:
            if problem.tasks:
                trained = problem.trained_parameters()
                named = {name: p.detach()[index].clone().requires_grad_() for name, p in trained.items()}
                # As torch.func.functional_call does; it also renews what recurrent modules remember of their weights.
                stack.enter_context(_reparametrize_module(problem.module, named, tie_weights=True))
                leaves[problem.name] = list(named.values())
        yield leaves
