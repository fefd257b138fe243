"""Betty's `Config` and `EngineConfig`, and what they mean for mlopt."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import mlopt
from mlopt.errors import ProblemError


class BettyWarning(UserWarning):
    """Something is done otherwise than Betty does it, because Betty does not do what it says."""


_said: set[str] = set()


def warn_once(topic: str, text: str) -> None:
    """Say once per process how mlopt differs from Betty."""
    if topic not in _said:
        _said.add(topic)
        warnings.warn(f"{text} (said once; see docs/betty.md)", BettyWarning, stacklevel=5)


@dataclasses.dataclass
class Config:
    """Settings of a problem.

    Attributes:
        type: How the optimum of *this* problem is differentiated for problems above it: ``"darts"``, ``"sama"``,
            ``"neumann"`` or ``"cg"``.
        unroll_steps: Its steps between two steps of the problems above it.
        first_order: Without effect, as gradients of higher order are only computed where they are needed.
        retain_graph: Without effect: there is no graph to retain.
        allow_unused: Without effect: unused parameters are allowed.
        gradient_accumulation: Micro-batches per step. A global step of the engine is one of these micro-batches.
        gradient_clipping: Largest norm of the gradient; 0 for none.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        fp16: The same as ``precision="fp16"`` (version 0.1).
        initial_dynamic_scale: First loss scale of fp16.
        scale_factor: Without effect: loss scales are powers of two.
        warmup_steps: Its steps before the problems above it begin.
        log_step: Its losses are logged every so many global steps; not if below 1.
        log_local_step: Log under the problem's own step.
        darts_alpha: Length of the step of the finite difference.
        darts_multitask: Not supported.
        sama_adam_alpha: The same for ``"sama"``.
        sama_multitask: Not supported.
        neumann_iterations: Products with the Hessian in the Neumann series, which has one term more.
        neumann_alpha: Its step.
        cg_iterations: Steps of conjugate gradients.
        cg_alpha: Without effect: the solution does not depend on it.
    """

    type: str = "darts"
    unroll_steps: int = 1
    first_order: bool = True
    retain_graph: bool = False
    allow_unused: bool = True
    gradient_accumulation: int = 1
    gradient_clipping: float = 0.0
    precision: str = "fp32"
    fp16: bool = False
    initial_dynamic_scale: float = 4096.0
    scale_factor: float = 2.0
    warmup_steps: int = 0
    log_step: int = -1
    log_local_step: bool = False
    darts_alpha: float = 0.01
    darts_multitask: bool = False
    sama_adam_alpha: float = 1.0
    sama_multitask: bool = False
    neumann_iterations: int = 1
    neumann_alpha: float = 1.0
    cg_iterations: int = 1
    cg_alpha: float = 1.0


@dataclasses.dataclass
class EngineConfig:
    """Settings of the engine.

    Attributes:
        train_iters: Global steps.
        valid_step: Interval of ``validation`` in global steps.
        logger_type: ``"tensorboard"``, ``"wandb"`` or ``"none"``.
        roll_back: Return the problems below to the start of their unroll after every step above.
        distributed: In one process, as here, without effect but on several devices, of which mlopt uses one (version
            0.1).
        strategy: ``"default"`` only.
        backend: Of the strategy.
        distributed_backend: The same.
        local_rank: Of the strategy.
        early_stopping: End the run when `early_stopping_metric` no longer improves.
        early_stopping_metric: A number that ``validation`` returns.
        early_stopping_mode: ``"min"`` or ``"max"``.
        early_stopping_tolerance: Validations without improvement that end the run.
        mlopt_backend: ``mlopt.compile(backend=...)``; not in Betty.
    """

    train_iters: int = 50000
    valid_step: int = 500
    logger_type: str = "none"
    roll_back: bool = False
    distributed: bool = False
    strategy: str = "default"
    backend: str = "nccl"
    distributed_backend: str = "nccl"
    local_rank: int = 0
    early_stopping: bool = False
    early_stopping_metric: str = "loss"
    early_stopping_mode: str = "min"
    early_stopping_tolerance: int = 5
    mlopt_backend: str = "auto"


def precision_of(name: str, config: Config) -> str | None:
    """Return the precision as `mlopt.Problem` takes it."""
    asked = "fp16" if config.fp16 else config.precision
    if asked not in ("fp32", "fp16", "bf16"):
        raise ProblemError(f"problem {name!r}: Config(precision=...) is 'fp32', 'fp16' or 'bf16', got {asked!r}")
    return None if asked == "fp32" else asked


def estimator_of(name: str, config: Config) -> mlopt.AbstractEstimator:
    """Return the estimator that a problem's `Config.type` stands for.

    Raises:
        ProblemError: There is none.
    """
    for flag in ("darts_multitask", "sama_multitask"):
        if getattr(config, flag):
            raise ProblemError(
                f"problem {name!r}: Config({flag}=True) leaves the parameters at a perturbed point in Betty, and is "
                "not supported; leave it out"
            )
    half = precision_of(name, config) is not None
    if config.type == "darts":
        warn_once(
            "darts",
            'Config(type="darts"): Betty 0.1 leaves the parameters at a perturbed point after every hypergradient, and '
            "all versions draw new dropout masks between the two sides of the difference; mlopt does neither",
        )
        # A finite difference loses its digits in half precision; the product that it stands for does not.
        return mlopt.FiniteDifference(step=config.darts_alpha, scale=1.0, exact=half)
    if config.type == "sama":
        warn_once(
            "sama",
            'Config(type="sama"): Betty leaves the bias correction out of Adam\'s derivative and treats optimizers '
            "that it does not know as SGD; mlopt differentiates the real step of the optimizer",
        )
        return mlopt.SAMA(step=config.sama_adam_alpha, exact=half)
    if config.type == "neumann":
        return mlopt.Neumann(num_terms=config.neumann_iterations + 1, scale=config.neumann_alpha)
    if config.type == "cg":
        if config.cg_iterations > 1:
            warn_once(
                "cg",
                'Config(type="cg"): Betty 0.1 updates the directions with an old residual, and all versions diverge '
                "with cg_alpha other than 1; mlopt makes the iterations of conjugate gradients, and ignores cg_alpha",
            )
        return mlopt.CG(max_steps=config.cg_iterations, rtol=0.0)
    if config.type == "reinforce":
        raise ProblemError(
            f"problem {name!r}: Config(type='reinforce') is an empty function in Betty; use 'darts', 'sama', 'neumann' "
            "or 'cg', or an IterativeProblem. examples/reward.py shows policy gradients with mlopt"
        )
    raise ProblemError(f"problem {name!r}: Config(type=...) is 'darts', 'sama', 'neumann' or 'cg', got {config.type!r}")


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config's fields."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
