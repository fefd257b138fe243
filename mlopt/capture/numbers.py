"""Runs an optimizer's Python arithmetic on 0-d tensors instead of numbers, and notes each branch it takes.

An optimizer's ``step`` computes with Python numbers: ``1 - beta ** step``, ``p.add_(g, alpha=-lr)``,
``if weight_decay != 0``. A trace would freeze all of them. Under `PythonNumbers` the numbers are 0-d float64 tensors
that behave as Python numbers do (they never change the dtype of what they meet, ``x += 1`` makes a new one), ``item()``
gives such a number, and ``bool()`` of one answers with its present value and remembers the question. The questions
become the guard of the captured graph, so that hyperparameters stay inputs even when they steer control flow.

Called by `mlopt.capture.update` only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from mlopt.precision import wide_dtype

Tensor = torch.Tensor

# Reading a number's value in these ways would freeze it; no question for the guard can stand for what is then done.
_VALUE_READERS = {"__float__", "__complex__", "__array__", "numpy", "tolist", "__format__", "__repr__"}
_CONVERSIONS = {"to", "cpu", "cuda", "float", "double", "half", "bfloat16", "type", "type_as", "_to_copy"}
_NOT_IN_PLACE = {"__index__", "__int__", "__invert__", "__iter__", "__init__", "__init_subclass__"}


class ValueReadError(Exception):
    """The optimizer's code read the value of a tensor in a way that no graph can follow."""


class PythonNumbers(TorchFunctionMode):
    """The mode described above.

    Attributes:
        branches: For each question asked, the 0-d bool tensor and the answer given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.branches: list[tuple[Tensor, bool]] = []
        # The tensors are kept alive: an id must not be used twice. The flag says whether it stands for a Python
        # number, which is immutable, or for a tensor that the user gave as hyperparameter.
        self._numbers: dict[int, tuple[Tensor, bool]] = {}

    def make_number(self, tensor: Tensor, *, immutable: bool = True) -> Tensor:
        """Let a 0-d tensor behave as a Python number."""
        self._numbers[id(tensor)] = (tensor, immutable)
        return tensor

    def is_number(self, value: Any) -> bool:
        """Whether a value is a tensor that stands for a number."""
        return id(value) in self._numbers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return _attribute(func, name, args)
        if name in ("item", "__bool__", "__int__", "__index__") or name in _VALUE_READERS:
            return self._read(name, args[0])
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        numbers = [x for x in tensors if self.is_number(x)]
        if not numbers:
            return func(*args, **kwargs)
        if name in ("tensor", "as_tensor", "scalar_tensor"):
            return numbers[0].to(kwargs.get("dtype") or torch.get_default_dtype()).clone()
        if name in ("full_like", "full"):
            empty = torch.zeros_like if name == "full_like" else torch.zeros
            size, value = args[0], args[1] if len(args) > 1 else kwargs.pop("fill_value")
            return empty(size, **kwargs).fill_(value)
        if len(numbers) == len(tensors):
            return self._pure(func, name, args, kwargs, numbers)
        if name.rstrip("_") in _FUSED:
            return self._fused(name, args, kwargs)
        peers = [x for x in tensors if not self.is_number(x)]
        return func(*self._adapt(args, peers), **self._adapt(kwargs, peers))

    def _read(self, name: str, tensor: Tensor) -> Any:
        if name == "item":
            if tensor.numel() != 1:
                raise ValueReadError(f"item() of a tensor with {tensor.numel()} elements")
            # A copy: the tensor may be written afterwards, a number read from it stays.
            return tensor if self.is_number(tensor) else self.make_number(tensor.reshape(()).double().clone())
        if name in _VALUE_READERS:
            raise ValueReadError(f"{name.strip('_')}() of a tensor")
        with disable_proxy_modes_tracing():
            value = tensor.detach().item()
        if name == "__bool__":
            self.branches.append((tensor != 0, bool(value)))
            return bool(value)
        self.branches.append((tensor.to(torch.int64) == int(value), True))
        return int(value)

    def _pure(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any], numbers: list[Tensor]
    ) -> Any:
        """Number arithmetic: the result is a number."""
        if name in _CONVERSIONS:
            return args[0]
        immutable = any(self._numbers[id(x)][1] for x in numbers)
        if immutable and self.is_number(args[0]):  # `x += 1` on a Python number makes another one
            if name.startswith("__i") and name not in _NOT_IN_PLACE:
                func = getattr(Tensor, "__" + name[3:])
            elif name.endswith("_") and not name.endswith("__"):
                func = getattr(Tensor, name[:-1])
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.ndim == 0 and not self.is_number(result):
            self.make_number(result, immutable=immutable)
        return result

    def _adapt(self, values: Any, peers: list[Tensor]) -> Any:
        """Keep float64 numbers from widening what they meet.

        Against tensors with dimensions a 0-d tensor does not take part in type promotion; against 0-d ones it does.
        """
        floating = [x for x in peers if x.is_floating_point()]
        if floating and any(x.ndim > 0 for x in floating):
            return values
        dtype = floating[0].dtype if floating else torch.get_default_dtype()
        return tree_map(lambda x: x.to(dtype) if self.is_number(x) else x, values)

    def _fused(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write out an operation whose scalar argument takes no tensor in PyTorch."""
        positional = list(args)
        op = name.rstrip("_")
        count = len(_FUSED[op])
        if len(positional) > count:  # the deprecated order x.add_(alpha, y)
            kwargs = {"alpha" if count == 2 else "value": positional.pop(1), **kwargs}
        operands = dict(zip(_FUSED[op], positional, strict=False)) | kwargs
        operands = {"input" if key == "self" else key: value for key, value in operands.items()}
        out = operands.pop("out", None)
        peers = [x for x in operands.values() if isinstance(x, Tensor) and not self.is_number(x)]
        target, dtype = operands["input"], operands["input"].dtype
        if dtype != wide_dtype(dtype):  # rounded once, as in the kernels
            operands = {
                k: x.float() if isinstance(x, Tensor) and not self.is_number(x) else x for k, x in operands.items()
            }
            peers = [x for x in operands.values() if isinstance(x, Tensor) and not self.is_number(x)]
        result = _WRITTEN_OUT[op](**self._adapt(operands, peers))
        if result.dtype != dtype and dtype.is_floating_point:
            result = result.to(dtype)
        if out is not None:
            return out.copy_(result)
        return target.copy_(result) if name.endswith("_") else result


