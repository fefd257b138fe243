"""Which cases of a parametrized test are extras: run in CI (``-m slow``), left out of ``make test``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def extras(values: Iterable[Any], is_extra: Callable[[Any], bool]) -> list[Any]:
    """Mark the values that `is_extra` says are extras as slow."""
    return [pytest.param(v, marks=pytest.mark.slow) if is_extra(v) else v for v in values]
