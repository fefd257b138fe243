"""The derivative of the optimizer's update in place of the inverse Hessian."""

from __future__ import annotations

import dataclasses

import torch

from mlopt.hypergradient.base import AbstractEstimator, check_number
from mlopt.hypergradient.identity import scaled
from mlopt.linalg import AbstractLinearOperator, Solution


@dataclasses.dataclass(frozen=True, repr=False)
class SAMA(AbstractEstimator):
    """``q = (-d theta' / d gradient) * v``, theta' being what the lower optimizer's next step makes of theta.

    Choe et al. 2023, arXiv 2310.05674, section 3.2: the base Jacobian is that of the update that the optimizer really
    makes, and its inverse is left out. The factor is obtained by differentiating the optimizer's own step at its
    present state, bias correction included, so it works for every optimizer that acts element by element; others are
    refused by name. For plain SGD it is the learning rate. The mixed product is exact, or by a central difference as
    in the paper.

    Attributes:
        step: Length of the difference's step in the space of the lower parameters, used with ``exact=False``.
        exact: See `mlopt.FiniteDifference`.
    """

    step: float = 0.01
    exact: bool = True

    uses_hvp = False
    uses_update = True

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: A setting is out of range.
        """
        check_number("SAMA", "step", self.step, positive=True)

    @property
    def mixed_step(self) -> float | None:  # type: ignore[override]
        """The step of the central difference, or None for the exact product."""
        return None if self.exact else self.step

    def solve(self, operator: AbstractLinearOperator, cotangent: torch.Tensor, guess: torch.Tensor | None) -> Solution:
        """Multiply with the factor, which is what `operator` is here."""
        product = operator.mv(cotangent) if cotangent.ndim == 1 else operator.mm(cotangent)
        return scaled(product, 1.0)
