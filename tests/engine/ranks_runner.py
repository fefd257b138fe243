"""Two ranks: ``python ranks_runner.py FOLDER``. Each writes where it stopped and what it saw to ``said-RANK``.

The second one is forked when the program is compiled and nothing has run.
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed

import mlopt

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.helpers.bilevel import make

folder = Path(sys.argv[1])
torch.set_num_threads(1)
warnings.simplefilter("ignore")
torch.manual_seed(0)
problems = make(sizes=(12, 12))
plan = mlopt.compile(mlopt.Graph(list(problems)), verify=False, backend="eager", progress=False)
beginning = plan.state_dict()
child = os.fork()
rank = int(child == 0)
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
said = (folder / f"said-{rank}").open("w")

# On its own, rank 0 would wait longer than rank 1: the mean is best at step 4.
values = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 3.0, 1.0, -1.0, -3.0, -4.0]][rank]


def engine_for(**options):
    return mlopt.Engine(
        plan,
        20,
        validate=lambda: {"acc": values[engine.step // 2 - 1], **({"only": 7} if rank == 0 else {})},
        validate_every=2,
        early_stopping=mlopt.EarlyStopping("acc", "max", patience=2),
        checkpoints=mlopt.Checkpoints(3, dir=folder / "checkpoints", best="acc", mode="max"),
        run_dir=folder / "run",
        progress=False,
        **options,
    )


engine = engine_for()
engine.run()
print("stopped", engine.step, engine.stop_reason, engine.history["acc"], engine.history["only"][0][1], file=said)

plan.load_state_dict(beginning)
if rank == 1:  # what one rank cannot read, no rank uses
    path = folder / "checkpoints" / f"step-{engine.step:09d}.rank-1-of-2.ckpt"
    path.write_bytes(path.read_bytes()[:100])
distributed.barrier()
engine = engine_for(resume=True)
print("resumed", engine.step, file=said)


class Asks(mlopt.Callback):
    def on_step_end(self, engine, results):
        if rank == 1 and engine.step == 3:
            engine.stop("asked")


plan.load_state_dict(beginning)
engine = mlopt.Engine(plan, seconds=100, callbacks=[Asks()], progress=False)
engine.run()
print("asked", engine.step, engine.stop_reason, file=said)
distributed.destroy_process_group()
said.close()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
