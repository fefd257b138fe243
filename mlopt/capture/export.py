"""Capture one problem's loss with `torch.export`.

A wrapper module registers every problem's module under the problem's name and calls one problem's `training_step`.
`torch.export` (non-strict: ordinary Python runs, on fake tensors) lifts every parameter and buffer to a graph input,
so the parameters that the loss depends on, and with them the edges of the problem graph, are a fact of the graph
and need no declaration.
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlopt.capture.attributes import ReadAttribute
from mlopt.capture.backward import hooked_parameters
from mlopt.capture.batch import BatchSpec
from mlopt.capture.fake_cache import fake_cache
from mlopt.capture.guard import ShapeGuard
from mlopt.capture.normalize import (
    decompose_batch_norm,
    depends_on,
    inline_grad_mode_regions,
    return_items_as_tensors,
    written_placeholders,
)
from mlopt.capture.output import holding_back
from mlopt.capture.record import GraphInput, InputRole, LossGraph, Metric
from mlopt.capture.watch import StepWatch, own_backward_error
from mlopt.errors import CaptureError, LossError, MloptError, ProblemError
from mlopt.precision import autocast
from mlopt.problem import Problem


def capture_loss(
    problem: Problem,
    problems: Sequence[Problem],
    tensors: Sequence[torch.Tensor],
    spec: BatchSpec,
    *,
    free_sizes: bool = True,
) -> LossGraph:
    """Capture the loss of one problem on batches shaped like the given one.

    `training_step` runs once, on fake tensors.

    Args:
        problem: The problem whose `training_step` is captured.
        problems: All problems of the graph.
        tensors: Tensors of one batch, in leaf order.
        spec: Structure of that batch.
        free_sizes: Leave leading dimensions of batch tensors free where the loss allows it. Reasoning about them makes
            up almost half of the time of compilation, and loops over numbers that are known run faster.

    Returns:
        The captured loss.

    Raises:
        LossError: `training_step` did not return a differentiable scalar, or a dict with one under ``"loss"``.
        CaptureError: `training_step` cannot be captured; names the user's source line.
        ProblemError: `training_step` writes to a parameter, or reads a loose tensor that requires a gradient.
        UnknownNameError: `training_step` used an unknown problem name.
    """
    wrapper = _LossModule(problem, problems, spec, len(tensors))
    # torch.export fails on a module without inputs; a batch without tensors gets one that nothing reads.
    handed = list(tensors) or [torch.zeros(1)]
    shapes = [{0: Dim.AUTO} if free_sizes and t.ndim > 0 and t.shape[0] > 1 else None for t in handed]
    try:
        # Fused attention has no second derivative. Autocast is entered out here so that torch.export records no region
        # for it: the graph stays flat, without casts, and its nodes know the dtypes they will have.
        with (
            warnings.catch_warnings(),
            sdpa_kernel(SDPBackend.MATH),
            autocast(problem.precision, problem.device),
            fake_cache(len(handed) + sum(1 for _ in itertools.chain(wrapper.parameters(), wrapper.buffers()))),
            _naming_trained(problems),
            holding_back(),
        ):
            warnings.simplefilter("ignore")
            exported = torch.export.export(wrapper, (tuple(handed),), dynamic_shapes=(tuple(shapes),), strict=False)
    except MloptError:
        raise
    except Exception as error:
        if wrapper.seen.error is not None:  # a mistake found inside training_step, which export may have wrapped
            raise wrapper.seen.error from None
        raise _capture_error(problem, error) from error
    return _to_record(exported, wrapper, problem, problems, spec, num_tensors=len(tensors))


@contextlib.contextmanager
def _naming_trained(problems: Sequence[Problem]) -> Iterator[None]:
    """Tell `Problem.trained_parameters` which there are by name: their modules will hold stand-ins for them."""
    for p in problems:
        p.__dict__["_trained_names"] = frozenset(p.trained_parameters())
    try:
        yield
    finally:
        for p in problems:
            del p.__dict__["_trained_names"]


class _Seen:
    """What a run of `training_step` showed besides tensors.

    An object of its own because torch.export restores the attributes of the module it traces.
    """

    def __init__(self) -> None:
        self.error: MloptError | None = None
        self.metric_names: list[str] = []
        self.numbers: set[str] = set()
        self.constant_metrics: dict[str, object] = {}
        self.attributes: tuple[ReadAttribute, ...] = ()


class _LossModule(nn.Module):
    """Registers every problem's module and runs one problem's `training_step` on flat batch tensors."""

    def __init__(self, problem: Problem, problems: Sequence[Problem], spec: BatchSpec, num_tensors: int) -> None:
        super().__init__()
        for p in problems:
            self.add_module(p.name, p.module)
        object.__setattr__(self, "_problem", problem)
        object.__setattr__(self, "_watch", StepWatch(problem, problems))
        self._spec = spec
        self._num_tensors = num_tensors
        self.seen = _Seen()

    def forward(self, tensors: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        problem: Problem = self._problem
        seen = self.seen
        try:
            batch = self._spec.unflatten(tensors[: self._num_tensors])
            before = _buffers(self)
            with self._watch:
                result = problem.training_step(batch)
            replaced = [name for name, buffer in _buffers(self).items() if before.get(name) is not buffer]
            if replaced:  # torch.export would lose the write
                raise CaptureError(
                    f"problem {problem.name!r}: its training_step replaces the buffer {replaced[0]!r}; write it "
                    "in place (buffer.copy_(...)) to have it captured"
                )
            self._watch.refuse()
            seen.attributes = self._watch.attributes()
            loss, metrics = split_result(problem.name, result)
            check_loss(problem.name, loss)
        except MloptError as error:
            seen.error = error
            raise
        outputs = []
        seen.metric_names, seen.numbers, seen.constant_metrics = [], set(), {}
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                outputs.append(value.detach())
                seen.metric_names.append(name)
            elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                outputs.append(value)
                seen.metric_names.append(name)
                seen.numbers.add(name)
            else:
                seen.constant_metrics[name] = value
        return loss.reshape(()), *outputs


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers(remove_duplicate=False))


def split_result(problem: str, result: Any) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """Separate what `training_step` returned into the loss and the metrics.

    Raises:
        LossError: Neither a tensor nor a dict with a tensor under ``"loss"``.
    """
    if isinstance(result, Mapping):
        if "loss" not in result:
            raise LossError(
                f"problem {problem!r}: training_step returned a dict without the key 'loss' "
                f"(keys: {', '.join(map(str, result)) or 'none'}); put the scalar to minimize under 'loss'"
            )
        loss, metrics = result["loss"], _flat({k: v for k, v in result.items() if k != "loss"})
    else:
        loss, metrics = result, {}
    if not isinstance(loss, torch.Tensor):
        raise LossError(
            f"problem {problem!r}: training_step returned {_describe(loss)} as the loss, expected a scalar tensor"
            + ("; did it forget to return?" if loss is None else "; do not call .item() on the loss")
        )
    return loss, metrics


def _flat(metrics: Mapping[Any, Any]) -> dict[str, Any]:
    """Name what is in nested dicts like ``"acc/top1"``."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        inner = {f"{key}/{k}": v for k, v in _flat(value).items()} if isinstance(value, Mapping) else {str(key): value}
        flat.update(inner)
    return flat


