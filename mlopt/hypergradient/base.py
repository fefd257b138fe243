"""The contract of a hypergradient estimator.

For a lower problem with loss g, parameters theta and Hessian ``H = d2g/dtheta2``, a cotangent v at theta contributes
``-(d2g/dlambda dtheta)^T q`` with ``H q = v`` to every lambda that g reads (implicit function theorem; e.g. Lorraine,
Vicol and Duvenaud 2020, arXiv 1911.02590). Estimators differ in how they obtain q, and in whether the mixed product is
exact or a finite difference; that is the whole contract. Everything else (linearizations, sharing, accumulation over
the problem graph) is the planner's and the runtime's.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import torch

from mlopt.linalg import AbstractLinearOperator, Solution


class AbstractEstimator(abc.ABC):
    """How the best response of one lower problem is differentiated.

    To add one, subclass and write `solve`; pass an instance as ``hypergradient=`` of a problem. Instances are values:
    immutable, comparable, free of state (a warm start is kept by the plan).
    """

    #: Whether `solve` multiplies with the operator. If False no Hessian product is built for the problem.
    uses_hvp: bool = True

    #: Whether `solve` gets, in place of H, the diagonal operator ``-d theta' / d gradient`` of the next optimizer step.
    uses_update: bool = False

    #: None, or through how many of the last optimizer steps the plan differentiates instead of solving a system.
    unrolled_steps: int | None = None

    #: What `solve` is given for H: ``"hessian"``, or ``"ggn"`` for the generalized Gauss-Newton matrix of the loss,
    #: which is positive semi-definite where the loss is a convex function of network outputs.
    curvature: str = "hessian"

    #: Whether the plan hands the previous q of the same place in the program to `solve` as its first guess.
    warm_start: bool = False

    #: None for the exact mixed product; else the length (in the norm of the lower parameters) of the step of a
    #: central difference.
    mixed_step: float | None = None

    @abc.abstractmethod
    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Return q for ``H q = v``.

        Args:
            operator: The lower problem's Hessian H [N, N]; not to be used if `uses_hvp` is False.
            cotangent: v [N]; must not be written.
            guess: A first guess for q [N], or None.

        Returns:
            The solution; ``value`` is q [N].
        """

    def max_hvps(self, size: int) -> int:
        """Return the most products with H [N, N] that one solve makes (for the cost column of ``explain()``)."""
        return 0

    def hvps_at_once(self, size: int) -> int:
        """Return how many products `solve` asks for in one call of ``operator.mm``, for which a graph is then made.

        It may ask for fewer, and for more, which are then made in so many calls. 0: it multiplies one by one.
        """
        return 0

    def check(self, problem: str, size: int) -> None:  # noqa: B027 - optional for subclasses
        """Refuse a lower problem with N parameters that this estimator cannot serve (called by ``compile``).

        Raises:
            ValueError: See the estimator.
        """

    def __repr__(self) -> str:
        """Print the settings, without options that are switched off."""
        if not dataclasses.is_dataclass(self):
            return super().__repr__()
        fields = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]
        shown = [(f.name, v) for f, v in fields if v != f.default or not isinstance(v, str | None)]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"


def check_number(owner: str, argument: str, value: Any, *, positive: bool) -> None:
    """Raise ValueError unless `value` is a finite number, positive (or not negative)."""
    valid = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or value < 0 or (positive and value == 0):
        raise ValueError(
            f"{owner}, argument `{argument}`: expected a finite number {'> 0' if positive else '>= 0'}, got {value!r}"
        )


def check_count(owner: str, argument: str, value: Any) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner}, argument `{argument}`: expected an integer >= 1, got {value!r}")


def check_curvature(owner: str, value: Any) -> None:
    """Raise ValueError unless `value` names a curvature."""
    if value not in ("hessian", "ggn"):
        raise ValueError(f"{owner}, argument `curvature`: expected 'hessian' or 'ggn', got {value!r}")
