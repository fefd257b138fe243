"""`ModuleGuard`: notices that the user's modules are no longer those that were compiled.

Plans read live parameters, so their values may change at will. What may not change is what the graphs were built for:
which modules and parameters there are, their shapes, dtypes and devices, and which of them are trained. Training and
evaluation mode may change: it is part of the key under which graphs are kept.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mlopt.errors import StateError
from mlopt.problem import Problem


class ModuleGuard:
    """Remembers the structure of all problems' modules.

    Args:
        problems: The problems by name.

    Attributes:
        last: What `modes` returned last.
    """

    def __init__(self, problems: Mapping[str, Problem]) -> None:
        self._problems = dict(problems)
        self._roots = {name: p.module for name, p in problems.items()}
        named = [(name, path, m) for name, p in problems.items() for path, m in p.module.named_modules()]
        self._places = [(name, path) for name, path, _ in named]
        self._modules = [module for _, _, module in named]
        self._structures = _structures(self._modules)
        self._parameters = [
            (name, path, p, p.shape, p.dtype, p.device, p.requires_grad)
            for name, problem in problems.items()
            for path, p in problem.module.named_parameters()
        ]
        self._held = [_num_held(p) for p in problems.values()]
        self.last: tuple[bool, ...] = ()

    def modes(self) -> tuple[bool, ...]:
        """Check that nothing has changed, and return the training mode of every module.

        Raises:
            StateError: Something has; names the problem and the module or parameter.
        """
        # Made several times in every step: one comparison of lists per question, and names only where they differ.
        for name, problem in self._problems.items():
            if problem.module is not self._roots[name]:
                raise _changed(name, "its module was replaced by another object")
        held = [_num_held(p) for p in self._problems.values()]
        if held != self._held:
            name = next(n for n, a, b in zip(self._problems, held, self._held, strict=True) if a != b)
            raise _changed(name, "its optimizer holds another number of parameters")
        structures = _structures(self._modules)
        if structures != self._structures:
            pairs = zip(self._places, structures, self._structures, strict=True)
            name, path = next(place for place, a, b in pairs if a != b)
            raise _changed(name, f"a submodule, parameter or buffer of {path or 'its module'!r} was replaced")
        for name, path, p, shape, dtype, device, trained in self._parameters:
            if p.dtype != dtype or p.device != device or p.shape != shape or p.requires_grad != trained:
                now = f"{p.dtype} {tuple(p.shape)} on {p.device}, requires_grad={p.requires_grad}"
                was = f"{dtype} {tuple(shape)} on {device}, requires_grad={trained}"
                raise _changed(name, f"parameter {path!r} is {now}, it was {was}")
        self.last = tuple([module.training for module in self._modules])
        return self.last


def _structures(modules: list[nn.Module]) -> list[tuple[int | None, ...]]:
    return [
        (
            *map(id, module._parameters.values()),
            None,
            *map(id, module._modules.values()),
            None,
            *map(id, module._buffers.values()),
        )
        for module in modules
    ]


def _num_held(problem: Problem) -> int:
    return sum([len(group["params"]) for group in problem.optimizer.param_groups])


def _changed(name: str, what: str) -> StateError:
    return StateError(
        f"problem {name!r}: {what} after mlopt.compile; the compiled graphs no longer describe it. Call "
        "mlopt.compile(graph) again"
    )
