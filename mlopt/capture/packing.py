"""Batches as plain data that `torch.load(..., weights_only=True)` reads: tensors, numbers, strings and lists.

Containers become lists that begin with their kind. A class of the user's (named tuple, dataclass) is stored by name and
looked up among the modules that are imported when it is read; nothing is imported or run on behalf of a file.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from typing import Any

from mlopt.errors import DataError


def pack(value: Any) -> Any:
    """Turn a batch into plain data.

    Args:
        value: Any nesting of dicts, lists, tuples, named tuples and dataclasses of tensors and plain Python values.

    Raises:
        DataError: It holds a container of another kind.
    """
    kind = type(value)
    if kind in (list, tuple):
        return [kind.__name__, [pack(v) for v in value]]
    if kind in (dict, collections.OrderedDict):
        return [kind.__name__, [[key, pack(v)] for key, v in value.items()]]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return ["namedtuple", _name(kind), [pack(v) for v in value]]
    if dataclasses.is_dataclass(value):
        return ["dataclass", _name(kind), [[f.name, pack(getattr(value, f.name))] for f in dataclasses.fields(value)]]
    if isinstance(value, dict | list | tuple | collections.deque):
        raise DataError(
            f"a batch holds a {kind.__module__}.{kind.__qualname__}, which cannot be saved; expected dicts, lists, "
            "tuples, named tuples and dataclasses. Convert it in the loader (collate_fn)"
        )
    return value


def unpack(data: Any) -> Any:
    """Rebuild what `pack` was given.

    Raises:
        DataError: It holds an object of a class that is not there.
    """
    if not isinstance(data, list):
        return data
    kind, *rest = data
    if kind in ("list", "tuple"):
        values = [unpack(v) for v in rest[0]]
        return values if kind == "list" else tuple(values)
    if kind in ("dict", "OrderedDict"):
        items = [(key, unpack(v)) for key, v in rest[0]]
        return dict(items) if kind == "dict" else collections.OrderedDict(items)
    cls = _find(rest[0])
    if kind == "namedtuple":
        return cls(*[unpack(v) for v in rest[1]])
    value = object.__new__(cls)  # __init__ may compute; a batch is rebuilt, not made anew
    for name, field in rest[1]:
        object.__setattr__(value, name, unpack(field))
    return value


def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _find(name: str) -> Any:
    module, path = name.split(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        raise DataError(
            f"a saved batch holds a {path} of the module {module}, which is not there; import the module that defines "
            "it before loading"
        )
    return found
