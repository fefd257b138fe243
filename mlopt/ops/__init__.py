"""Vector operations of the solvers: native kernels where they are built, plain torch otherwise.

`library.py` loads the extension, `vector.py` holds the public functions, `reference/` their plain-torch twins. This
package knows nothing of operators, solvers or problems.
"""

from mlopt.ops.library import available, build_config
from mlopt.ops.vector import CgState, cg_init, cg_step_, dot, is_native, neumann_step_, norm, perturb

__all__ = [
    "CgState",
    "available",
    "build_config",
    "cg_init",
    "cg_step_",
    "dot",
    "is_native",
    "neumann_step_",
    "norm",
    "perturb",
]
