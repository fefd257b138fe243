"""Saving and loading the state of a plan: what follows is the same, bit for bit."""

import collections
import dataclasses
import io
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import mlopt
from mlopt.errors import DataError, StateError
from tests.helpers.bilevel import Classifier, make
from tests.helpers.extras import extras


class Noisy(Dataset):
    """Samples with an augmentation that draws from every global generator."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(26, 6, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, 3, (26,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        noise = torch.randn(6, dtype=torch.float64) + random.random() + np.random.rand()
        return self.x[i] + 0.01 * noise, self.y[i]


def build(seed, *, workers=0, generator=None, optimizer=torch.optim.Adam, roll_back=False, **options):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    loader = DataLoader(Noisy(0), batch_size=7, shuffle=True, num_workers=workers, generator=generator)
    options.setdefault("hypergradient", mlopt.CG(max_steps=4, damping=1.0, warm_start=True))
    lower, upper = make(dtype=torch.float64, dropout=0.3, batch_norm=True, data=loader, unroll_steps=3, **options)
    lower.optimizer = optimizer(lower.module.parameters(), lr=0.02)
    lower.scheduler = torch.optim.lr_scheduler.StepLR(lower.optimizer, step_size=2, gamma=0.9)
    upper.data = DataLoader(Noisy(1), batch_size=9, shuffle=True)
    upper.roll_back = roll_back
    return mlopt.compile(mlopt.Graph([lower, upper]), progress=False, strict=True)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trace(plan, steps):
    """Everything that a number of steps shows and leaves behind."""
    found = []
    for _ in range(steps):
        for name, result in plan.step().items():
            found += [(name, key, torch.as_tensor(value).clone()) for key, value in result.items()]
    found += [("hypergradient", k, v) for k, v in plan.hypergradient("reweight").items()]
    for name, problem in plan.graph.problems.items():
        found += [(name, k, v.clone()) for k, v in problem.module.state_dict().items()]
    found.append(("rng", "", torch.rand(3)))
    found.append(("rng", "python", torch.tensor([random.random(), np.random.rand()])))
    return found


def assert_equal(a, b):
    assert [x[:2] for x in a] == [x[:2] for x in b]
    for (name, key, x), (_, _, y) in zip(a, b, strict=True):
        assert torch.equal(x, y), (name, key)


CASES = {
    "adam, warm start": {},
    "nadam in float64": {"optimizer": torch.optim.NAdam},
    "unroll": {"hypergradient": mlopt.Unroll(5)},
    "roll-back": {"roll_back": True},
    "accumulation": {"gradient_accumulation": 2},
    "a generator of its own": {"generator": True},
    "workers": {"workers": 1},
}


@pytest.mark.parametrize("before", extras([4, 0, 8], lambda n: n != 4))
@pytest.mark.parametrize("case", extras(CASES, lambda name: name in ("workers", "accumulation", "nadam in float64")))
def test_the_steps_that_follow_are_the_same_bits(case, before):
    """Steps 4 and 8 are in the middle of an unroll and of a pass over the data."""

    def options():
        given = dict(CASES[case])
        if given.pop("generator", False):
            given["generator"] = torch.Generator().manual_seed(3)
        return given

    if CASES[case].get("workers") and before == 8:
        pytest.skip("processes are slow to start; 0 and 4 steps are enough")
    plan = build(0, **options())
    plan.run(before)
    state = through_a_file(plan.state_dict())
    expected = trace(plan, 7)
    other = build(1, **options())  # other parameters, other random numbers
    other.run(2)
    other.load_state_dict(state)
    assert other.num_steps == before
    assert_equal(trace(other, 7), expected)
    plan.load_state_dict(state)  # back again, in the plan itself
    assert_equal(trace(plan, 7), expected)


def test_it_is_a_copy():
    plan = build(0)
    plan.run(2)
    state = plan.state_dict()
    expected = through_a_file(state)
    plan.run(4)
    torch.testing.assert_close(
        state["problems"]["classifier"]["tensors"], expected["problems"]["classifier"]["tensors"]
    )
    adam, was = (s["problems"]["classifier"]["optimizer"]["state"][0]["exp_avg"] for s in (state, expected))
    assert torch.equal(adam, was)


class Stateful:
    """A loader that knows its own position, as torchdata's do."""

    def __init__(self, batches):
        self.batches, self.position = batches, 0

    def __iter__(self):
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_a_stateful_loader_is_asked(before):
    batches = [(torch.full((12, 6), float(i)), torch.zeros(12, dtype=torch.long)) for i in range(3)]

    def plan():
        return mlopt.compile(mlopt.Graph(list(make(data=Stateful(batches)))), progress=False)

    def seen(plan):
        stream = plan._executor.states["classifier"].stream
        found = []
        for _ in range(5):
            found.append(float(stream.peek().tensors[0][0, 0]))
            stream.advance(1)
        return found

    first, second = plan(), plan()
    first.run(before)
    state = through_a_file(first.state_dict())
    second.load_state_dict(state)
    assert seen(second) == seen(first)


Pair = collections.namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor
    tag: str = "a"


class FromRecord(Classifier):
    def training_step(self, batch):
        batch = batch["all"][0]
        return super().training_step((batch.x, batch.y))


@pytest.mark.parametrize("kind", [Pair, Record])
def test_batches_of_classes(kind):
    batches = [{"all": [kind(torch.randn(12, 6), torch.randint(0, 3, (12,)))], "n": 3} for _ in range(2)]
    plan = mlopt.compile(mlopt.Graph(list(make(classifier=FromRecord, data=batches))), progress=False)
    plan.run(1)
    state = through_a_file(plan.state_dict())
    expected = trace(plan, 3)
    plan.load_state_dict(state)
    assert_equal(trace(plan, 3), expected)


def test_a_class_that_is_not_there():
    from mlopt.capture.packing import unpack

    with pytest.raises(DataError, match="import the module that defines it"):
        unpack(["namedtuple", "nowhere:Missing", []])
    with pytest.raises(DataError, match="not there"):
        unpack(["dataclass", "os:system", []])  # a function is not run


@pytest.mark.slow
def test_another_program_is_refused():
    plan = build(0)
    state = plan.state_dict()
    with pytest.raises(StateError, match="format"):
        plan.load_state_dict({})
    with pytest.raises(StateError, match="problems"):
        plan.load_state_dict({**state, "problems": {"classifier": state["problems"]["classifier"]}})
    tensors = dict(state["problems"]["classifier"]["tensors"])
    problems = {**state["problems"], "classifier": {**state["problems"]["classifier"], "tensors": tensors}}
    tensors["0.weight"] = torch.zeros(3)
    with pytest.raises(StateError, match=r"'classifier', tensor '0.weight': expected torch.float64 of shape \(8, 6\)"):
        plan.load_state_dict({**state, "problems": problems})
    del tensors["0.weight"]
    with pytest.raises(StateError, match=r"'0.weight' is a tensor of the module and not of the other"):
        plan.load_state_dict({**state, "problems": problems})
    with pytest.raises(StateError, match="last optimizer steps of no problem"):
        build(0, hypergradient=mlopt.Unroll(2)).load_state_dict(state)


@pytest.mark.slow
def test_shorter_data_is_refused():
    torch.manual_seed(0)
    plan = mlopt.compile(mlopt.Graph(list(make(sizes=(12,) * 5))), progress=False)
    plan.run(4)
    state = plan.state_dict()
    shorter = mlopt.compile(mlopt.Graph(list(make(sizes=(12, 12)))), progress=False)
    with pytest.raises(DataError, match="'classifier': its data ends after 2 batches"):
        shorter.load_state_dict(state)
