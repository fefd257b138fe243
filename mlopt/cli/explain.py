"""``python -m mlopt explain script.py``: the plan of a script, without its training."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import mlopt


class _Explained(BaseException):  # not an Exception: a script's own `except Exception` must not catch it
    """The plan is printed; the script need not go on."""


def explain(
    script: str,
    arguments: Sequence[str] = (),
    *,
    draw: str | None = None,
    backend: str | None = None,
    every: bool = False,
) -> int:
    """Run a script as ``__main__`` up to the end of its `mlopt.compile` and print the plan.

    Args:
        script: The Python file.
        arguments: What it finds in ``sys.argv[1:]``.
        draw: Where to write the picture of the problem graph.
        backend: The backend to compile with in place of the script's own.
        every: Let the script run to its end and print every plan.

    Returns:
        0, or 1 if the script ended without compiling anything.
    """
    if not Path(script).is_file():
        print(f"python -m mlopt explain: there is no file {script}", file=sys.stderr)
        return 1
    compile_ = mlopt.compile
    count = 0

    def compile_and_explain(*args: Any, **kwargs: Any) -> mlopt.Plan:
        nonlocal count
        if backend is not None:
            kwargs["backend"] = backend
        plan = compile_(*args, **kwargs)
        count += 1
        print(plan.explain(), flush=True)
        if draw is not None:
            path = Path(draw) if count == 1 else Path(draw).with_stem(f"{Path(draw).stem}-{count}")
            plan.draw(path)
            print(f"wrote {path}", flush=True)
        if not every:
            raise _Explained
        return plan

    # As `python script.py` would have them.
    path = [str(Path(script).resolve().parent), *sys.path[1:]]
    with (
        mock.patch.object(mlopt, "compile", compile_and_explain),
        mock.patch.object(sys, "argv", [script, *arguments]),
        mock.patch.object(sys, "path", path),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except _Explained:
            pass
        except SystemExit:
            if not count:
                raise
    if not count:
        print(f"python -m mlopt explain: {script} ended without calling mlopt.compile", file=sys.stderr)
    return 0 if count else 1
