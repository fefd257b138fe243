"""FX -> FX rewrites of functional graphs, one per file.

A pass takes a `GraphModule`, rewrites it in place, lints, recompiles and returns it; it keeps the numerics, does
nothing where nothing matches, and changes nothing when run twice. `DEFAULT_PASSES` is the whole optimizer;
`remove_fresh_writes_pass` makes recorded graphs functional in the first place. `find_glm`, `find_descent` and `extract`
change nothing: they find the structure that kernels are written for, and take parts of a graph out. `size_hint` is the
number that such choices take for a free size; `call` makes new nodes.
"""

from mlopt.passes.call import call
from mlopt.passes.extract import ancestors, draws_random, extract, is_random
from mlopt.passes.glm import (
    ONE_TASK,
    GlmDescentStructure,
    GlmFitKind,
    GlmRowKind,
    GlmStructure,
    find_descent,
    find_glm,
)
from mlopt.passes.hints import size_hint
from mlopt.passes.merge_equal_nodes import merge_equal_nodes_pass
from mlopt.passes.remove_dead_nodes import remove_dead_nodes_pass
from mlopt.passes.remove_fresh_writes import has_writes, remove_fresh_writes_pass
from mlopt.passes.remove_identities import remove_identities_pass
from mlopt.passes.remove_neutral_operands import remove_neutral_operands_pass
from mlopt.passes.runner import DEFAULT_PASSES, run_default_passes

__all__ = [
    "DEFAULT_PASSES",
    "ONE_TASK",
    "GlmDescentStructure",
    "GlmFitKind",
    "GlmRowKind",
    "GlmStructure",
    "ancestors",
    "call",
    "draws_random",
    "extract",
    "find_descent",
    "find_glm",
    "has_writes",
    "is_random",
    "merge_equal_nodes_pass",
    "remove_dead_nodes_pass",
    "remove_fresh_writes_pass",
    "remove_identities_pass",
    "remove_neutral_operands_pass",
    "run_default_passes",
    "size_hint",
]
