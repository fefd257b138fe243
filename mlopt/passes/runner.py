"""The list of passes and the loop that runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import fx

from mlopt.passes.merge_equal_nodes import merge_equal_nodes_pass
from mlopt.passes.remove_dead_nodes import remove_dead_nodes_pass
from mlopt.passes.remove_identities import remove_identities_pass
from mlopt.passes.remove_neutral_operands import remove_neutral_operands_pass

logger = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule], fx.GraphModule]

# The order matters: what does nothing hides equal nodes from the merge, and all leave dead nodes behind.
DEFAULT_PASSES: tuple[Pass, ...] = (
    remove_identities_pass,
    remove_neutral_operands_pass,
    merge_equal_nodes_pass,
    remove_dead_nodes_pass,
)


def run_default_passes(module: fx.GraphModule) -> fx.GraphModule:
    """Run `DEFAULT_PASSES` over a functional graph, in place."""
    for rewrite in DEFAULT_PASSES:
        before = len(module.graph.nodes)
        rewrite(module)
        logger.debug("%s: %d -> %d nodes", rewrite.__name__, before, len(module.graph.nodes))
    return module
