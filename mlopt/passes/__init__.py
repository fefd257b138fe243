"""FX -> FX rewrites of functional graphs, one per file.

A pass takes a `GraphModule`, rewrites it in place, lints, recompiles and returns it; it keeps the numerics, does
nothing where nothing matches, and changes nothing when run twice. The list below is the whole optimizer.
"""

from mlopt.passes.merge_equal_nodes import merge_equal_nodes_pass
from mlopt.passes.remove_dead_nodes import remove_dead_nodes_pass
from mlopt.passes.remove_identities import remove_identities_pass
from mlopt.passes.runner import DEFAULT_PASSES, run_default_passes

__all__ = [
    "DEFAULT_PASSES",
    "merge_equal_nodes_pass",
    "remove_dead_nodes_pass",
    "remove_identities_pass",
    "run_default_passes",
]
