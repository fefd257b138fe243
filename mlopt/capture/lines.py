"""The line of the user's that something was noticed at."""

from __future__ import annotations

import traceback

import torch


def users_line(watcher: str) -> str:
    """Return the innermost line that is neither torch's nor the watcher's, as ``at file:number: code``.

    Args:
        watcher: The file of the code that noticed it, which is on the stack, too.
    """
    hidden = (torch.__path__[0], __file__, watcher)
    frame = [f for f in traceback.extract_stack() if not f.filename.startswith(hidden)][-1]
    return f"at {frame.filename}:{frame.lineno}: {frame.line}"
