"""Betty's problem classes: `mlopt.Problem` that is put together when the engine asks for it.

Betty sets modules, optimizers and data up in its engine, after ``__init__``; so here ``__init__`` only keeps what it is
given, and `Problem.initialize` calls that of `mlopt.Problem`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import mlopt
from mlopt.compat.betty.configs import Config, EngineConfig, estimator_of, precision_of, warn_once
from mlopt.errors import ProblemError


class Problem(mlopt.Problem):
    """A problem as Betty has it.

    Args:
        name: A Python identifier.
        config: See `Config`; the defaults if None.
        module: The network; or override ``configure_module``.
        optimizer: Its optimizer; or override ``configure_optimizer``.
        scheduler: A scheduler; or override ``configure_scheduler``.
        train_data_loader: A loader, or a tuple of several; or override ``configure_train_data_loader`` or
            ``get_batch``.
        device: Where the module is moved to (version 0.1), or
        extra_config: whatever the problem wants to know (version 0.2).

    Attributes:
        config: As given.
        env: The engine's environment.
        logger: The engine's logger.
    """

    def __init__(
        self,
        name: str | None = None,
        config: Config | None = None,
        module: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        train_data_loader: Any = None,
        device: Any = None,
        extra_config: Any = None,
    ) -> None:
        if device is not None and not isinstance(device, str | torch.device | int):
            device, extra_config = None, device  # the seventh argument of version 0.2
        self.name = "problem" if name is None else name
        self.config = Config() if config is None else config
        self.module = module  # type: ignore[assignment]
        self.optimizer = optimizer  # type: ignore[assignment]
        self.scheduler = scheduler
        self.train_data_loader = train_data_loader
        self.extra_config = extra_config
        self.env = None
        self.logger: Any = None
        self._device = device
        self._plan: mlopt.Plan | None = None
        self._uppers: list[Problem] = []
        self._lowers: list[Problem] = []
        self._iterators: list[Iterator[Any]] = []
        self._has_been_used = False

    def initialize(self, engine_config: EngineConfig) -> None:
        """Set module, optimizer and data up (called by `Engine`).

        Raises:
            ProblemError: Something is missing.
        """
        name, config = self.name, self.config
        if self._has_been_used:
            raise ProblemError(f"problem {name!r} belongs to another Engine already; make a new one")
        if not config.first_order and self._lowers:
            warn_once(
                "first_order",
                "Config(first_order=False): Betty then leaves the gradient through the problems below out, and the "
                "problem does not learn; mlopt always computes it",
            )
        module = self._configured("configure_module") or self.module
        if module is None:
            raise ProblemError(f"problem {name!r}: no module; pass module=..., or override configure_module(self)")
        self.module = module.to(self._device) if self._device is not None else module
        optimizer = self._configured("configure_optimizer") or self.optimizer
        custom = getattr(type(self), "custom_optimizer_step", None)
        if optimizer is None and custom is not None:
            # It trains all parameters, by a step of its own.
            optimizer = torch.optim.SGD(self.module.parameters(), lr=0.0)
        self.optimizer = optimizer
        if optimizer is not None:
            self._say_what_is_trained(optimizer)
        if self.train_data_loader is None:
            self.train_data_loader = self._configured("configure_train_data_loader")
        loaders = self.train_data_loader
        if loaders is None and not self.draws_batches:
            raise ProblemError(
                f"problem {name!r}: no data; pass train_data_loader=..., or override configure_train_data_loader(self) "
                "or get_batch(self)"
            )
        if isinstance(loaders, list | tuple) and not (isinstance(loaders, tuple) and _are_loaders(loaders)):
            loaders = list(loaders)  # batches
        roll_back = engine_config.roll_back and bool(self._lowers)
        if roll_back and any(lower.config.unroll_steps > 1 for lower in self._lowers):
            warn_once(
                "roll_back",
                "EngineConfig(roll_back=True): Betty makes one step again, on the last batch; mlopt makes all "
                "unroll_steps again, on their batches",
            )
        if config.gradient_accumulation > 1 and self._uppers:
            warn_once(
                "gradient_accumulation",
                "Config(gradient_accumulation=...): Betty's hypergradient sees the last micro-batch only; mlopt's sees "
                "all of them",
            )
        if precision_of(name, config) == "bf16" and next(self.module.parameters()).device.type == "cpu":
            warn_once("bf16", 'Config(precision="bf16"): Betty computes in float32 on CPUs; mlopt in bfloat16')
        if optimizer is not None and self.scheduler is None:
            self.scheduler = self._configured("configure_scheduler")
        env, logger = self.env, self.logger
        mlopt.Problem.__init__(
            self,
            name,
            module=self.module,
            optimizer=optimizer,
            data=None if self.draws_batches else loaders,
            scheduler=self.scheduler,
            hypergradient=self.estimator() if self._uppers else None,
            unroll_steps=config.unroll_steps,
            # Betty's problems above step at multiples of unroll_steps, the first after warmup_steps.
            warmup_steps=config.warmup_steps // config.unroll_steps * config.unroll_steps if self._uppers else 0,
            gradient_accumulation=config.gradient_accumulation,
            roll_back=roll_back,
            clip_norm=config.gradient_clipping or None,
            precision=precision_of(name, config),
            env=env,
        )
        self.logger = logger
        if self.loss_scale is not None:
            self.loss_scale.value.fill_(config.initial_dynamic_scale)
        self._adapt_hooks(custom is not None)
        self._has_been_used = True

    def estimator(self) -> mlopt.AbstractEstimator:
        """Return how this problem's optimum is differentiated."""
        return estimator_of(self.name, self.config)

    def settings_for_problems_above(self) -> dict[str, Any]:
        """Return none of them: a `Config` has all of them for every problem, and Betty says nothing of it."""
        return {}

    def _configured(self, method: str) -> Any:
        found = getattr(type(self), method, None)
        return None if found is None or found is getattr(mlopt.Problem, method, None) else getattr(self, method)()

    def _say_what_is_trained(self, optimizer: torch.optim.Optimizer) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if len(optimizer.param_groups) > 1 or any(id(p) not in held for p in self.module.parameters()):
            warn_once(
                "optimizer",
                f"problem {self.name!r}: Betty 0.2 makes the optimizer anew, with one group that holds every parameter "
                "of the module; mlopt uses the one that you made",
            )

    def _adapt_hooks(self, custom_step: bool) -> None:
        """Call hooks of Betty's with the arguments that they have there."""
        for hook in ("param_callback", "grad_callback"):
            if getattr(type(self), hook) is not getattr(mlopt.Problem, hook):
                setattr(self, hook, _without_arguments(getattr(self, hook), self._argument_of(hook)))
        for name in ("on_epoch_end", "on_epoch_start"):
            if callable(getattr(type(self), name, None)) and type(self).epoch_callback is mlopt.Problem.epoch_callback:
                self.epoch_callback = getattr(self, name)  # type: ignore[method-assign]
        if custom_step:
            self.optimizer_step = self.custom_optimizer_step  # type: ignore[method-assign]

    def _argument_of(self, hook: str) -> Callable[[], Sequence[Any]]:
        if hook == "param_callback":
            return self.trainable_parameters
        return lambda: [p.grad for p in self.trainable_parameters()]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        if self.module is None:
            return torch.device(self._device or "cpu")
        return next(self.module.parameters()).device

    @property
    def draws_batches(self) -> bool:
        """Whether the class has a ``get_batch`` of its own."""
        return type(self).get_batch is not Problem.get_batch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`."""
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; override it to call it otherwise."""
        return self.module(*args, **kwargs)

    def get_batch(self) -> Any:
        """Return the next batch of the loader, or one of each as a tuple."""
        batches = tuple(self.get_batch_single_loader(k) for k in range(len(self._loaders())))
        return batches[0] if len(batches) == 1 else batches

    def get_batch_single_loader(self, idx: int) -> Any:
        """Return the next batch of one loader, which starts over when it ends."""
        loaders = self._loaders()
        if not self._iterators:
            self._iterators = [iter(loader) for loader in loaders]
        batch = next(self._iterators[idx], None)
        if batch is None:
            if idx == 0:
                self.epoch_callback()
            self._iterators[idx] = iter(loaders[idx])
            batch = next(self._iterators[idx])
        return batch

    def _loaders(self) -> tuple[Iterable[Any], ...]:
        loaders = self.train_data_loader
        if loaders is None:
            raise ProblemError(f"problem {self.name!r}: get_batch() was called, and there is no train_data_loader")
        return loaders if isinstance(loaders, tuple) else (loaders,)

    def parameters(self) -> list[nn.Parameter]:  # type: ignore[override]
        """Return the parameters of the module."""
        return list(self.module.parameters())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        return list(self.trained_parameters().values())

    def zero_grad(self) -> None:
        """Forget gradients."""
        for parameter in self.module.parameters():
            parameter.grad = None

    def clip_grad(self) -> None:
        """Clip the gradients in ``.grad``; for a ``custom_optimizer_step``."""
        if self.config.gradient_clipping > 0:
            nn.utils.clip_grad_norm_(self.trainable_parameters(), self.config.gradient_clipping)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of module, optimizer and scheduler. ``Engine.plan.state_dict()`` has all of the program."""
        state = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        if self.loss_scale is not None:
            state["scaler"] = self.loss_scale.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.module.load_state_dict(state_dict["module"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        if self.scheduler is not None and "scheduler" in state_dict:
            self.scheduler.load_state_dict(state_dict["scheduler"])
        if self.loss_scale is not None and "scaler" in state_dict:
            self.loss_scale.load_state_dict(state_dict["scaler"])

    def log(self, stats: Any, global_step: int | None = None) -> None:
        """Log numbers."""
        self.logger.log(stats, tag=self.name, step=self.count if global_step is None else global_step)

    def train(self) -> None:
        """Put the module into training mode."""
        self.module.train()

    def eval(self) -> None:
        """Put the module into evaluation mode."""
        self.module.eval()

    def is_implemented(self, fn_name: str) -> bool:
        """Whether there is a method of this name."""
        return callable(getattr(self, fn_name, None))

    def is_rank_zero(self) -> bool:
        """Whether this is the first process."""
        distributed = torch.distributed
        return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0

    live_attributes = (*mlopt.Problem.live_attributes, "count", "cur_batch")

    @property
    def count(self) -> int:
        """Micro-batches so far."""
        if self._plan is None:
            return 0
        return self._plan.steps_of(self.name) * self.config.gradient_accumulation

    @property
    def cur_batch(self) -> Any:
        """The batch of the last step."""
        return None if self._plan is None else self._plan.last_batch(self.name)

    @property
    def children(self) -> list[Problem]:
        """Problems below."""
        return self._lowers

    @property
    def parents(self) -> list[Problem]:
        """Problems above."""
        return self._uppers

    @property
    def leaf(self) -> bool:
        """Whether no problem is below."""
        return not self._lowers


class ImplicitProblem(Problem):
    """A problem whose optimum is differentiated implicitly, by `Config.type`."""


class IterativeProblem(Problem):
    """A problem whose last ``unroll_steps`` steps are differentiated, by reverse mode through the optimizer."""

    def estimator(self) -> mlopt.AbstractEstimator:
        """Return ``mlopt.Unroll(unroll_steps)``."""
        return mlopt.Unroll(self.config.unroll_steps)


def _are_loaders(loaders: Sequence[Any]) -> bool:
    return bool(loaders) and all(isinstance(loader, DataLoader) for loader in loaders)


def _without_arguments(hook: Callable[..., None], argument: Callable[[], Any]) -> Callable[[], None]:
    """Let a hook be called with no argument, whether it takes one or not."""
    return (lambda: hook(argument())) if inspect.signature(hook).parameters else hook
