"""Capture of an `UpdateGraph`: run the optimizer's ``step`` on stand-ins, record it, make the record functional."""

from __future__ import annotations

import copy
import inspect
import os
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import keystr, tree_flatten_with_path

from mlopt.capture.numbers import PythonNumbers, ValueReadError, math_on_tensors
from mlopt.capture.optimizer_watch import hooks_of
from mlopt.capture.update import (
    IMPLEMENTATION_FLAGS,
    UpdateGraph,
    UpdateRole,
    UpdateValue,
    hyperparameters,
    is_number,
    signature_of,
)
from mlopt.errors import UpdateError
from mlopt.passes import ancestors, remove_dead_nodes_pass, run_default_passes

aten = torch.ops.aten


def trace_update(problem: str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> UpdateGraph:
    """Capture a step by tracing all of it: the work of `capture_update`, but for `own_outputs`."""
    return _Capture(problem, optimizer, dict(parameters)).run()


def check_update(problem: str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse what no trace could follow, before anything of the optimizer runs.

    Raises:
        UpdateError: The step cannot be captured.
    """
    _Capture(problem, optimizer, dict(parameters)).check()


class _Capture:
    """One capture: the inputs, the shadow of the optimizer that computes on them, and what came out."""

    def __init__(self, problem: str, optimizer: torch.optim.Optimizer, parameters: dict[str, torch.Tensor]) -> None:
        self.problem = problem
        self.optimizer = optimizer
        self.parameters = parameters
        self.inputs: list[UpdateValue] = []
        self.examples: list[torch.Tensor] = []
        self.outputs: list[UpdateValue] = []
        self.made: dict[tuple[str, str], object] = {}
        self.answers: list[bool] = []

    def run(self) -> UpdateGraph:
        self.check()
        signature = signature_of(self.optimizer, self.parameters)
        self._collect_inputs()
        recorded = self._record()
        module, num_outputs = self._functional(recorded)
        answers = self._settle_guard(module, num_outputs)
        used = self._drop_unused_inputs(module)
        inputs = tuple(x for x, keep in zip(self.inputs, used, strict=True) if keep)
        main, guard = (
            _select(module, range(num_outputs)),
            _select(module, range(num_outputs, num_outputs + len(answers))),
        )
        return UpdateGraph(
            problem=self.problem,
            optimizer=self.optimizer,
            parameters=self.parameters,
            module=main,
            inputs=inputs,
            outputs=tuple(self.outputs),
            made=self.made,
            guard=guard,
            answers=answers,
            signature=signature,
        )

    def refuse(self, reason: str, advice: str = "") -> NoReturn:
        """Raise the one error of this file."""
        raise UpdateError(
            f"problem {self.problem!r}: the update of its optimizer {type(self.optimizer).__name__} cannot be "
            f"captured: {reason}; {advice or _ADVICE}"
        )

    def check(self) -> None:
        """See `check_update`."""
        optimizer, cls = self.optimizer, type(self.optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in self.parameters.items():
            if id(p) not in held:
                self.refuse(f"it does not hold the parameter {name!r}", "pass only parameters of its param groups")
            if p.layout is not torch.strided:
                self.refuse(f"the parameter {name!r} has the layout {p.layout}", "use a dense parameter")
            if p.is_complex():
                self.refuse(f"the parameter {name!r} is complex", "keep its real and imaginary part as a real tensor")
        if len({id(p) for p in self.parameters.values()}) != len(self.parameters):
            self.refuse("a parameter was given under two names", "give every parameter once")
        if not self.parameters:
            self.refuse("none of its parameters receives a gradient", "let the loss use one of them")
        closure = inspect.signature(cls.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            self.refuse("its step calls a closure, so it is more than a function of one gradient")
        if any(hooks_of(optimizer)):
            self.refuse("it has step hooks, which a graph would not call", "remove the hooks")
        own = vars(optimizer).get("step")
        if own is not None and inspect.unwrap(own) is not inspect.unwrap(cls.step):
            self.refuse("its step was replaced on the object", "write a subclass that overrides step")
        for owner in optimizer.state:
            if id(owner) not in held:
                self.refuse(f"it keeps state that belongs to no parameter ({owner!r})", "keep it per parameter")
        tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        if len({id(v) for v in tensors}) != len(tensors):
            self.refuse("two entries of its state are one tensor", "give every parameter its own")

    def _collect_inputs(self) -> None:
        group_of = {id(p): i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        for role in (UpdateRole.PARAMETER, UpdateRole.GRADIENT):
            for name, p in self.parameters.items():
                # Values do not matter: what the step decides by them is refused.
                self._input(UpdateValue(role, name, group=group_of[id(p)]), torch.zeros_like(p).detach())
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                x = UpdateValue(UpdateRole.STATE, name, key, group=group_of[id(p)])
                if isinstance(value, torch.Tensor):
                    if value.is_complex() or value.layout is not torch.strided:
                        self.refuse(f"its state {x} is complex or sparse")
                    self._input(x, value.detach().clone())
                elif is_number(value):
                    x = UpdateValue(UpdateRole.STATE, name, key, group=x.group, number=type(value))
                    self._input(x, torch.tensor(float(value), dtype=torch.float64))
                elif not isinstance(value, bool | str | None):
                    self.refuse(f"its {x} is a {type(value).__name__}", "keep tensors and numbers in the state")
        for i, group in enumerate(self.optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, torch.Tensor) and value.numel() != 1:
                    self.refuse(f"group {i} holds a tensor of shape {tuple(value.shape)} under {key!r}")
            for x in hyperparameters(i, group):
                value = group[x.key] if x.index is None else group[x.key][x.index]
                number = value.detach().reshape(()).double().clone() if isinstance(value, torch.Tensor) else value
                self._input(x, torch.as_tensor(number, dtype=torch.float64))

    def _input(self, x: UpdateValue, example: torch.Tensor) -> None:
        self.inputs.append(x)
        self.examples.append(example)

    def _record(self) -> fx.GraphModule:
        """Run the step on the stand-ins; the record has the outputs, then the questions asked."""
        numbers = PythonNumbers()
        for x, example in zip(self.inputs, self.examples, strict=True):
            if x.role is UpdateRole.HYPERPARAMETER or x.number is not None:
                numbers.make_number(example, immutable=x.number is not None)
        shadow = self._shadow()
        versions = {x: t._version for x, t in zip(self.inputs, self.examples, strict=True)}
        step: Any = type(self.optimizer).step
        # torch wraps step to call hooks and the profiler, which have no place in a graph.
        step = step.__wrapped__ if getattr(step, "hooked", False) else step

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            assert all(a is b for a, b in zip(tensors, self.examples, strict=True)), "make_fx replaced the stand-ins"
            with numbers, torch.no_grad(), math_on_tensors():
                step(shadow)
            results = self._collect_outputs(shadow, numbers, versions)
            # What was asked of plain constants has no place in a guard, and is found by its missing inputs.
            return (*results, *(question for question, _ in numbers.branches))

        devices = {p.device for p in self.parameters.values() if p.device.type == "cuda"}
        before = _plain_attributes(shadow)
        try:
            # One mode for the metadata of all nodes: a trace of real tensors makes one per node where none is given.
            with torch.random.fork_rng(devices=list(devices)), tracing(TracingContext(FakeTensorMode())):
                recorded = make_fx(run)(*self.examples)
        except UpdateError:
            raise
        except Exception as error:
            self.refuse(_describe(error))
        for key, value in _plain_attributes(shadow).items():
            if key not in before or not _equal(before[key], value):
                self.refuse(f"its step changes the attribute {key}", "keep what changes in optimizer.state")
        self.answers = [answer for _, answer in numbers.branches]
        lifts = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
        for node in recorded.graph.nodes:
            # A tensor that the step made itself, ``torch.tensor(0.0)``, is lifted first; others came from outside.
            if node.op == "get_attr" and any(user.target not in lifts for user in node.users):
                self.refuse(
                    f"its step reads a tensor of shape {tuple(getattr(recorded, node.target).shape)} that is no "
                    "parameter, gradient or state of one",
                    "keep it in optimizer.state[parameter]",
                )
        return recorded

    def _shadow(self) -> torch.optim.Optimizer:
        """Copy the optimizer with every parameter, state tensor and number replaced by its stand-in."""
        values = dict(zip(self.inputs, self.examples, strict=True))
        by_role = {(x.role, x.parameter, x.key): t for x, t in values.items()}
        memo: dict[int, Any] = {}
        for name, p in self.parameters.items():
            stand_in = by_role[UpdateRole.PARAMETER, name, ""]
            stand_in.grad = by_role[UpdateRole.GRADIENT, name, ""]
            memo[id(p)] = stand_in
            for key, value in self.optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    memo[id(value)] = by_role[UpdateRole.STATE, name, key]
        for group in self.optimizer.param_groups:  # without a gradient: never read, so not copied
            for p in group["params"]:
                if id(p) not in memo:
                    memo[id(p)] = torch.empty(0, dtype=p.dtype, device=p.device)
        shadow: torch.optim.Optimizer = object.__new__(type(self.optimizer))
        memo[id(self.optimizer)] = shadow
        attributes = {key: value for key, value in vars(self.optimizer).items() if key not in ("state", "step")}
        state = {p: self.optimizer.state[p] for p in self.parameters.values() if p in self.optimizer.state}
        try:
            vars(shadow).update(copy.deepcopy(attributes, memo))
            copied = copy.deepcopy(state, memo)
        except Exception as error:
            self.refuse(f"it cannot be copied ({type(error).__name__}: {error})")
        for part in memo.values():
            if isinstance(part, torch.optim.Optimizer) and part is not shadow:
                self.refuse(f"it wraps another optimizer ({type(part).__name__})", "use that one directly")
        shadow.state = torch_optimizer.defaultdict(dict, copied)
        shadow.defaults.update({flag: False for flag in IMPLEMENTATION_FLAGS if flag in shadow.defaults})
        for group in shadow.param_groups:
            group.update({flag: False for flag in IMPLEMENTATION_FLAGS if flag in group})
        for x, number in values.items():
            if x.role is UpdateRole.HYPERPARAMETER:
                _put(shadow.param_groups[x.group], x, number)
            elif x.role is UpdateRole.STATE and x.number is not None:
                shadow.state[by_role[UpdateRole.PARAMETER, x.parameter, ""]][x.key] = number
        return shadow

    def _collect_outputs(
        self, shadow: torch.optim.Optimizer, numbers: PythonNumbers, versions: Mapping[UpdateValue, int]
    ) -> list[torch.Tensor]:
        self.outputs, self.made = [], {}
        results: list[torch.Tensor] = []
        known = {(x.parameter, x.key): x for x in self.inputs if x.role is UpdateRole.STATE}
        stand_ins = dict(zip(self.inputs, self.examples, strict=True))
        parameters = [(x, t) for x, t in stand_ins.items() if x.role is UpdateRole.PARAMETER]
        for x, t in parameters:
            self.outputs.append(x)
            results.append(t)
        for x, t in parameters:
            live = self.parameters[x.parameter]
            for key, value in shadow.state.get(t, {}).items():
                old = known.get((x.parameter, key))
                number = float if numbers.is_number(value) else type(value) if is_number(value) else None
                number = old.number if old is not None and old.number is not None and number else number
                if isinstance(value, torch.Tensor) or number is not None:
                    self.outputs.append(UpdateValue(UpdateRole.STATE, x.parameter, key, group=x.group, number=number))
                    results.append(self._result(value, x, live, is_new=old is None))
                elif isinstance(value, bool | str | None):
                    before = self.optimizer.state.get(live, {})
                    if key not in before or before[key] != value:
                        self.made[x.parameter, key] = value
                else:
                    self.refuse(f"its step puts a {type(value).__name__} into the state ({key!r} of {x.parameter!r})")
        for x, t in stand_ins.items():
            if x.role is UpdateRole.HYPERPARAMETER:
                now = shadow.param_groups[x.group][x.key]
                now = now if x.index is None else now[x.index]
                if now is not t or t._version != versions[x]:  # a tensor lr may be written in place
                    self.outputs.append(x)
                    results.append(torch.as_tensor(now, dtype=torch.float64))
        extra = set(shadow.state) - {t for _, t in parameters}
        if extra:
            self.refuse("its step makes state that belongs to no parameter", "keep it per parameter")
        return results

    def _result(self, value: Any, x: UpdateValue, live: torch.Tensor, *, is_new: bool) -> torch.Tensor:
        if not isinstance(value, torch.Tensor):
            return torch.tensor(float(value), dtype=torch.float64)
        group = self.optimizer.param_groups[x.group]
        if is_new and value.ndim == 0 and (group.get("fused") or group.get("capturable")):
            # Those implementations, which the user's optimizer goes on with, want their counters with the parameter.
            return value.to(live.device, torch.float32 if group.get("fused") else value.dtype)
        return value

    def _functional(self, recorded: fx.GraphModule) -> tuple[fx.GraphModule, int]:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            fakes = [mode.from_tensor(t.detach(), static_shapes=True) for t in self.examples]
            functional = torch.func.functionalize(lambda *xs: recorded(*(x.clone() for x in xs)), remove="mutations")
            module = make_fx(functional, decomposition_table={aten.copy.default: _copied})(*fakes)
        module.graph.set_codegen(fx.graph.CodeGen())
        module.recompile()
        run_default_passes(module)
        for node in module.graph.nodes:
            if isinstance(node.target, torch._ops.OpOverload):
                assert not node.target._schema.is_mutable, f"in-place operation left: {node.format_node()}"
        return module, len(self.outputs)

    def _settle_guard(self, module: fx.GraphModule, num_outputs: int) -> tuple[bool, ...]:
        """Keep each question once, drop those about constants, refuse those about gradients and parameters."""
        placeholders = dict(zip(_placeholders(module), self.inputs, strict=True))
        output = next(n for n in module.graph.nodes if n.op == "output")
        values = list(output.args[0])
        questions: dict[fx.Node, bool] = {}
        for node, answer in zip(values[num_outputs:], self.answers, strict=True):
            read = [placeholders[n] for n in ancestors([node]) if n in placeholders]
            for x in read:
                free = x.role is UpdateRole.HYPERPARAMETER or (x.role is UpdateRole.STATE and _is_scalar(x, self))
                if not free:
                    self.refuse(f"its step branches on the value of the {x}", "use torch.where instead of if")
            if read:
                questions[node] = answer
        output.args = ((*values[:num_outputs], *questions),)
        module.graph.lint()
        remove_dead_nodes_pass(module)
        module.recompile()
        return tuple(questions.values())

    def _drop_unused_inputs(self, module: fx.GraphModule) -> list[bool]:
        used = []
        for node, x in zip(_placeholders(module), self.inputs, strict=True):
            used.append(bool(node.users) or x.role is not UpdateRole.HYPERPARAMETER)
            if not used[-1]:
                module.graph.erase_node(node)
        module.recompile()
        return used


_ADVICE = (
    "use one whose step is arithmetic on tensors and numbers (torch.optim.SGD, Adam, AdamW, RMSprop, Adadelta, NAdam, "
    "Adagrad, Adamax and RAdam are), or let this problem step it eagerly"
)


def _copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Say what a copy into a tensor is once nothing is in place: the source, in the target's dtype and shape."""
    if source.device != target.device or source.dtype != target.dtype:
        source = aten._to_copy.default(source, dtype=target.dtype, device=target.device)
    return source if source.shape == target.shape else aten.expand.default(source, target.shape)


def _put(group: dict[str, Any], x: UpdateValue, number: torch.Tensor) -> None:
    if x.index is None:
        group[x.key] = number
    else:
        leaves = [number if i == x.index else y for i, y in enumerate(group[x.key])]
        group[x.key] = leaves if isinstance(group[x.key], list) else tuple(leaves)


def _describe(error: Exception) -> str:
    """Say what went wrong and quote the optimizer's own line."""
    own = (os.path.dirname(__file__), os.path.dirname(torch.fx.__file__), os.path.dirname(torch.utils.__file__))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)]
    frames = [f for f in frames if not f.filename.startswith("<")]
    frames = [f for f in frames if "/torch/" not in f.filename or f"{os.sep}optim{os.sep}" in f.filename]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    if isinstance(error, ValueReadError):
        return f"its step reads a value, {error},{where}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}{where}"


