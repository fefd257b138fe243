"""Looks at a step before it changes anything: is all of it finite, and if not, what is to be done.

A NaN that reaches a parameter spreads to everything in a step or two, and what it came from is gone. So the check sits
between the gradient and the optimizer. It is made where somebody asked for it (`NonFiniteGuard`), and for problems
whose derivatives are computed in fp16, where an overflow is how the loss scale finds its value. It costs one sum per
tensor and waits for the device.
"""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mlopt.errors import NonFiniteError, NonFiniteWarning
from mlopt.linalg import Outcome
from mlopt.planner import ExecutionPlan, Linearize, MixedProduct, ReverseSteps
from mlopt.precision import LossScale
from mlopt.problem import Problem

if TYPE_CHECKING:
    from mlopt.runtime.step_pass import Pass

POLICIES = ("raise", "skip", "roll_back")

Named = Iterator[tuple[str, torch.Tensor]]


def all_finite(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether every number is finite; tensors of integers, and None, always are. Waits for the device once."""
    present = [t.detach() for t in tensors if t is not None and t.is_floating_point()]
    if not present:
        return True
    # A sum is not finite if a term is not. The reverse does not hold: large numbers may overflow together.
    sums = [t.sum().to(present[0].device, torch.float32) for t in present]  # an optimizer may count on the host
    if bool(torch.isfinite(torch.stack(sums)).all()):
        return True
    return all(bool(torch.isfinite(t).all()) for t in present)


def first_non_finite(named: Named) -> str | None:
    """Return the name of the first tensor that is not finite, with the values found in it."""
    for name, tensor in named:
        if not all_finite([tensor]):
            num_nan, num_inf = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
            counts = [f"{n} {kind}" for n, kind in ((num_nan, "NaN"), (num_inf, "infinite")) if n]
            return f"{name} is not finite ({' and '.join(counts)} of {tensor.numel()})"
    return None


def state_tensors(problems: Iterable[Problem]) -> Named:
    """Yield all parameters and buffers of problems with a name to print."""
    for problem in problems:
        module = problem.module
        for kind, tensors in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
            for name, tensor in tensors:
                yield f"{kind} {name!r} of problem {problem.name!r}", tensor


class NonFiniteGuard:
    """What is done with a step whose loss, gradient or new buffers are not finite.

    Args:
        policy: ``"raise"``: a `NonFiniteError`, and nothing has changed. ``"skip"``: the step is left out: parameters,
            buffers, optimizer and scheduler stay as they are, its batch is used up, and it counts as made.
            ``"roll_back"``: all problems return to the last snapshot, and go on from there with the next batches.
        snapshot_every: Global steps between two snapshots.
        patience: So many steps may be skipped in a row, or end in a return to the same snapshot; one more is an error.

    Attributes:
        num_refused: Problem -> steps that were not finite.

    Raises:
        ValueError: An unknown policy, or a count that is not a positive integer.
    """

    def __init__(self, policy: str, *, snapshot_every: int = 100, patience: int = 10) -> None:
        if policy not in POLICIES:
            raise ValueError(
                f"argument `non_finite`: expected one of {', '.join(map(repr, POLICIES))} or None, got {policy!r}"
            )
        for argument, value in (("snapshot_every", snapshot_every), ("patience", patience)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"argument `{argument}`: expected an integer >= 1, got {value!r}")
        self.policy = policy
        self.num_refused: collections.Counter[str] = collections.Counter()
        self._snapshot_every = snapshot_every
        self._patience = patience
        self._step = 0
        self._in_a_row: collections.Counter[str] = collections.Counter()
        self._restore: Callable[[], None] | None = None
        self._restored_to = 0
        self._num_restored = 0
        self._warned: set[str] = set()

    def begin(self, step: int, problems: Mapping[str, Problem], snapshot: Callable[[], Callable[[], None]]) -> None:
        """Note the number of the global step that begins, and take a snapshot if it is time for one.

        Args:
            step: The number, from 1 on.
            problems: All problems.
            snapshot: Copies the state and returns what puts it back.
        """
        self._step = step
        if self.policy != "roll_back":
            return
        if self._restore is not None and step - self._restored_to < self._snapshot_every:
            return
        if not all_finite(tensor for _, tensor in state_tensors(problems.values())):
            if self._restore is None:
                found = first_non_finite(state_tensors(problems.values()))
                raise NonFiniteError(f"{found} before step {step}: there is no sound state to return to")
            return  # the next step will notice
        self._restore, self._restored_to, self._num_restored = snapshot(), step, 0

    def accept(self, name: str) -> None:
        """Note a step that is finite."""
        self._in_a_row[name] = 0

    def refuse(self, name: str, found: str, *, hopeless: bool) -> None:
        """Deal with a step that is not finite; return if it is to be left out.

        Args:
            name: The problem.
            found: What is not finite.
            hopeless: A parameter is not finite already, so that later steps will not be either.

        Raises:
            NonFiniteError: The policy says so, or was of no help.
        """
        where = f"problem {name!r}, step {self._step}: {found}"
        self.num_refused[name] += 1
        self._in_a_row[name] += 1
        if self.policy == "raise":
            raise NonFiniteError(f"{where}; nothing was changed by this step. {_ADVICE}")
        if self.policy == "skip":
            if hopeless:
                raise NonFiniteError(f"{where}: skipping steps cannot mend it; non_finite='roll_back' might. {_ADVICE}")
            if self._in_a_row[name] > self._patience:
                raise NonFiniteError(f"{where}, the {self._in_a_row[name]}th step in a row. {_ADVICE}")
            self._say(name, f"{where}; the step is left out")
            return
        assert self._restore is not None, "begin() takes the first snapshot"
        self._num_restored += 1
        if self._num_restored > self._patience:
            raise NonFiniteError(
                f"{where}, for the {self._num_restored}th time after the return to step {self._restored_to}. {_ADVICE}"
            )
        self._restore()
        self._say(name, f"{where}; all problems are back where they were before step {self._restored_to}")

    def _say(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(f"{text} (said once per problem)", NonFiniteWarning, stacklevel=2)


_ADVICE = "Lower the learning rate, clip the gradient (clip_norm), or look at the data"


class StepCheck:
    """Decides, for every step that an executor is about to make, whether it may change anything.

    Args:
        plan: The program.
        problems: Its problems.

    Attributes:
        guard: Asked about steps that are not finite, if there is one.
    """

    def __init__(self, plan: ExecutionPlan, problems: Mapping[str, Problem]) -> None:
        self.guard: NonFiniteGuard | None = None
        self._problems = problems
        self._scales_below = {
            name: [scale for lower in _evaluated(plan, name) if (scale := problems[lower].loss_scale) is not None]
            for name in problems
        }

    def looks_at(self, name: str) -> bool:
        """Whether `passes` looks at anything."""
        return self._problems[name].loss_scale is not None or bool(self._scales_below[name]) or self.guard is not None

    def passes(self, name: str, run: Pass, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Whether a problem's step is made.

        An overflow in fp16 halves the loss scale of the problem whose derivatives it came from: its own, where the
        gradient of its own loss is not finite, else those of the problems below. It becomes a matter for the guard
        where the loss itself is not finite, which no scale can change.

        Raises:
            NonFiniteError: The guard says so; or an fp16 problem overflows with the smallest scale.
        """
        if not self.looks_at(name):
            return True
        own = self._problems[name].loss_scale
        result = run.result
        assert result is not None
        if all_finite([result.loss, *(value for _, value in result.buffers)]) and _is_sound(run, gradients):
            if own is not None:
                own.grow()
            if self.guard is not None:
                self.guard.accept(name)
            return True
        scales = self._responsible(name, run)
        if (self.guard is None or all_finite([result.loss])) and _back_off(scales):
            return False
        if self.guard is None and not scales:
            return True  # not a matter of fp16, and nobody asked
        found = first_non_finite(self._flow(name, run, gradients))
        assert found is not None
        if self.guard is None:
            raise NonFiniteError(f"problem {name!r}: {found}, with the smallest loss scale, too. {_ADVICE}")
        self.guard.refuse(name, found, hopeless=first_non_finite(state_tensors(self._problems.values())) is not None)
        return False

    def overflows(self, name: str, run: Pass, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Whether a run left the range of fp16 and a loss scale was lowered, so that it should be made again."""
        scales = self._responsible(name, run)
        return bool(scales) and not _is_sound(run, gradients) and _back_off(scales)

    def _responsible(self, name: str, run: Pass) -> list[LossScale]:
        """Return the loss scales that numbers may not be finite because of."""
        own, below = self._problems[name].loss_scale, self._scales_below[name]
        if own is None and not below:
            return []
        assert run.result is not None
        if all_finite([*run.result.own, *run.result.cotangents.values()]):
            return below
        return [] if own is None else [own]

    def _flow(self, name: str, run: Pass, gradients: Sequence[torch.Tensor | None]) -> Named:
        """Yield what a step consists of with names, causes before consequences."""
        result = run.result
        assert result is not None
        others = [p for n, p in self._problems.items() if n != name]
        yield from state_tensors([self._problems[name], *others])
        for sample in run.samples:
            for k, tensor in enumerate(sample.batch.tensors):
                yield f"tensor {k} of its batch", tensor
        yield "its loss", result.loss
        parameters = list(self._problems[name].trained_parameters())
        for parameter, gradient in zip(parameters, result.own, strict=True):
            if gradient is not None:
                yield f"the gradient of its loss with respect to {parameter!r}", gradient
        for read, cotangent in result.cotangents.items():
            yield f"the gradient of its loss with respect to problem {read!r}", cotangent
        for slot, solution in run.solutions.items():
            yield f"the solution {slot} of the linear solve", solution.value
            if solution.outcome is Outcome.NON_FINITE:
                yield f"a product in the linear solve for {slot}", solution.value.new_tensor(torch.nan)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                yield f"the hypergradient with respect to {parameter!r}", gradient
        for _, value in result.buffers:
            yield "a buffer that its loss writes", value


def _is_sound(run: Pass, gradients: Sequence[torch.Tensor | None]) -> bool:
    """Whether gradients are finite, and all that they were made of: a solver that meets NaN returns what it has."""
    assert run.result is not None
    if any(solution.outcome is Outcome.NON_FINITE for solution in run.solutions.values()):
        return False
    return all_finite([*gradients, *run.result.cotangents.values()])


def _back_off(scales: Sequence[LossScale]) -> bool:
    lowered = [scale.back_off() for scale in scales]  # all of them, not up to the first
    return any(lowered)


def _evaluated(plan: ExecutionPlan, name: str) -> list[str]:
    """Return the problems below whose derivatives a step of this problem computes."""
    kinds = Linearize | MixedProduct | ReverseSteps
    return list(dict.fromkeys(i.problem for i in plan[name].instructions if isinstance(i, kinds)))
