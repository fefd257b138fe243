"""The state that a batch of conjugate-gradient solves keeps on the device."""

from __future__ import annotations

import torch


class CgState:
    """Named columns of the state tensor [5] or [K, 5] that `mlopt.ops.cg_step_` reads and writes.

    The columns are views: ``state.rr`` is ``tensor[..., 0]``.

    Attributes:
        tensor: The state, in the dtype of per-row scalars.
    """

    RUNNING, CONVERGED, BREAKDOWN, NON_FINITE = 0, 1, 2, 3
    NUM_COLUMNS = 5

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def rr(self) -> torch.Tensor:
        """Squared norm of the residual, by recurrence."""
        return self.tensor[..., 0]

    @property
    def tolerance2(self) -> torch.Tensor:
        """A row has converged when ``rr <= tolerance2``."""
        return self.tensor[..., 1]

    @property
    def status(self) -> torch.Tensor:
        """RUNNING, CONVERGED, BREAKDOWN (``p . Ap <= 0``) or NON_FINITE; only running rows are changed by a step."""
        return self.tensor[..., 2]

    @property
    def num_steps(self) -> torch.Tensor:
        """Steps made."""
        return self.tensor[..., 3]

    @property
    def pap(self) -> torch.Tensor:
        """``p . Ap`` of the last step tried."""
        return self.tensor[..., 4]
