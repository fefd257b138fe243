"""Loads the native extension, once, and says so where it is missing."""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from typing import Any

import torch

BUILD_COMMAND = "pip install --no-build-isolation -e . (needs g++; see the README)"


@functools.cache
def available() -> bool:
    """Whether the native kernels are used.

    Environment: ``MLOPT_DISABLE_EXTENSION=1`` uses the reference instead; ``MLOPT_REQUIRE_EXTENSION=1`` turns a missing
    extension into an error, so that a test suite never quietly tests the reference only.

    Raises:
        ImportError: The extension is required and cannot be used.
    """
    if os.environ.get("MLOPT_DISABLE_EXTENSION") == "1":
        return False
    problem = missing()
    if problem is None:
        return True
    message = f"the native extension of mlopt {problem}; build it with: {BUILD_COMMAND}"
    if os.environ.get("MLOPT_REQUIRE_EXTENSION") == "1":
        raise ImportError(message)
    warnings.warn(f"{message}. Until then solver vectors use plain torch operations.", stacklevel=2)
    return False


def has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the native kernels are used on a device, with vectors of a dtype."""
    if dtype not in (torch.float32, torch.float64) or not available():
        return False
    return device.type == "cpu" or (device.type == "cuda" and build_config()["cuda"] is not None)


@functools.cache
def missing() -> str | None:
    """Import the extension, which registers the ops; return what is wrong with it ("is not built"), or None."""
    try:
        extension = importlib.import_module("mlopt._C")
    except ModuleNotFoundError:
        return "is not built"
    except ImportError as error:
        return f"does not load ({error})"
    built = extension.build_config()["torch"]
    # C++ interfaces of torch may change with every release, and not every change fails to link.
    if not re.match(rf"{re.escape(built)}(\D|$)", torch.__version__):
        return f"was built for torch {built}, and this is torch {torch.__version__}"
    return None


def build_config() -> dict[str, Any]:
    """Describe the build: whether the extension is used, and the torch, compiler and CUDA it was built with.

    Returns:
        ``{"extension": bool, "torch": str, "compiler": str, "cuda": str | None}``; without the extension the last
        three are None, and ``"torch"`` is then missing from the build, not from the process.
    """
    if not available():
        return {"extension": False, "torch": None, "compiler": None, "cuda": None}
    extension = importlib.import_module("mlopt._C")
    return {"extension": True, **extension.build_config()}


def register_fakes() -> None:
    """Register shape functions of the native ops for fake tensors and tracing."""

    @torch.library.register_fake("mlopt::dot")
    def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.new_empty(a.shape[:-1])

    @torch.library.register_fake("mlopt::norm")
    def _(a: torch.Tensor) -> torch.Tensor:
        return a.new_empty(a.shape[:-1])

    @torch.library.register_fake("mlopt::perturb")
    def _(x: torch.Tensor, direction: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("mlopt::cg_step_")
    def _(x: torch.Tensor, r: torch.Tensor, p: torch.Tensor, ap: torch.Tensor, state: torch.Tensor) -> None:
        return None

    @torch.library.register_fake("mlopt::neumann_step_")
    def _(v: torch.Tensor, acc: torch.Tensor, av: torch.Tensor, scale: float) -> None:
        return None

    @torch.library.register_fake("mlopt::small_mm")
    def _(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return a.new_empty((a.shape[0], b.shape[1]))


if available():
    register_fakes()
