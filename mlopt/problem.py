"""`Problem`: one optimization problem of a multilevel program, as data.

Owns what the user states about one problem and the checks that need nothing but that statement. It holds no
algorithm: capture, differentiation, planning and stepping read it and never write to it, except for `bind`, by which
a `Graph` tells the problem the names of its peers.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from mlopt.errors import ProblemError, UnknownNameError
from mlopt.hypergradient.base import AbstractEstimator
from mlopt.precision import PRECISIONS, LossScale


class Problem:
    """One problem: parameters, a loss, data and an optimizer.

    Subclass it and write `training_step`. Inside, ``self.module`` (or ``self(...)``) is the problem's own network and
    every other problem of the graph is reachable by its name: ``self.classifier(x)`` calls the module of the problem
    named ``"classifier"``. `training_step` is run once per capture, not once per step: its Python code (counters,
    prints) does not run again when the captured graph does.

    Args:
        name: A Python identifier, unique in the graph; other problems use it as an attribute.
        module: The network whose parameters this problem trains.
        optimizer: A `torch.optim.Optimizer` over parameters of `module`. It is used as given (groups, state,
            hyperparameters); a parameter it does not hold is not trained.
        data: An iterable of batches that can be iterated again (a `DataLoader`, a list), or None when
            `training_step` needs no batch (it is then given None). A batch is any nesting of dicts, lists, tuples and
            named tuples of tensors and plain Python values. Tensors are moved to the device of the parameters. Several
            loaders, as a dict or as a tuple or list of `DataLoader`, give one batch of all of them in a dict or tuple;
            each starts over by itself when it ends. A problem that overrides `get_batch` needs none. Sizes of batches
            may change from step to step; they are taken to be fixed, until one of another size comes, where the data is
            a list of batches of one size.
        scheduler: Optional learning-rate scheduler, any of torch's; its ``step()`` is called after each optimizer step.
            ``ReduceLROnPlateau`` is given the loss of the step, unless there is a `scheduler_metric`.
        scheduler_metric: For ``ReduceLROnPlateau``: the number of `Engine`'s `validate` that it looks at, after each
            validation. (In a loop of your own, call its ``step`` yourself.)
        hypergradient: How the derivative of this problem's optimum is estimated when a problem above it asks for a
            hypergradient: `mlopt.CG`, `mlopt.Neumann`, `mlopt.Unroll`, ... or a subclass of
            `mlopt.AbstractEstimator`. Default: ``mlopt.CG()``.
        unroll_steps: Optimizer steps this problem makes between two steps of a problem above it.
        warmup_steps: Optimizer steps this problem makes before any problem above it steps for the first time.
        gradient_accumulation: Micro-batches per optimizer step; the loss of a step is their mean. A hypergradient
            through this problem takes all of them, too.
        roll_back: After each step of this problem, let the problems below it return to the start of their unroll and
            make the whole unroll again, on the same batches with the same random numbers, under the new parameters.
        tasks: T, to give the problem T independent copies of its trained parameters: each gets a leading axis T, all
            copies starting from the present values. `training_step` is written for one task; every tensor of this
            problem's batches, and of those of a problem that reads it, has a leading axis T. A problem that reads one
            with tasks is averaged over them. All tasks run batched. The optimizer must be fresh, and should act
            element by element, as most do. Buffers are common to the tasks and move by the mean.
        clip_norm: Scale the gradient (for a problem above others: the hypergradient) down to this Euclidean norm
            where it is longer, before the optimizer steps.
        normalize_gradient: Scale the gradient to norm 1 (to `clip_norm`, if given) before the optimizer steps.
        precision: ``"bf16"`` or ``"fp16"`` to evaluate this problem's loss, and with it all its derivatives, under
            `torch.autocast` with that dtype; whatever other problems' modules it calls are computed in it, too.
            Parameters, gradients, solver vectors and the optimizer keep the dtype of the parameters. With ``"fp16"``
            the loss is scaled while it is differentiated (see `loss_scale`), and a step that overflows all the same is
            left out. Default: whatever the code does by itself.
        env: Anything that the problem acts on, such as an environment for reinforcement learning; kept as ``self.env``.
            A `training_step` that reads it is never captured: it runs as an eager island. `get_batch` may use it with
            no such cost.

    `module`, `optimizer`, `scheduler` and `data` may also come from `configure_module`, `configure_optimizer`,
    `configure_scheduler` and `configure_data`: override those.

    Attributes:
        loss_scale: The `mlopt.precision.LossScale` of an fp16 problem, else None.

    Raises:
        ProblemError: A name that is no identifier or that hides an attribute of `Problem`, step counts that are not
            positive integers, an optimizer that is missing or holds foreign parameters, an empty list as data, a
            `hypergradient` that is no estimator.
    """

    # What changes from step to step: a training_step that reads it cannot be a graph.
    live_attributes: tuple[str, ...] = ("env", "optimizer", "scheduler")

    def __init__(
        self,
        name: str,
        *,
        module: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        scheduler: Any = None,
        scheduler_metric: str | None = None,
        hypergradient: AbstractEstimator | None = None,
        unroll_steps: int = 1,
        warmup_steps: int = 0,
        gradient_accumulation: int = 1,
        roll_back: bool = False,
        tasks: int | None = None,
        clip_norm: float | None = None,
        normalize_gradient: bool = False,
        precision: str | None = None,
        env: Any = None,
    ) -> None:
        _check_name(name, type(self))
        self.name = name
        self._peers: dict[str, Problem] = {}
        self.env = env
        # What is wrong with a module or optimizer is said by `_check`, whoever made it.
        self.module: nn.Module = self.configure_module() if module is None else module  # type: ignore[assignment]
        self.optimizer: torch.optim.Optimizer = (
            self.configure_optimizer() if optimizer is None else optimizer  # type: ignore[assignment]
        )
        self.scheduler = self.configure_scheduler() if scheduler is None else scheduler
        self.scheduler_metric = scheduler_metric
        self.data = self.configure_data() if data is None else data
        self.hypergradient = hypergradient
        self.unroll_steps = unroll_steps
        self.warmup_steps = warmup_steps
        self.gradient_accumulation = gradient_accumulation
        self.roll_back = roll_back
        self.tasks = tasks
        self.clip_norm = clip_norm
        self.normalize_gradient = normalize_gradient
        self.precision = precision
        self.loss_scale: LossScale | None = None
        self._check()
        if tasks is not None:
            with torch.no_grad():
                for parameter in self.trained_parameters().values():
                    parameter.data = parameter.data.expand(tasks, *parameter.shape).clone()
        if precision == "fp16":
            self.loss_scale = LossScale(self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are that the optimizer holds."""
        return next(p.device for group in self.optimizer.param_groups for p in group["params"])

    def training_step(self, batch: Any) -> torch.Tensor | dict[str, Any]:
        """Compute this problem's loss on one batch.

        Args:
            batch: One element of `data`, tensors already on the parameters' device; None if `data` is None.

        Returns:
            The scalar loss, or a dict with the loss under ``"loss"`` and any metrics (scalar tensors or Python
            numbers) under other keys. Those in nested dicts are named like ``"acc/top1"``.
        """
        raise NotImplementedError(
            f"problem {self.name!r}: {type(self).__name__} does not define training_step(self, batch); "
            "write it to return the loss"
        )

    def configure_module(self) -> nn.Module | None:
        """Make the module of a problem that is given none; override it. Called once, before everything else is made."""
        return None

    def configure_optimizer(self) -> torch.optim.Optimizer | None:
        """Make the optimizer, over parameters of ``self.module``, of a problem that is given none; override it."""
        return None

    def configure_scheduler(self) -> Any:
        """Make the scheduler of ``self.optimizer`` for a problem that is given none; override it to have one."""
        return None

    def configure_data(self) -> Iterable[Any] | Mapping[str, Iterable[Any]] | None:
        """Make the data of a problem that is given none; override it to have some."""
        return None

    def get_batch(self) -> Any:
        """Return the next batch; override it to draw batches otherwise than from `data`, which is then not read.

        For replay buffers, environments, and whatever depends on the present parameters. It is called right before the
        micro-batch it returns is used, once for each, never ahead (the first one is fetched when the program is
        compiled), so steps of such a problem are made one by one. What it keeps between two calls is not part of
        ``plan.state_dict()``, unless `get_extra_state` returns it.
        """
        raise NotImplementedError(f"problem {self.name!r}: {type(self).__name__} does not define get_batch(self)")

    @property
    def draws_batches(self) -> bool:
        """Whether batches come from `get_batch`."""
        return self._overrides("get_batch")

    def epoch_callback(self) -> None:
        """Run when the data (the first loader, of several) starts over, before the step that uses its first batch.

        Steps of a problem that overrides it are made one by one. Nothing is known of passes over a `get_batch`.
        """

    @property
    def has_epoch_callback(self) -> bool:
        """Whether `epoch_callback` is overridden."""
        return self._overrides("epoch_callback")

    @property
    def has_inner_loop_hook(self) -> bool:
        """Whether `on_inner_loop_start` is overridden."""
        return self._overrides("on_inner_loop_start")

    def get_extra_state(self) -> Any:
        """Return what ``plan.state_dict()`` is to hold of this object besides the usual: plain data and tensors."""
        return None

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` returned; not called for None."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the problem's module."""
        return self.module(*args, **kwargs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of `module` (also those that the optimizer does not hold)."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the named parameters of `module` (also those that the optimizer does not hold)."""
        return self.module.named_parameters()

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that this problem solves for, by their name in `module`.

        These are the parameters of `module` that the optimizer holds and that require a gradient.
        """
        names = self.__dict__.get("_trained_names")
        if names is not None:
            return {n: p for n, p in self.module.named_parameters() if n in names}
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        return {n: p for n, p in self.module.named_parameters() if id(p) in held and p.requires_grad}

    def on_inner_loop_start(self) -> None:
        """Run before the first step of every unroll of `unroll_steps`; override to reset the parameters, for example.

        It is part of the schedule, not of the loss: nothing is differentiated through it. `mlopt.Unroll` does not look
        past it, as steps before it have no influence on those after it.
        """

    def grad_callback(self) -> None:
        """Run when the gradient (above other problems: the hypergradient) lies in ``.grad`` of `trained_parameters`.

        It may change ``.grad``; clipping and the optimizer's step follow.
        """

    def optimizer_step(self) -> None:
        """Make the step from ``.grad`` of `trained_parameters`; override to step otherwise than by the optimizer."""
        self.optimizer.step()

    def param_callback(self) -> None:
        """Run after every optimizer step; override to project the parameters, for example: write them in place."""

    def step_hooks(self) -> list[str]:
        """Return the names of the hooks around an optimizer step that this problem overrides.

        Steps of a problem that has some are made one by one, in Python.
        """
        names = ("on_inner_loop_start", "grad_callback", "optimizer_step", "param_callback")
        return [n for n in names if self._overrides(n)]

    def settings_for_problems_above(self) -> dict[str, Any]:
        """Return those settings, other than the defaults, that matter only if a problem is above this one."""
        settings: dict[str, Any] = {}
        if not self._overrides("on_inner_loop_start"):  # which runs at the start of every unroll
            settings |= {"unroll_steps": self.unroll_steps} if self.unroll_steps != 1 else {}
            settings |= {"warmup_steps": self.warmup_steps} if self.warmup_steps != 0 else {}
        if not self._overrides("optimizer_hyperparameters"):  # which need an estimator whoever is above
            settings |= {"hypergradient": self.hypergradient} if self.hypergradient is not None else {}
        return settings

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(Problem, method) or method in self.__dict__

    def optimizer_hyperparameters(self) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """Return settings of the optimizer that are learned by problems above; override to have some.

        For example ``{"lr": self.tuner.module.log_lr.exp()}`` with a problem named "tuner" above. They are set before
        each step, and have derivatives if ``hypergradient=mlopt.Unroll(...)``.

        Returns:
            0-d tensors by the name of the group entry, for all groups or as one dict per group.
        """
        return {}

    def hyperparameters_by_group(self) -> list[dict[str, torch.Tensor]]:
        """Return `optimizer_hyperparameters`, one dict per parameter group.

        Raises:
            ProblemError: They do not fit the optimizer's groups.
        """
        settings = self.optimizer_hyperparameters()
        groups = self.optimizer.param_groups
        by_group = settings if isinstance(settings, list) else [settings] * len(groups)
        if len(by_group) != len(groups):
            raise ProblemError(
                f"problem {self.name!r}: optimizer_hyperparameters returned {len(by_group)} dicts, its optimizer has "
                f"{len(groups)} parameter groups"
            )
        for given, group in zip(by_group, groups, strict=True):
            for key, value in given.items():
                if key not in group or not isinstance(value, torch.Tensor) or value.ndim != 0:
                    raise ProblemError(
                        f"problem {self.name!r}: optimizer_hyperparameters must return 0-d tensors under the names of "
                        f"the optimizer's settings ({', '.join(k for k in group if k != 'params')}), got {key!r}: "
                        f"{value!r}"
                    )
        return by_group

    @property
    def num_trained(self) -> int:
        """How many numbers this problem solves for (in each task)."""
        return sum(p.numel() for p in self.trained_parameters().values()) // (self.tasks or 1)

    def for_each_task(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module of a problem with tasks outside of `training_step`, each task on its own arguments.

        Args:
            args: Tensors with a leading axis T.
            kwargs: The same, by name.

        Returns:
            What the module returns, with a leading axis T.
        """
        trained: dict[str, torch.Tensor] = {**self.trained_parameters()}

        def one(parameters: dict[str, torch.Tensor], args: Any, kwargs: Any) -> Any:
            return torch.func.functional_call(self.module, parameters, args, kwargs)

        return torch.func.vmap(one, randomness="different")(trained, args, kwargs)

    def loaders(self) -> dict[str, Iterable[Any]] | list[Iterable[Any]] | None:
        """Return the loaders if `data` holds several, else None."""
        if isinstance(self.data, Mapping):
            return dict(self.data)
        if isinstance(self.data, list | tuple) and self.data and all(isinstance(d, DataLoader) for d in self.data):
            return list(self.data)
        return None

    def bind(self, peers: Mapping[str, Problem]) -> None:
        """Make the other problems of a graph reachable as attributes (called by `Graph`)."""
        self._peers = {name: peer for name, peer in peers.items() if peer is not self}

    def __getattr__(self, name: str) -> Any:
        """Resolve the name of another problem of the graph."""
        peers = self.__dict__.get("_peers", {})
        if name in peers:
            return peers[name]
        if name.startswith("__"):
            raise AttributeError(name)
        own_name = self.__dict__.get("name", type(self).__name__)
        known = sorted(peers)
        close = difflib.get_close_matches(name, [*known, *self.__dict__], n=1)
        raise UnknownNameError(
            f"problem {own_name!r}: self.{name} is neither an attribute of {type(self).__name__} nor the name of "
            f"another problem in its graph (problems: {', '.join(known) or 'none'})"
            + (f"; did you mean self.{close[0]}?" if close else "; add it in __init__ or name the problem so")
        )

    def __repr__(self) -> str:
        """Name the class and the problem."""
        return f"{type(self).__name__}({self.name!r})"

    def _check(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise ProblemError(
                f"problem {self.name!r}, argument `module`: expected a torch.nn.Module, got "
                f"{type(self.module).__name__}; wrap bare parameters in a small nn.Module"
                + ("" if self.module is not None else ", or override configure_module")
            )
        if self.optimizer is None:
            raise ProblemError(
                f"problem {self.name!r}, argument `optimizer`: expected a torch.optim.Optimizer, got None; "
                "pass for example torch.optim.SGD(module.parameters(), lr=0.1), or override configure_optimizer"
            )
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise ProblemError(
                f"problem {self.name!r}, argument `optimizer`: expected a torch.optim.Optimizer, got "
                f"{type(self.optimizer).__name__}"
            )
        own = {id(p) for p in self.module.parameters()}
        foreign = [tuple(p.shape) for group in self.optimizer.param_groups for p in group["params"] if id(p) not in own]
        if foreign:
            raise ProblemError(
                f"problem {self.name!r}, argument `optimizer`: it holds {len(foreign)} parameter(s) that are not in "
                f"`module` (first shape: {foreign[0]}); make every trained tensor an nn.Parameter of the module"
            )
        if not self.trained_parameters():
            raise ProblemError(
                f"problem {self.name!r}, argument `optimizer`: none of the parameters it holds requires a gradient; "
                "there is nothing to train"
            )
        if self.scheduler_metric is not None and not isinstance(self.scheduler, ReduceLROnPlateau):
            raise ProblemError(
                f"problem {self.name!r}, argument `scheduler_metric`: it is for torch.optim.lr_scheduler."
                f"ReduceLROnPlateau, the scheduler is {type(self.scheduler).__name__}; leave it out"
            )
        loaders = self.loaders()
        entries: list[tuple[str, Any]] = _labelled(loaders) if loaders else [("", self.data)]
        for label, data in entries:
            if hasattr(data, "__len__") and len(data) == 0:
                raise ProblemError(
                    f"problem {self.name!r}, argument `data`{label}: the loader is empty (length 0); it must yield at "
                    "least one batch (drop_last=True on a data set smaller than the batch size?)"
                )
            if loaders and (not isinstance(data, Iterable) or isinstance(data, torch.Tensor)):
                raise ProblemError(
                    f"problem {self.name!r}, argument `data`{label}: expected a loader (an iterable of batches), got "
                    f"{type(data).__name__}"
                )
        if self.data is not None and not isinstance(self.data, Iterable):
            raise ProblemError(
                f"problem {self.name!r}, argument `data`: expected an iterable of batches or None, got "
                f"{type(self.data).__name__}"
            )
        estimator: Any = self.hypergradient
        if estimator is not None and not isinstance(estimator, AbstractEstimator):
            is_class = isinstance(estimator, type) and issubclass(estimator, AbstractEstimator)
            raise ProblemError(
                f"problem {self.name!r}, argument `hypergradient`: expected an mlopt.AbstractEstimator or None, got "
                + (
                    f"the class {estimator.__name__}; pass an instance, {estimator.__name__}(...)"
                    if is_class
                    else f"{estimator!r}; pass for example mlopt.CG()"
                )
            )
        for argument, least in (("unroll_steps", 1), ("warmup_steps", 0), ("gradient_accumulation", 1)):
            value = getattr(self, argument)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ProblemError(
                    f"problem {self.name!r}, argument `{argument}`: expected an integer >= {least}, got {value!r}"
                )
        if self.tasks is not None:
            if not isinstance(self.tasks, int) or isinstance(self.tasks, bool) or self.tasks < 1:
                raise ProblemError(
                    f"problem {self.name!r}, argument `tasks`: expected an integer >= 1 or None, got {self.tasks!r}"
                )
            if self.optimizer.state:
                raise ProblemError(
                    f"problem {self.name!r}, argument `optimizer`: it has made steps already; with tasks={self.tasks} "
                    "the parameters get a leading axis that its state does not have. Make a new one"
                )
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ProblemError(
                f"problem {self.name!r}, argument `precision`: expected one of {', '.join(map(repr, PRECISIONS))} or "
                f"None, got {self.precision!r}"
            )
        halves = {n: p.dtype for n, p in self.trained_parameters().items() if p.dtype in PRECISIONS.values()}
        if self.precision == "fp16" and halves:
            name, dtype = next(iter(halves.items()))
            raise ProblemError(
                f"problem {self.name!r}, argument `precision`: 'fp16' divides gradients by the loss scale, which needs "
                f"parameters in full precision, but {name!r} is {dtype}; leave the module in float32"
            )
        clip = self.clip_norm
        if clip is not None and (not isinstance(clip, int | float) or isinstance(clip, bool) or not clip > 0):
            raise ProblemError(
                f"problem {self.name!r}, argument `clip_norm`: expected a number > 0 or None, got {clip!r}"
            )


def _labelled(loaders: dict[str, Iterable[Any]] | list[Iterable[Any]]) -> list[tuple[str, Any]]:
    items = loaders.items() if isinstance(loaders, dict) else enumerate(loaders)
    return [(f"[{key!r}]", loader) for key, loader in items]


def _check_name(name: Any, cls: type[Problem]) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ProblemError(
            f"{cls.__name__}, argument `name`: expected a Python identifier (other problems use it as an attribute), "
            f"got {name!r}"
        )
    reserved = set(inspect.signature(Problem.__init__).parameters)
    if name in reserved or hasattr(cls, name):
        raise ProblemError(
            f"{cls.__name__}, argument `name`: {name!r} is an attribute of {cls.__name__} and would hide the problem; "
            "choose another name"
        )
