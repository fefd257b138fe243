"""Records what native loops launch on a GPU, so that it can be launched again at once.

The loops of `csrc/runtime/` make the same step many times. On a GPU a step of a small problem takes less time than the
launches it consists of, so the second step is recorded as a CUDA graph and the others replay it; what a loop needs for
that is in `csrc/runtime/repeated.h`. A recording lives as long as its loop: it holds the addresses of tensors, and
those of the next solve are others.

Environment: ``MLOPT_CUDA_GRAPHS=0`` records nothing.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class CudaGraphRecorder:
    """Records work of one device.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        # The last recording. The next one takes its memory, which torch keeps as long as a recording has it.
        self._graph: Any = None
        self.gave_up = False

    def record(self, body: Callable[[], None]) -> Callable[[], None] | None:
        """Record what a function launches on the current stream; it runs when what is returned is called.

        Args:
            body: Called once, launching nothing yet. It must have run before: what a kernel does in its first run,
                such as loading itself, cannot be recorded.

        Returns:
            A function that launches what was recorded on the then current stream, or None where it could not be
            recorded. There is no second try then, and a log entry tells why.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        # `torch.cuda.graph` collects garbage and empties torch's cache first, which takes longer than a solve.
        self._stream.wait_stream(current)
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                memory: dict[str, Any] = {} if self._graph is None else {"pool": self._graph.pool()}
                # thread_local: other threads, such as one that pins batches in memory, go on.
                graph.capture_begin(**memory, capture_error_mode="thread_local")
                try:
                    body()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            self.gave_up = True
            reason = str(error).strip().splitlines()[0]
            logger.warning("steps on %s run without CUDA graphs from now on: %s", self._device, reason)
            return None
        self._graph = graph
        replay: Callable[[], None] = graph.replay
        return replay


def recorder_for(device: torch.device) -> CudaGraphRecorder | None:
    """Return what records work on a device, or None where nothing is to be recorded."""
    if device.type != "cuda" or os.environ.get("MLOPT_CUDA_GRAPHS") == "0":
        return None
    recorder = _recorder(device.index if device.index is not None else torch.cuda.current_device())
    # A caller's own recording takes the loop as it is: it may hold no other one.
    return None if recorder.gave_up or torch.cuda.is_current_stream_capturing() else recorder


@functools.cache
def _recorder(index: int) -> CudaGraphRecorder:
    return CudaGraphRecorder(torch.device("cuda", index))
