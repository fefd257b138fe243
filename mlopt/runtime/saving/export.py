"""`export_hypergradient`: the hypergradient of a two-level program as three packages that need no Python.

Loading and calling them takes torch's C++ library only. The loop of the solver is left to the caller, who has the
product as a function: ``examples/cpp/hypergradient.cpp`` is one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlopt.backends import EagerBackend, inductor
from mlopt.capture import InputRole, LossGraph
from mlopt.errors import SaveError
from mlopt.hypergradient import CG, Neumann
from mlopt.planner import Gradient, Linearize, MixedProduct, Solve, Update
from mlopt.planner.instructions import HYPERGRADIENT
from mlopt.runtime.data import Batch
from mlopt.runtime.derivatives import GraphDerivatives
from mlopt.runtime.execute import Executor
from mlopt.runtime.saving.archive import writing

# Largest relative difference of two evaluations of one package's outputs, as when a plan is verified.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}


def export_hypergradient(path: str | os.PathLike[str], executor: Executor, name: str) -> None:
    """Write the packages; see `Plan.export_hypergradient`."""
    reason = inductor.missing()
    if reason is not None:
        raise SaveError(f"packages cannot be compiled here: {reason}")
    formula = _Formula(executor, name)
    with writing(path) as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export of tensors that are parameters elsewhere
        inputs = [t.detach().clone() for t in formula.inputs.values()]
        _, cotangent, *residuals = formula.point(*inputs)
        numbers = formula.solver_numbers()
        _compile(folder / "point.pt2", formula.point, inputs, numbers)
        _compile(folder / "hvp.pt2", formula.hvp, [*residuals, cotangent], {})
        _compile(folder / "mixed.pt2", formula.mixed, [*residuals, cotangent], {})
        torch.save(inputs, folder / "inputs.pt")
        described = {
            "inputs": [_describe(key, t) for key, t in formula.inputs.items()],
            "hypergradient": [_describe(key, t) for key, t in executor.problems[name].trained_parameters().items()],
            "solver": numbers,
        }
        (folder / "hypergradient.json").write_text(json.dumps(described, indent=1))


class _Formula:
    """The three functions, by the graphs of the plan.

    Attributes:
        inputs: Live tensors and the tensors of the batches, by name, in the order `point` takes them.
    """

    def __init__(self, executor: Executor, name: str) -> None:
        self._name = name
        self._solve = _two_levels(executor, name)
        lower = self._solve.problem
        self._layouts = executor.layouts
        self._batches = {name: _only(name, executor.states[name].stream.ahead(_accumulation(executor, name)))}
        self._batches[lower] = _only(lower, [s.batch for s in executor.lower_samples(lower)])
        self._derivatives = {
            problem: _eager(problem, executor.derivatives(problem, batch)) for problem, batch in self._batches.items()
        }
        self._live: dict[str, torch.Tensor] = {}
        for derivatives in self._derivatives.values():
            self._live.update(_live_inputs(derivatives.graphs.loss))
        entries = [(p, i) for p, batch in self._batches.items() for i in range(len(batch.tensors))]
        batches = {f"batch of {p}[{i}]": self._batches[p].tensors[i] for p, i in entries}
        self.inputs = {**self._live, **batches}
        self._constants: list[Any] = []  # what the primal graph hands over besides tensors: sizes, which are fixed here

    def point(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the direct gradient [N_u], the cotangent v [N], and the residuals of the products."""
        tensors = iter(inputs)
        values = {id(live): next(tensors) for live in self._live.values()}
        batches = {p: Batch([next(tensors) for _ in b.tensors], b.spec) for p, b in self._batches.items()}
        lower, upper = self._solve.problem, self._derivatives[self._name]
        with upper.at(values), self._derivatives[lower].at(values):
            result = upper.gradient(batches[self._name])
            residuals = self._derivatives[lower].residuals(batches[lower])
        self._constants = [None if isinstance(r, torch.Tensor) else r for r in residuals]
        direct = self._layouts[self._name].flatten(result.own)
        made = [r for r in residuals if isinstance(r, torch.Tensor)]
        # In plain order, and tensors of their own even where they are inputs or share memory.
        return tuple(
            t.detach().clone(memory_format=torch.contiguous_format) for t in (direct, result.cotangents[lower], *made)
        )

    def hvp(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return ``H p`` [N] of residuals and p [N]."""
        *residuals, vector = inputs
        return (self._linearization(residuals).hvp(vector),)

    def mixed(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return ``(d2g/du dtheta)^T q`` [N_u] of residuals and q [N]."""
        *residuals, vector = inputs
        return (self._linearization(residuals).mixed(vector)[self._name],)

    def _linearization(self, residuals: Sequence[torch.Tensor]) -> Any:
        tensors = iter(residuals)
        merged = [next(tensors) if constant is None else constant for constant in self._constants]
        return self._derivatives[self._solve.problem].linearization_of(merged)

    def solver_numbers(self) -> dict[str, str]:
        """Return the estimator's settings."""
        estimator = self._solve.estimator
        kind = type(estimator).__name__
        settings = {f.name: getattr(estimator, f.name) for f in dataclasses.fields(estimator)}  # type: ignore[arg-type]
        return {"solver": kind} | {k: str(v) for k, v in settings.items() if isinstance(v, int | float)}


def _two_levels(executor: Executor, name: str) -> Solve:
    """Return the one solve of a program of the form that can be exported."""
    first, *others = [i for i in executor.plan[name].instructions if not isinstance(i, Update)]
    kinds = [type(i) for i in others]
    if not isinstance(first, Gradient) or kinds != [Linearize, Solve, MixedProduct]:
        found = ", ".join(kind.__name__ for kind in kinds) or "no second-order instruction"
        raise SaveError(
            f"problem {name!r}: only the hypergradient of two levels, by one solve and one exact mixed product, can be "
            f"exported; its program has {found}. Plan.save keeps any program, for Python"
        )
    _, solve, mixed = others
    assert isinstance(solve, Solve) and isinstance(mixed, MixedProduct)
    estimator = solve.estimator
    plain = type(estimator) is Neumann or (type(estimator) is CG and estimator.preconditioner is None)
    if not plain or mixed.step is not None or mixed.targets != ((name, HYPERGRADIENT),):
        raise SaveError(
            f"problem {name!r}: hypergradients by CG (without a preconditioner) or Neumann with exact mixed products "
            f"can be exported, got {estimator!r}"
        )
    return solve


def _accumulation(executor: Executor, name: str) -> int:
    return executor.problems[name].gradient_accumulation


def _only(name: str, batches: Sequence[Batch]) -> Batch:
    if len(batches) != 1:
        raise SaveError(f"problem {name!r}: its step has {len(batches)} micro-batches; one can be exported")
    return batches[0]


def _eager(name: str, derivatives: Any) -> GraphDerivatives:
    """Return derivatives by the plan's graphs, run by torch, so that they can be traced."""
    if not isinstance(derivatives, GraphDerivatives):
        raise SaveError(f"problem {name!r} runs by plain autograd on its training_step, which cannot be exported")
    if derivatives.is_random:
        raise SaveError(
            f"problem {name!r}: its loss draws random numbers, which a package cannot draw again as the step did; put "
            "its module into eval() first"
        )
    if derivatives.graphs.has_tasks:
        raise SaveError(f"problem {name!r} has tasks; hypergradients of one task can be exported")
    return GraphDerivatives(dataclasses.replace(derivatives.graphs, step=None), EagerBackend())


def _live_inputs(loss: LossGraph) -> dict[str, torch.Tensor]:
    """Return the parameters, buffers and other live tensors that a loss uses, by name."""
    placeholders = [n for n in loss.module.graph.nodes if n.op == "placeholder"]
    return {
        f"{x.problem}.{x.name}": x.tensor
        for x, node in zip(loss.inputs, placeholders, strict=True)
        if x.role is not InputRole.BATCH and x.tensor is not None and node.users
    }


class _Function(nn.Module):
    """A function, as torch.export takes it."""

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._function(*inputs)


def _compile(
    path: Path, function: Callable[..., tuple[torch.Tensor, ...]], inputs: list[torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write a function as a package for the sizes of these inputs, and check what it computes of them."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    expected = function(*inputs)
    program = torch.export.export(_Function(function), tuple(inputs), strict=False)
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": metadata})
    for got, value in zip(aoti_load_package(str(path))(*inputs), expected, strict=True):
        if not value.dtype.is_floating_point:
            continue
        difference, scale = float((got - value).double().norm()), float(value.double().norm())
        if difference > _TOLERANCES.get(value.dtype, 1e-1) * scale + 1e-12:
            raise SaveError(
                f"{path.name} differs from the graph that it was compiled from: {difference:.1e}, {scale:.1e}"
            )


def _describe(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    return {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
