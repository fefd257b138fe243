"""The derivatives of a loss by plain autograd on the user's own code.

Slow and simple on purpose: nothing here goes through capture, tracing or a backend, so it is an independent check of
them, and the fallback where they are wrong.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlopt.autodiff import FlatLayout
from mlopt.capture.export import check_loss, split_result
from mlopt.capture.output import silenced
from mlopt.planner import ProductNeeds
from mlopt.precision import LossScale, autocast
from mlopt.problem import Problem
from mlopt.runtime.curvature import LossFunctionRecorder, curvature_gradient
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import AbstractDerivatives, AbstractLinearization, GradientResult
from mlopt.runtime.exchange import exchanged


class AutogradDerivatives(AbstractDerivatives):
    """Derivatives by `torch.autograd` on the live `training_step`.

    Args:
        problem: The problem.
        problems: All problems of the graph by name.
        layouts: Flat layouts of all problems by name.
        needs: The derivatives that the program uses.
    """

    is_random = True  # unknown, so the generators are always frozen

    def __init__(
        self,
        problem: Problem,
        problems: Mapping[str, Problem],
        layouts: Mapping[str, FlatLayout],
        needs: ProductNeeds,
    ) -> None:
        self._problem = problem
        self._problems = problems
        self._layouts = layouts
        self._needs = needs
        self._leaves: Mapping[str, list[torch.Tensor]] = {}

    @contextlib.contextmanager
    def on_leaves(self, leaves: Mapping[str, list[torch.Tensor]]) -> Iterator[None]:
        """Differentiate by these tensors, which the modules hold now, instead of the live parameters."""
        self._leaves = leaves
        try:
            yield
        finally:
            self._leaves = {}

    @contextlib.contextmanager
    def at(self, values: Mapping[int, torch.Tensor]) -> Iterator[None]:
        """Exchange the data of the live tensors, as long as anything recorded on them may be used."""
        with exchanged(self._problems.values(), values):
            yield

    def accepts(self, batch: Batch) -> bool:
        """Any batch will do: the code runs anew."""
        return True

    def gradient(self, batch: Batch) -> GradientResult:
        """Run `training_step` and differentiate it once."""
        with self._buffers() as buffers:
            loss, metrics = self._loss(batch)
            own = self._parameters(self._problem.name)
            reads = {name: self._parameters(name) for name in self._needs.cotangents}
            gradients = iter(self._first_derivatives(loss, [*own, *(p for group in reads.values() for p in group)]))
            own_gradients: list[torch.Tensor | None] = [next(gradients) for _ in own]
            cotangents = {
                name: self._layouts[name].flatten([next(gradients) for _ in group]) for name, group in reads.items()
            }
            moved = [(live, now()) for live, now in buffers if not torch.equal(live, now())]
        # Clones: the user may have returned a parameter, which is about to change.
        kept = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        return GradientResult(loss.detach().reshape(()).clone(), kept, own_gradients, cotangents, moved)

    def reads(self, batch: Batch) -> dict[str, tuple[str, ...]]:
        """Return, for each problem, the names of its trained parameters that the loss has a gradient for."""
        parameters = [
            (name, key, p)
            for name in self._problems
            for key, p in zip(self._layouts[name].names, self._parameters(name), strict=True)
        ]
        with silenced(), self._buffers():
            loss, _ = self._loss(batch)
            gradients = torch.autograd.grad(loss, [p for _, _, p in parameters], allow_unused=True)
        found: dict[str, list[str]] = {}
        for (name, key, _), gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                found.setdefault(name, []).append(key)
        return {name: tuple(keys) for name, keys in found.items()}

    def linearize(self, batch: Batch) -> AbstractLinearization:
        """Run `training_step`, silently, and keep its gradient differentiable."""
        with silenced(), self._buffers():
            with self._recorder() as recorder:
                loss, _ = self._loss(batch)
            own = self._parameters(self._problem.name)
            scale = self._problem.loss_scale
            if scale is not None:
                loss = loss * scale.value
            gradients = torch.autograd.grad(loss, own, create_graph=True, allow_unused=True)
            curved: Sequence[torch.Tensor | None] = gradients
            if recorder is not None:
                curved = curvature_gradient(self._problem.name, loss, recorder, own, gradients)
        targets = {name: self._parameters(name) for name in self._needs.mixed}
        return _AutogradLinearization(own, gradients, curved, self._layouts, self._problem.name, targets, scale)

    def read_gradient(self, batch: Batch, own: torch.Tensor) -> dict[str, torch.Tensor]:
        """Set the own parameters, differentiate by what is read, put the parameters back."""
        parameters = self._parameters(self._problem.name)
        before = [p.detach().clone() for p in parameters]
        _assign(parameters, self._layouts[self._problem.name].split(own))
        try:
            with silenced(), self._buffers():
                loss, _ = self._loss(batch)
                groups = {name: self._parameters(name) for name in self._needs.read_gradients}
                gradients = iter(self._first_derivatives(loss, [p for group in groups.values() for p in group]))
                return {
                    name: self._layouts[name].flatten([next(gradients) for _ in group])
                    for name, group in groups.items()
                }
        finally:
            _assign(parameters, before)

    def _first_derivatives(
        self, loss: torch.Tensor, parameters: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor | None]:
        scale = self._problem.loss_scale
        if scale is None:
            return torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = torch.autograd.grad(loss * scale.value, parameters, allow_unused=True)
        return [None if g is None else g / scale.value for g in gradients]

    def _recorder(self) -> contextlib.AbstractContextManager[LossFunctionRecorder | None]:
        uses_ggn = self._needs.hvp and self._needs.curvature == "ggn"
        return LossFunctionRecorder(self._parameters(self._problem.name)) if uses_ggn else contextlib.nullcontext()

    def _parameters(self, name: str) -> list[torch.Tensor]:
        if name in self._leaves:
            return self._leaves[name]
        return list(self._problems[name].trained_parameters().values())

    def _loss(self, batch: Batch) -> tuple[torch.Tensor, Mapping[str, object]]:
        tensors = [t.clone() for t in batch.tensors]  # a training_step may write to its batch
        cast = autocast(self._problem.precision, self._problem.device)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), cast:
            loss, metrics = split_result(self._problem.name, self._problem.training_step(batch.spec.unflatten(tensors)))
            check_loss(self._problem.name, loss)
        return loss, metrics

    @contextlib.contextmanager
    def _buffers(self) -> Iterator[list[tuple[torch.Tensor, Callable[[], torch.Tensor]]]]:
        """Let the pass write to copies of all module buffers; yields (live buffer, its value in this pass) pairs.

        The modules are given other tensors, rather than their values back afterwards: autograd has saved the buffers
        and refuses to differentiate through ones that were written since.
        """
        copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        places = []
        for problem in self._problems.values():
            for module in problem.module.modules():
                for name, live in module._buffers.items():
                    if live is not None:
                        copies.setdefault(id(live), (live, live.detach().clone()))
                        places.append((module, name, live))
        for module, name, live in places:
            module._buffers[name] = copies[id(live)][1]
        try:
            # Looked up when asked for: training_step may have replaced a buffer instead of writing to it.
            yield [(live, functools.partial(module.get_buffer, name)) for module, name, live in places]
        finally:
            for module, name, live in places:
                module._buffers[name] = live


class _AutogradLinearization(AbstractLinearization):
    def __init__(
        self,
        own: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        curved: Sequence[torch.Tensor | None],
        layouts: Mapping[str, FlatLayout],
        problem: str,
        targets: Mapping[str, Sequence[torch.Tensor]],
        scale: LossScale | None,
    ) -> None:
        self._scale = scale
        self._own, self._gradients, self._curved = own, gradients, curved
        self._layouts, self._problem, self._targets = layouts, problem, targets

    def hvp(self, vector: torch.Tensor) -> torch.Tensor:
        return self._product(self._curved, vector, {self._problem: self._own})[self._problem]

    def mixed(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._product(self._gradients, vector, self._targets)

    def _product(
        self,
        gradients: Sequence[torch.Tensor | None],
        vector: torch.Tensor,
        groups: Mapping[str, Sequence[torch.Tensor]],
    ) -> dict[str, torch.Tensor]:
        norm = None
        if self._scale is not None:  # the products are those of the scaled loss, along a vector of length 1
            norm = vector.norm()
            vector = vector / norm if norm > 0 else vector
        parts = self._layouts[self._problem].split(vector)
        curved = [(g, v) for g, v in zip(gradients, parts, strict=True) if g is not None and g.requires_grad]
        wanted = [t for group in groups.values() for t in group]
        products = iter(
            torch.autograd.grad(
                [g for g, _ in curved], wanted, [v for _, v in curved], allow_unused=True, retain_graph=True
            )
            if curved
            else [None] * len(wanted)
        )
        found = {name: self._layouts[name].flatten([next(products) for _ in group]) for name, group in groups.items()}
        if self._scale is None or norm is None:
            return found
        return {name: product * (norm / self._scale.value).to(product.dtype) for name, product in found.items()}


def _assign(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
