"""What is measured of a method on a problem: equal results first, then time, memory and compile time."""

from benchmarks.measures.equality import Disagreement, check_equal
from benchmarks.measures.memory import peak_memory

__all__ = ["Disagreement", "check_equal", "peak_memory"]
