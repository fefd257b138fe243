"""Trains a small program, and is killed again and again: each time in a child, which resumes where the last one was.

``python kill_runner.py FOLDER KILLS`` prints how the children ended, and the digests of the last one's state and of an
unbroken run's. Every child is forked from a process that has compiled the program and made no step: what it inherits is
what a new process would have made in seconds.
"""

import contextlib
import hashlib
import os
import random
import signal
import sys
from pathlib import Path

import torch

import mlopt
from mlopt.engine import checkpoint_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.helpers.bilevel import make

PLACES = ("step", "content", "name", "removal")
torch.set_num_threads(1)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Dies(mlopt.Callback):
    """Dies after a number of steps."""

    def __init__(self, after):
        self.left = after

    def on_step_end(self, engine, results):
        self.left -= 1
        if self.left == 0:
            die()


class Cut:
    """Writes part of what it is given, then dies."""

    def __init__(self, file, size):
        self.file, self.left = file, size

    def write(self, data):
        data = bytes(data)
        self.file.write(data[: max(0, self.left)])
        self.left -= len(data)
        if self.left < 0:
            self.file.flush()
            die()
        return len(data)


def die_while_writing(place, after):
    """Have a later checkpoint kill the process: in its content, before it has its name, or before others go."""
    replacing, left = checkpoint_file.replacing, after

    @contextlib.contextmanager
    def watched(path):
        nonlocal left
        left -= 1
        with replacing(path) as file:
            yield Cut(file, 5000) if left == 0 and place == "content" else file
            if left == 0 and place == "name":
                os.replace = lambda source, target: die()
        if left == 0 and place == "removal":
            die()

    checkpoint_file.replacing = watched


def run(plan, folder, steps, after=0):
    engine = mlopt.Engine(
        plan,
        steps,
        callbacks=[Dies(after)],
        checkpoints=mlopt.Checkpoints(2, keep_last=2, dir=folder),
        loggers=[mlopt.CSVLogger(f"{folder}.csv")],
        resume=True,
        log_every=3,
        progress=False,
    )
    print("resumed", engine.step, flush=True)
    engine.run()
    return engine


def digest(engine):
    state = engine.plan.state_dict()
    found = hashlib.sha256(state["generators"]["torch"].numpy().tobytes())
    for problem in state["problems"].values():
        for tensor in problem["tensors"].values():
            found.update(tensor.numpy().tobytes())
    found.update(repr(engine.history).encode())
    return found.hexdigest()


def in_child(work):
    """Fork, work, and return how the child ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder, kills):
    torch.manual_seed(0)
    problems = make(dropout=0.3, unroll_steps=2, sizes=(12, 12, 12))
    plan = mlopt.compile(mlopt.Graph(list(problems)), verify=False, backend="eager", progress=False)
    draw, steps = random.Random(kills), 20 + 6 * kills

    def killed(place, after):
        if place != "step":
            die_while_writing(place, after)
        run(plan, folder, steps, 2 * after - draw.randint(0, 1) if place == "step" else 0)

    def whole(name, folder):
        print(name, digest(run(plan, folder, steps)))

    for number in range(kills):
        place, after = PLACES[number % len(PLACES)], draw.randint(1, 3)
        print("killed", in_child(lambda place=place, after=after: killed(place, after)), flush=True)
    in_child(lambda: whole("digest", folder))
    in_child(lambda: whole("unbroken", f"{folder}-unbroken"))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
