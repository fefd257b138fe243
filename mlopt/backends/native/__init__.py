"""The native backend: parts of graphs that kernels of `mlopt.ops` are written for, run by them.

`glm.py` puts kernels of the family `glm` in place of whole Hessian products, `descent.py` in place of loops of
optimizer steps, `skinny.py` in place of matrix products with few columns. Everything else runs by another backend, and
so does what that is measured to be faster at.
"""

from mlopt.backends.native.backend import NativeBackend

__all__ = ["NativeBackend"]
