"""Exceptions and warnings of mlopt.

Every user mistake is an `MloptError` that says where (which problem, which argument), what was expected and what
was found, and what to do. The concrete classes also derive from the builtin exception that fits (`ValueError`,
`RuntimeError`, `AttributeError`), so code that catches those keeps working. Numerical outcomes of a solve are not
exceptions: they are data (`mlopt.linalg.Outcome`).
"""


class MloptError(Exception):
    """Base class of every error that mlopt raises on purpose."""


class ProblemError(MloptError, ValueError):
    """A `Problem` was put together wrongly (no optimizer, empty loader, bad step counts, ...)."""


class UnknownNameError(MloptError, AttributeError):
    """A `training_step` read an attribute that is neither the problem's own nor another problem's name."""


class GraphError(MloptError, ValueError):
    """The problems do not form a valid graph (name clash, undeclared or unread edge, cycle)."""


class LossError(MloptError, ValueError):
    """A `training_step` returned no differentiable scalar loss, or one that the estimator cannot be used with."""


class CaptureError(MloptError, RuntimeError):
    """A `training_step` could not be captured as a graph."""


class UpdateError(MloptError, ValueError):
    """An optimizer's step cannot be differentiated, or cannot be captured as a graph."""


class DataError(MloptError, ValueError):
    """A problem's data is empty, ran out, or yields batches that mlopt cannot read."""


class VerificationError(MloptError, RuntimeError):
    """A compiled derivative disagrees with eager autograd (only raised with ``strict=True``)."""


class NonFiniteError(MloptError, RuntimeError):
    """A loss, gradient or hypergradient is NaN or infinite."""


class StateError(MloptError, ValueError):
    """The user's objects are no longer those that a plan was compiled for."""


class SaveError(MloptError, ValueError):
    """A plan cannot be saved, or a saved plan cannot be loaded."""


class CheckpointError(MloptError, RuntimeError):
    """A checkpoint is damaged, or none of those in a folder can be used."""


class VerificationWarning(UserWarning):
    """A compiled derivative disagrees with eager autograd; the eager one is used from here on."""


class IslandWarning(UserWarning):
    """A problem could not be captured and runs by plain autograd, with the same results (an eager island)."""


class BackendWarning(UserWarning):
    """The backend that was asked for cannot be used; the eager one is used instead."""


class NonFiniteWarning(UserWarning):
    """A step was not finite and has been left out, or the program rolled back."""


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged; an earlier one is used instead."""


class SolverWarning(UserWarning):
    """A linear solve broke down or met non-finite numbers."""


class StructureWarning(UserWarning):
    """The problem graph is legal but probably not what was meant (for example a structurally zero hypergradient)."""