def check_loss(problem: str, loss: torch.Tensor) -> None:
    """Check that a loss is a differentiable scalar.

    Raises:
        LossError: More than one element, not floating point, or without a gradient.
    """
    if loss.numel() != 1:
        raise LossError(
            f"problem {problem!r}: training_step returned a loss of shape {_sizes(loss)}, expected a scalar; "
            "reduce it, for example with .mean()"
        )
    if not loss.dtype.is_floating_point:
        raise LossError(
            f"problem {problem!r}: training_step returned a loss of dtype {loss.dtype}, expected a floating dtype"
        )
    if not loss.requires_grad:
        raise LossError(
            f"problem {problem!r}: training_step returned a loss that depends on no trainable parameter (detached, "
            "computed under no_grad, or from frozen parameters only); there is no gradient to follow"
        )


def _sizes(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return a shape to print: for a size that capture keeps symbolic, the size that it has on this batch."""
    return tuple(s.node.hint if isinstance(s, torch.SymInt) else s for s in tensor.shape)


def _describe(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _capture_error(problem: Problem, error: Exception) -> CaptureError:
    """Quote the deepest line of the user's own code on the traceback."""
    hidden = (torch.__path__[0], __file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(hidden)]
    frames = [f for f in frames if "/mlopt/" not in f.filename.replace("\\", "/") or "/tests/" in f.filename]
    where = f"\n  at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    first = str(error).strip().splitlines()
    if problem.data is None and not problem.draws_batches and frames:
        where += "\n  (the batch is None: this problem was given no `data`)"
    return CaptureError(
        f"problem {problem.name!r}: its training_step could not be captured as a graph{where}\n"
        f"  {type(error).__name__}: {first[0] if first else ''}\n"
        "Captured code runs once, on tensors without values: it cannot branch on a tensor's value or leave PyTorch. "
        "Run problem.training_step(batch) by itself first; if that fails, the mistake is in the code, else rewrite "
        "the line above with tensor operations (torch.where, masks)."
    )


def _to_record(
    exported: torch.export.ExportedProgram,
    wrapper: _LossModule,
    problem: Problem,
    problems: Sequence[Problem],
    spec: BatchSpec,
    num_tensors: int,
) -> LossGraph:
    assert all(o.kind is OutputKind.USER_OUTPUT for o in exported.graph_signature.output_specs)
    module = fx.GraphModule(exported.graph_module, exported.graph)
    inline_grad_mode_regions(module, problem.name)
    decompose_batch_norm(module, problem.name)
    number_positions = return_items_as_tensors(module)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    input_specs = list(exported.graph_signature.input_specs)
    if num_tensors == 0:
        module.graph.erase_node(placeholders.pop())
        module.recompile()
        input_specs.pop()
    trained = {id(t): (p.name, name) for p in problems for name, t in p.trained_parameters().items()}
    inputs: list[GraphInput] = []
    dynamic: list[frozenset[int]] = []
    for node, input_spec in zip(placeholders, input_specs, strict=True):
        inputs.append(_classify(input_spec, exported, wrapper, problem, trained, len(inputs)))
        value = node.meta["val"]
        free = isinstance(value, torch.Tensor) and inputs[-1].role is InputRole.BATCH
        dynamic.append(
            frozenset(d for d, size in enumerate(value.shape) if isinstance(size, torch.SymInt))
            if free
            else frozenset()
        )
    # Placeholders are numbered anew by torch when a graph is retraced; only their order counts from here on.
    output = next(n for n in module.graph.nodes if n.op == "output")
    metrics = tuple(
        Metric(name, is_number=name in wrapper.seen.numbers or i + 1 in number_positions)
        for i, name in enumerate(wrapper.seen.metric_names)
    )
    used = depends_on(output.args[0][0], placeholders)
    reads: dict[str, list[str]] = {}
    for i in sorted(used):
        if inputs[i].role is InputRole.READ:
            reads.setdefault(inputs[i].problem, []).append(inputs[i].name)
    hooked = hooked_parameters(inputs[i] for i in sorted(used))
    if hooked:
        raise own_backward_error(problem, f"the parameter {hooked[0]}, which has a gradient hook")
    for i in sorted(written_placeholders(module, placeholders)):
        if inputs[i].role not in (InputRole.BUFFER, InputRole.BATCH):
            raise ProblemError(
                f"problem {problem.name!r}: its training_step writes in place to the {inputs[i].role.value} tensor "
                f"{inputs[i].name!r}; only module buffers may be written. Clone it first."
            )
    guard = _batch_guard(placeholders, inputs)
    scale = None
    if problem.loss_scale is not None:
        scale = len(inputs)
        inputs.append(GraphInput(InputRole.CONSTANT, "", "loss scale", problem.loss_scale.value))
        dynamic.append(frozenset())
        with module.graph.inserting_after(placeholders[-1]):
            module.graph.placeholder("loss_scale")
        module.recompile()
    return LossGraph(
        problem=problem.name,
        module=module,
        inputs=tuple(inputs),
        metrics=metrics,
        constant_metrics=wrapper.seen.constant_metrics,
        reads={name: tuple(values) for name, values in reads.items()},
        used_own=frozenset(inputs[i].name for i in used if inputs[i].role is InputRole.OWN),
        batch_spec=spec,
        dynamic_dims=tuple(dynamic),
        guard=guard,
        attributes=wrapper.seen.attributes,
        precision=problem.precision,
        scale=scale,
    )


def _batch_guard(placeholders: Sequence[fx.Node], inputs: Sequence[GraphInput]) -> ShapeGuard:
    batch = [p.meta["val"] for p, x in zip(placeholders, inputs, strict=True) if x.role is InputRole.BATCH]
    mode = detect_fake_mode([p.meta["val"] for p in placeholders])
    assert mode is not None and mode.shape_env is not None, "torch.export traced without symbolic shapes"
    return ShapeGuard(mode.shape_env, batch)


def _classify(
    spec: Any,
    exported: torch.export.ExportedProgram,
    wrapper: nn.Module,
    problem: Problem,
    trained: Mapping[int, tuple[str, str]],
    position: int,
) -> GraphInput:
    if spec.kind is InputKind.USER_INPUT:
        return GraphInput(InputRole.BATCH, problem.name, f"batch[{position}]", None)
    owner, _, local = (spec.target or "").partition(".")
    if spec.kind is InputKind.PARAMETER:
        tensor = wrapper.get_parameter(spec.target)
        if id(tensor) in trained:
            name, local = trained[id(tensor)]
            return GraphInput(InputRole.OWN if name == problem.name else InputRole.READ, name, local, tensor)
        return GraphInput(InputRole.CONSTANT, owner, local, tensor)
    if spec.kind is InputKind.BUFFER:
        return GraphInput(InputRole.BUFFER, owner, local, wrapper.get_buffer(spec.target))
    tensor = exported.constants.get(spec.target)
    if not isinstance(tensor, torch.Tensor):
        raise CaptureError(
            f"problem {problem.name!r}: its training_step uses a {type(tensor).__name__} object ({spec.target}) that "
            "has no place in a graph"
        )
    if tensor.requires_grad:
        raise ProblemError(
            f"problem {problem.name!r}: its training_step reads a tensor of shape {tuple(tensor.shape)} that requires "
            "a gradient but is no parameter of any problem's module, so its gradient would be lost; make it an "
            "nn.Parameter of the module of the problem that trains it"
        )
    return GraphInput(InputRole.CONSTANT, "", spec.target, tensor)
