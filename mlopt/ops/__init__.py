"""Vector operations of the solvers: native kernels where they are built, plain torch otherwise.

`library.py` loads the extension; `vector.py` (updates of solvers' vectors), `glm.py` (losses that read parameters
through ``X @ W``) and `matmul.py` (products of small matrices) hold the public functions, `reference/` their
plain-torch twins; `recorder.py` records native loops as CUDA graphs. This package knows nothing of operators, solvers
or problems.
"""

from mlopt.ops.glm import (
    GlmDescent,
    GlmGradient,
    GlmSeries,
    GlmSolve,
    glm_cg,
    glm_gd,
    glm_gradient,
    glm_hvp,
    glm_matmul,
    glm_matmul_t,
    glm_neumann,
)
from mlopt.ops.library import BUILD_COMMAND, available, build_config, has_kernels, missing
from mlopt.ops.matmul import small_mm
from mlopt.ops.recorder import recorder_for
from mlopt.ops.vector import CgState, cg_init, cg_step_, dot, is_native, neumann_step_, norm, perturb

__all__ = [
    "BUILD_COMMAND",
    "CgState",
    "GlmDescent",
    "GlmGradient",
    "GlmSeries",
    "GlmSolve",
    "available",
    "build_config",
    "cg_init",
    "cg_step_",
    "dot",
    "glm_cg",
    "glm_gd",
    "glm_gradient",
    "glm_hvp",
    "glm_matmul",
    "glm_matmul_t",
    "glm_neumann",
    "has_kernels",
    "is_native",
    "missing",
    "neumann_step_",
    "norm",
    "perturb",
    "recorder_for",
    "small_mm",
]