def _attribute(func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> Any:
    """``p.data`` escapes traces; a detached alias is what it means."""
    if getattr(func, "__self__", None) is not Tensor.data:
        return func(*args)
    if name == "__get__":
        return args[0].detach()
    args[0].detach().copy_(args[1])
    return None


# The written-out operations are called with torch's own argument names, hence `input`.
def _lerp(input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:  # noqa: A002
    # Tensor weights must have the dtype and, on an accelerator, the device of what they mix.
    return torch.lerp(input, end, torch.as_tensor(weight).to(device=input.device, dtype=input.dtype))


def _add(input: Tensor, other: Tensor | float, alpha: Tensor | float | None = None) -> Tensor:  # noqa: A002
    return input + (other if alpha is None else other * alpha)


def _sub(input: Tensor, other: Tensor | float, alpha: Tensor | float | None = None) -> Tensor:  # noqa: A002
    return input - (other if alpha is None else other * alpha)


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, value: Tensor | float = 1) -> Tensor:  # noqa: A002
    return input + value * tensor1 * tensor2


def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, value: Tensor | float = 1) -> Tensor:  # noqa: A002
    return input + value * tensor1 / tensor2


def _addmm(
    input: Tensor,  # noqa: A002
    mat1: Tensor,
    mat2: Tensor,
    beta: Tensor | float = 1,
    alpha: Tensor | float = 1,
) -> Tensor:
    return beta * input + alpha * (mat1 @ mat2)


# The order of the products is that of PyTorch's kernels, so that results differ by fused multiply-adds at most.
_WRITTEN_OUT: dict[str, Callable[..., Tensor]] = {
    "add": _add,
    "sub": _sub,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "addmm": _addmm,
}
_FUSED = {
    "add": ("input", "other"),
    "sub": ("input", "other"),
    "addcmul": ("input", "tensor1", "tensor2"),
    "addcdiv": ("input", "tensor1", "tensor2"),
    "lerp": ("input", "end", "weight"),
    "addmm": ("input", "mat1", "mat2"),
}


@contextlib.contextmanager
def math_on_tensors() -> Iterator[None]:
    """Let ``math.sqrt`` and its like take tensors: user-written optimizers use them for bias corrections."""

    def either(plain: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return ours(*args) if any(isinstance(a, Tensor) for a in args) else plain(*args)

        return call

    names = ("sqrt", "exp", "log", "cos", "sin", "tanh", "pow")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(math, name, either(getattr(math, name), getattr(torch, name))))
        yield
