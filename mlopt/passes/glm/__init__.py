"""Finds out that a Hessian product is ``P^T (X^T f(X P v)) + diagonal * v``, with f acting on every row by itself.

That is the curvature of a loss which reads its parameters only through ``X W + b``, whatever the loss: softmax and
logistic regression, hyper-cleaning, linear heads on frozen features. `structure.py` looks at the graph of a product and
says what it found, or nothing; `values.py` holds what it knows of a node, `rules.py` how each operation acts on that,
`simplify.py` makes graphs look alike first. The proof is by exclusion: every node that depends on v must be covered by
a rule. The curvature f is then read off the graph itself, so there is no list of losses.

`descent.py` finds whole optimizer steps on such losses, where their gradient is of one of three kinds (`fits.py`), in a
step taken apart by `step_model.py`.
"""

from mlopt.passes.glm.descent import GlmDescentStructure, find_descent
from mlopt.passes.glm.fits import GlmFitKind
from mlopt.passes.glm.rules import is_widened
from mlopt.passes.glm.structure import ONE_TASK, GlmRowKind, GlmStructure, find_glm

__all__ = [
    "ONE_TASK",
    "GlmDescentStructure",
    "GlmFitKind",
    "GlmRowKind",
    "GlmStructure",
    "find_descent",
    "find_glm",
    "is_widened",
]