def _plain_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the numbers, flags and tensors in the attributes of an optimizer, those in lists and dicts too."""
    attributes = {key: value for key, value in vars(optimizer).items() if key not in ("state", "param_groups")}
    kept = {}
    for path, value in tree_flatten_with_path(attributes)[0]:
        if isinstance(value, torch.Tensor):
            kept[keystr(path)] = value.detach().clone()
        elif is_number(value) or isinstance(value, bool | str | None):
            kept[keystr(path)] = value
    return kept


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and a == b


def _is_scalar(x: UpdateValue, capture: _Capture) -> bool:
    return capture.examples[capture.inputs.index(x)].ndim == 0


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _select(module: fx.GraphModule, positions: Sequence[int]) -> fx.GraphModule:
    """Return a copy of a graph with some of its outputs and all of its inputs."""
    selected = copy.deepcopy(module)
    output = next(n for n in selected.graph.nodes if n.op == "output")
    output.args = (tuple(output.args[0][i] for i in positions),)
    remove_dead_nodes_pass(selected)
    selected.recompile()
    return selected


def own_outputs(module: fx.GraphModule) -> None:
    """Clone outputs that would share memory with an input, a constant or another output.

    A first step of SGD keeps the gradient itself as momentum; who zeroes gradients in place would zero it too.
    """
    output = next(n for n in module.graph.nodes if n.op == "output")
    values: list[fx.Node] = []
    for value in output.args[0]:
        target = value.target
        alias = isinstance(target, torch._ops.OpOverload) and target._schema.returns[0].alias_info is not None
        if value.op != "call_function" or alias or value in values:
            with module.graph.inserting_before(output):
                clone = module.graph.call_function(aten.clone.default, (value,))
            clone.meta = dict(value.meta)
            value = clone
        values.append(value)
    output.args = (tuple(values),)
    module.graph.lint()
    module.recompile()
