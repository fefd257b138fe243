"""mlopt beside somebody else's loop: a callback as Hugging Face's ``Trainer`` has them, which trains the upper problem.

The trainer owns model, optimizer and loop. Every few of its steps the callback takes the hypergradient at the present
parameters and steps the upper problem with it; the loss of the trainer reads the upper problem's module.

    trainer = Trainer(model, ..., callbacks=[HypergradientCallback(plan, "reweight", every=5)])
"""

from __future__ import annotations

import mlopt

try:
    from transformers import TrainerCallback
except ImportError:  # any object with these methods will do for a loop like Trainer's
    TrainerCallback = object


class HypergradientCallback(TrainerCallback):
    """Steps an upper problem in the rhythm of a trainer.

    Args:
        plan: The program; its lower problem has the module and the optimizer that the trainer steps.
        problem: Name of the upper problem.
        every: Steps of the trainer between two steps of the upper problem.
        after: Steps of the trainer before the first.
    """

    def __init__(self, plan: mlopt.Plan, problem: str, every: int, after: int = 0) -> None:
        self.plan, self.every, self.after = plan, every, after
        self.problem = plan.graph.problems[problem]
        self.num_steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        """Step the upper problem, if it is its turn."""
        if state.global_step <= self.after or state.global_step % self.every:
            return
        gradients = self.plan.hypergradient(self.problem)
        for name, parameter in self.problem.trained_parameters().items():
            parameter.grad = gradients[name]
        self.problem.optimizer.step()
        self.problem.optimizer.zero_grad()
        self.num_steps += 1
