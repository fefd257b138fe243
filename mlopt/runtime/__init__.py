"""Runs an `ExecutionPlan`.

`plan.py` is the public object; `execute.py` carries out instructions and decides nothing; `derivatives.py` is the
contract by which a problem's loss is differentiated, with the captured graphs and, in `reference.py`, plain autograd
behind it. `steps.py` makes a whole optimizer step by one graph, `ahead.py` many of them in one native loop.
"""

from mlopt.runtime.finite import NonFiniteGuard
from mlopt.runtime.plan import Plan

__all__ = ["NonFiniteGuard", "Plan"]
