"""Compiles many graphs at once, in processes of their own.

Processes and not threads, because Inductor holds the GIL and global settings; started as programs and not forked or
spawned by `multiprocessing`, because the user's script need not be importable and may run threads. They end with the
batch of jobs: a program that trains for hours keeps no idle process.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mlopt.backends.inductor import toolkit, worker
from mlopt.backends.inductor.worker import Job, Result

logger = logging.getLogger(__name__)

_LOOK_EVERY = 0.2  # seconds between two looks at whether a background job was cancelled
_START_TIMEOUT = 60.0  # seconds; importing torch on a busy machine
_PACKAGE_ROOT = Path(__file__).parents[3]


def num_processes() -> int:
    """Return how many processes compile: ``$MLOPT_COMPILE_JOBS``, by default the number of cores, at most 4.

    Raises:
        ValueError: The variable is not a positive integer.
    """
    text = os.environ.get("MLOPT_COMPILE_JOBS", "")
    if not text:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(cores, 4)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"environment variable MLOPT_COMPILE_JOBS: expected an integer >= 1, got {text!r}")
    return int(text)


def compile_jobs(
    jobs: Sequence[Job],
    done: Callable[[], None],
    *,
    timeout: float = 600.0,
    cancelled: threading.Event | None = None,
) -> list[Result]:
    """Compile graphs in parallel.

    A process that dies or takes too long costs its own job only, which comes back as an error.

    Args:
        jobs: What to compile.
        done: Called after each job, in the calling thread.
        timeout: Seconds that one job may take.
        cancelled: Given where this goes on beside other work: the processes have low priority, and end when it is set.

    Returns:
        One result per job; an error for those that were cancelled.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for k in range(len(jobs)):
        waiting.put(k)
    finished: queue.SimpleQueue[tuple[int, Result]] = queue.SimpleQueue()
    directory = tempfile.TemporaryDirectory()
    variables = toolkit.variables(Path(directory.name))
    slots = [
        _Slot(jobs, waiting, finished, timeout, cancelled is not None, variables)
        for _ in range(min(num_processes(), len(jobs)))
    ]
    results: dict[int, Result] = {}
    try:
        while len(results) < len(jobs):
            try:
                k, result = finished.get(timeout=None if cancelled is None else _LOOK_EVERY)
            except queue.Empty:
                if cancelled is not None and cancelled.is_set():
                    break
                continue
            results[k] = result
            done()
    finally:  # also on Ctrl-C: no process outlives the call
        for slot in slots:
            slot.stop()
        directory.cleanup()
    return [results.get(k, Result("it was cancelled", (), 0.0)) for k in range(len(jobs))]


class _Slot:
    """One process at a time, and the thread that feeds it."""

    def __init__(
        self,
        jobs: Sequence[Job],
        waiting: queue.SimpleQueue[int],
        finished: queue.SimpleQueue[tuple[int, Result]],
        timeout: float,
        background: bool,
        variables: dict[str, str],
    ) -> None:
        self._background, self._variables = background, variables
        self._jobs, self._waiting, self._finished, self._timeout = jobs, waiting, finished, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the slot
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.kill()
        self._thread.join()
        self._log.close()

    def _serve(self) -> None:
        while not self._stopped:
            try:
                k = self._waiting.get_nowait()
            except queue.Empty:
                break
            try:
                result = self._run(self._jobs[k])
            except Exception as error:  # no process, no disk, ...: the caller must not wait for ever
                result = Result(f"{type(error).__name__}: {error}", (), 0.0)
            self._finished.put((k, result))
        self._end()

    def _run(self, job: Job) -> Result:
        if self._process is None:
            self._process = _start(self._log, self._variables, background=self._background)
            if self._stopped:  # either this is seen here, or `stop` sees the process
                self._process.kill()
            ready = self._exchange(self._process, None)
            if isinstance(ready, Result):
                return ready
        result = self._exchange(self._process, job)
        assert isinstance(result, Result)
        if result.error is not None:
            logger.debug("a graph was not compiled:\n%s", self._text())
        return result

    def _exchange(self, process: subprocess.Popen[bytes], job: Job | None) -> object:
        """Send a job, if there is one, and return the answer, or an error if the process dies or takes too long."""
        assert process.stdin is not None and process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        limit = self._timeout if job is not None else max(self._timeout, _START_TIMEOUT)
        timer = threading.Timer(limit, expire)
        timer.start()
        try:
            if job is not None:
                worker.write(process.stdin, job)
            return worker.read(process.stdout)
        except (EOFError, OSError):
            self._end()
            if expired.is_set():
                return Result(f"compiling took longer than {limit:.0f} s", (), limit)
            return Result(f"the compiling process ended (exit code {process.returncode}){self._last_line()}", (), 0.0)
        finally:
            timer.cancel()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def _text(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _last_line(self) -> str:
        lines = self._text().strip().splitlines()
        return f": {lines[-1][:200]}" if lines else ""


def _start(log: Any, variables: dict[str, str], *, background: bool) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": path,
        # The jobs are the parallelism. (Code is generated for the number of threads in the job's options.)
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        # For profilers; without them packages are a third of the size and compile in 5/6 of the time. A variable and
        # not an option, because torch 2.11 would refuse an option that it does not know.
        "AOT_INDUCTOR_ENABLE_LINE_TABLES": "0",
    }
    nice = "import os; os.nice(10); " if background and hasattr(os, "nice") else ""
    return subprocess.Popen(
        # Not "-m": the module would be __main__ there, and what it pickles could not be read here.
        [sys.executable, "-c", f"{nice}from {worker.__name__} import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
    )
