"""The Inductor backend: every graph as an AOTInductor package, compiled in parallel and kept on disk.

Matrix products are rewritten where Inductor's own choice is slow (`thin.py`, `small.py`). The graph is made plain data
(`spec.py`) after everything that is not a computed tensor was cut off (`interface.py`), looked up by its hash
(`cache.py`) or compiled in a process of its own (`pool.py`, `worker.py`), and called through the native loader
(`lowered.py`), which checks every input. `backend.py` is the whole path; `choice.py` adds, for ``backend="auto"``, the
choice between the package and the eager graph.

Parameters and constants are inputs of a package, so it holds no values and serves every run of the same program.
"""

from mlopt.backends.inductor.backend import InductorBackend, missing

__all__ = ["InductorBackend", "missing"]
