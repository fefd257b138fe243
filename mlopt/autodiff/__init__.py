"""From a `LossGraph` or an `UpdateGraph` to the graphs of its derivatives, before any lowering.

Owns tracing and the split of second-order products into a primal half (run once per state) and tangent halves (run
once per vector). Every graph that leaves here is functional (no in-place operations), flat (tensors in, tensors out)
and contains its backward passes explicitly. Differentiation comes before lowering because compilers of PyTorch code
do not differentiate twice.
"""

from mlopt.autodiff.gradient import GradientGraph, ReadGradientGraph, gradient_graph, read_gradient_graph
from mlopt.autodiff.layout import FlatLayout
from mlopt.autodiff.linearization import LinearizationGraphs, linearization_graphs
from mlopt.autodiff.trace import TracedGraph
from mlopt.autodiff.update import UpdateFactorGraph, UpdateVjpGraph, update_factor, update_vjp

__all__ = [
    "FlatLayout",
    "GradientGraph",
    "LinearizationGraphs",
    "ReadGradientGraph",
    "TracedGraph",
    "UpdateFactorGraph",
    "UpdateVjpGraph",
    "gradient_graph",
    "linearization_graphs",
    "read_gradient_graph",
    "update_factor",
    "update_vjp",
]
