"""Who solves it. A method takes an instance, a case (the estimator) and the problem's name, and gives a runner."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.methods.base import CASES, AbstractRunner, UnavailableError
from benchmarks.methods.betty import Betty
from benchmarks.methods.compiled import Compiled
from benchmarks.methods.eager import Eager
from benchmarks.methods.jax_program import Jax
from benchmarks.problems import Instance

METHODS: dict[str, Callable[[Instance, str, str], AbstractRunner]] = {
    "hand-written": lambda instance, case, _: Eager(instance, case),
    "betty": lambda instance, case, _: Betty(instance, case),
    "jax": lambda instance, case, name: Jax(instance, case, name),
    "mlopt-eager": lambda instance, case, _: Compiled(instance, case, "eager"),
    "mlopt": lambda instance, case, _: Compiled(instance, case, "auto"),
    "mlopt-inductor": lambda instance, case, _: Compiled(instance, case, "inductor"),
}
# What is compared unless methods are named: the last one takes long to compile, and on CPUs "mlopt" has it anyway.
DEFAULT_METHODS = [name for name in METHODS if name != "mlopt-inductor"]

__all__ = ["CASES", "DEFAULT_METHODS", "METHODS", "AbstractRunner", "UnavailableError"]
