"""Records what native loops launch on a GPU, so that it can be launched again at once.

The loops of `csrc/runtime/` make the same step many times. On a GPU a step of a small problem takes less time than the
launches it consists of, so the second step is recorded as a CUDA graph and the others replay it; what a loop needs for
that is in `csrc/runtime/repeated.h`. A recording serves one loop: it holds the addresses of tensors, and those of the
next solve are others. The memory of its intermediates goes on to the next one.

Environment: ``MLOPT_CUDA_GRAPHS=0`` records nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)


class CudaGraphRecorder:
    """Records work of one thread on one stream: recordings share memory, so two must never run at the same time.

    Args:
        device: A CUDA device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None
        # The last recording: torch keeps the memory of a pool as long as a recording has it.
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
        with torch.cuda.device(self._device):
            if self._stream is None:
                self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            self.gave_up = True  # unless all goes well: nothing is known of the stream after an interruption
            try:
                self._capture(graph, body)
            except RuntimeError as error:
                # What went wrong in the body breaks the capture, too, and that has an error of its own.
                reason = str(error.__context__ or error).strip().splitlines()[0]
                logger.warning("steps on %s run without CUDA graphs from now on: %s", self._device, reason)
                return None
        self.gave_up = False
        self._graph = graph
        replay: Callable[[], None] = graph.replay
        return replay

    def _capture(self, graph: Any, body: Callable[[], None]) -> None:
        # `torch.cuda.graph` collects garbage and empties torch's cache first, which takes longer than a solve.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            try:
                # thread_local: other threads, such as one that pins batches in memory, go on.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    body()
                finally:
                    graph.capture_end()
            except BaseException:
                # A broken capture leaves torch's allocator as if it went on, for the rest of the process. (It says that
                # there is nothing to end where the capture has not begun.)
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                raise


_recorders = threading.local()


def recorder_for(device: torch.device) -> CudaGraphRecorder | None:
    """Return what records work on a device's current stream, or None where nothing is to be recorded."""
    if device.type != "cuda" or os.environ.get("MLOPT_CUDA_GRAPHS") == "0":
        return None
    index = device.index if device.index is not None else torch.cuda.current_device()
    with torch.cuda.device(index):
        if torch.cuda.is_current_stream_capturing():  # the caller records this loop, and can hold no other recording
            return None
        key = index, torch.cuda.current_stream().cuda_stream
    known: dict[tuple[int, int], CudaGraphRecorder] = _recorders.__dict__.setdefault("by_stream", {})
    recorder = known.setdefault(key, CudaGraphRecorder(torch.device("cuda", index)))
    return None if recorder.gave_up else recorder
