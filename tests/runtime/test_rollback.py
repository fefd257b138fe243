"""Roll-back: the whole unroll is made again with the new upper parameters."""

import copy

import pytest
import torch

import mlopt
from tests.helpers.bilevel import Classifier, Reweight, data, make
from tests.helpers.quadratics import program

STEPS = 3


def pair(roll_back, **options):
    torch.manual_seed(0)
    lower, upper = make(dtype=torch.float64, sizes=(12,) * 9, unroll_steps=STEPS, **options)
    upper.roll_back = roll_back
    lower.scheduler = torch.optim.lr_scheduler.StepLR(lower.optimizer, step_size=2, gamma=0.5)
    return mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True), lower, upper


def state(problem):
    found = {f"module.{k}": v.clone() for k, v in problem.module.state_dict().items()}
    for i, parameter in enumerate(problem.module.parameters()):
        found |= {f"{i}.{k}": torch.as_tensor(v).clone() for k, v in problem.optimizer.state.get(parameter, {}).items()}
    found["lr"] = torch.tensor(problem.optimizer.param_groups[0]["lr"])
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("adam", [False, True])
def test_d10_the_whole_unroll_is_replayed(adam):
    """After the upper step the lower problem is where it gets if it makes all its steps anew under the new one."""
    extra = {"dropout": 0.3, "batch_norm": True}
    plan, lower, upper = pair(True, **extra)
    if adam:
        lower.optimizer = torch.optim.Adam(lower.module.parameters(), lr=0.01)
        lower.scheduler = None
        plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)
    start, optimizer_start = copy.deepcopy(lower.module.state_dict()), copy.deepcopy(lower.optimizer.state_dict())
    scheduler_start = copy.deepcopy(lower.scheduler.state_dict()) if lower.scheduler else None
    torch.manual_seed(5)
    for step in range(STEPS):
        results = plan.step()
        assert ("reweight" in results) == (step == STEPS - 1)
    after = state(lower)
    assert int(lower.module[1].num_batches_tracked) == STEPS
    # By hand: back to the start; the upper parameters are new.
    lower.module.load_state_dict(start)
    lower.optimizer.load_state_dict(optimizer_start)
    if not optimizer_start["state"]:
        lower.optimizer.state.clear()
    if lower.scheduler:
        lower.scheduler.load_state_dict(scheduler_start)
        lower.optimizer.param_groups[0]["lr"] = 0.1
    torch.manual_seed(5)
    upper.roll_back = False
    stream = plan._executor.states["classifier"].stream
    stream.__init__(lower)
    for _ in range(STEPS):
        plan._executor.step("classifier")
    assert_same(after, state(lower))


def test_steps_go_on_with_the_next_batches():
    plan, lower, _ = pair(True)
    seen = []
    original = plan._executor._update

    def update(name, gradients):
        seen.append((name, int(plan._executor.states[name].samples[0].batch.tensors[0].data_ptr())))
        original(name, gradients)

    plan._executor._update = update
    plan.run(2 * STEPS)
    index = {b[0].data_ptr(): i for i, b in enumerate(lower.data)}
    order = ["U" if name == "reweight" else index[p] for name, p in seen]
    assert order == [0, 1, 2, "U", 0, 1, 2, 3, 4, 5, "U", 3, 4, 5]
    assert plan._executor.states["classifier"].num_steps == 2 * STEPS


def test_warm_up_is_not_replayed():
    plan, lower, _ = pair(True, warmup_steps=2)
    seen = []
    original = plan._executor._update
    plan._executor._update = lambda name, g: (seen.append(name[0]), original(name, g))
    plan.run(2 + STEPS)
    assert "".join(seen) == "cc" + "ccc" + "r" + "ccc"
    assert plan._executor.states["classifier"].num_steps == 2 + STEPS
    del lower


def test_three_levels_replay_in_order():
    problems = program({"a": ["b"], "b": ["a", "c"], "c": ["b", "a"]}, unroll_steps=2)
    problems[2].roll_back = True
    plan = mlopt.compile(mlopt.Graph(problems), progress=False, strict=True)
    seen = []
    original = plan._executor._update
    plan._executor._update = lambda name, g: (seen.append(name), original(name, g))
    plan.run(4)
    assert "".join(seen) == "aabaab" + "c" + "aabaab"


def test_without_upper_change_the_replay_changes_nothing():
    """An upper learning rate of zero: the replayed unroll ends in the same bits."""
    ends = []
    for roll_back in (False, True):
        torch.manual_seed(0)
        lower, _ = make(dropout=0.4, sizes=(12,) * 6, unroll_steps=2, classifier=Classifier)
        weights = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        upper = Reweight(
            "reweight",
            module=weights,
            optimizer=torch.optim.SGD(weights.parameters(), lr=0.0),
            data=data((12,)),
            roll_back=roll_back,
        )
        plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False)
        torch.manual_seed(1)
        plan.run(5)
        ends.append(state(lower))
    assert_same(*ends)
