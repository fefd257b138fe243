"""From a `LossGraph` to the graphs of its derivatives, before any lowering.

Owns tracing and the split of second-order products into a primal half (run once per state) and tangent halves (run
once per vector). Every graph that leaves here is functional (no in-place operations), flat (tensors in, tensors out)
and contains its backward passes explicitly. Differentiation comes before lowering because compilers of PyTorch code
do not differentiate twice. `step.py` puts the gradient and a captured optimizer update together; the derivatives of an
update are taken of the optimizer's own code (`update.py`).
"""

from mlopt.autodiff.descent import DescentGraph, descent_graph
from mlopt.autodiff.gradient import GradientGraph, ReadGradientGraph, gradient_graph, read_gradient_graph
from mlopt.autodiff.layers import replace_layers
from mlopt.autodiff.layout import FlatLayout
from mlopt.autodiff.linearization import (
    LinearizationGraphs,
    gradient_and_linearization_graphs,
    linearization_graphs,
    shares_gradient,
)
from mlopt.autodiff.recompute import Recompute, SplitPolicy
from mlopt.autodiff.repeat import RepeatedSteps, num_repeated, repeated_steps
from mlopt.autodiff.rows import fits
from mlopt.autodiff.scaling import scale_gradients
from mlopt.autodiff.step import StepGraph, present_gradients, step_graph
from mlopt.autodiff.tasks import (
    TaskAxis,
    gradient_over_tasks,
    linearization_over_tasks,
    read_gradient_over_tasks,
)
from mlopt.autodiff.total_update import TotalUpdateGraph, total_update_graph, with_gradient
from mlopt.autodiff.trace import TracedGraph
from mlopt.passes import is_random

__all__ = [
    "DescentGraph",
    "FlatLayout",
    "GradientGraph",
    "LinearizationGraphs",
    "ReadGradientGraph",
    "Recompute",
    "RepeatedSteps",
    "SplitPolicy",
    "StepGraph",
    "TaskAxis",
    "TotalUpdateGraph",
    "TracedGraph",
    "descent_graph",
    "fits",
    "gradient_and_linearization_graphs",
    "gradient_graph",
    "gradient_over_tasks",
    "is_random",
    "linearization_graphs",
    "linearization_over_tasks",
    "num_repeated",
    "present_gradients",
    "read_gradient_graph",
    "read_gradient_over_tasks",
    "repeated_steps",
    "replace_layers",
    "scale_gradients",
    "shares_gradient",
    "step_graph",
    "total_update_graph",
    "with_gradient",
]
