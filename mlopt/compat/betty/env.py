"""`Env`: what problems act on, as Betty has it."""

from __future__ import annotations

from typing import Any


class Env:
    """An environment. Every problem has it as ``self.env``, and it has every problem by its name."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Override it."""
        raise NotImplementedError(f"{type(self).__name__} does not define step")

    def reset(self) -> Any:
        """Override it."""

    def set_problem_attr(self, problem: Any) -> str:
        """Make a problem an attribute."""
        setattr(self, problem.name, problem)
        return str(problem.name)
