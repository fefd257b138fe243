"""Batches of a problem: order, several loaders, their ends."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import mlopt
from mlopt.runtime.data import BatchStream


def problem(data, step=None):
    module = nn.Linear(2, 1)
    made = mlopt.Problem("p", module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data=data)
    if step is not None:
        made.training_step = step.__get__(made)
    return made


def values(data, count):
    stream = BatchStream(problem(data))
    batches = []
    for _ in range(count):
        batches.append(stream.peek())
        stream.advance(1)
    return batches


def loader(numbers, batch_size=1):
    return DataLoader(torch.tensor(numbers), batch_size=batch_size)


def test_one_loader_starts_over():
    assert [int(b.tensors[0]) for b in values(loader([1, 2, 3]), 7)] == [1, 2, 3, 1, 2, 3, 1]


def test_an_entry_of_a_list_is_one_batch_as_long_as_it_is_there():
    data = [(torch.zeros(1), torch.zeros(1)) for _ in range(3)]
    stream = BatchStream(problem(data))
    first = []
    for _ in range(6):
        first.append(stream.peek())
        stream.advance(1)
    assert all(map(lambda a, b: a is b, first[:3], first[3:]))
    replaced = weakref.ref(data[0][0])
    del first
    for _ in range(4):
        data[:] = [(torch.ones(1), torch.ones(1)) for _ in range(3)]
        for _ in range(3):
            assert stream.peek().tensors[0] is not None
            stream.advance(1)
    assert replaced() is None  # what was replaced is not kept for ever


@pytest.mark.parametrize("container", [tuple, list])
def test_several_loaders_start_over_each_by_itself(container):
    batches = values(container([loader([1, 2, 3]), loader([10, 20])]), 6)
    assert [tuple(map(int, b.spec.unflatten(b.tensors))) for b in batches] == [
        (1, 10),
        (2, 20),
        (3, 10),
        (1, 20),
        (2, 10),
        (3, 20),
    ]


def test_named_loaders_keep_their_names():
    batches = values({"a": loader([1, 2]), "b": [torch.tensor(7)]}, 3)
    assert [{k: int(v) for k, v in b.spec.unflatten(b.tensors).items()} for b in batches] == [
        {"a": 1, "b": 7},
        {"a": 2, "b": 7},
        {"a": 1, "b": 7},
    ]


def test_a_list_of_batches_is_one_loader():
    pairs = [(torch.tensor(1.0), torch.tensor(2.0)), (torch.tensor(3.0), torch.tensor(4.0))]
    assert [float(b.tensors[0]) for b in values(pairs, 3)] == [1.0, 3.0, 1.0]


def test_several_loaders_train():
    def step(self, batch):
        return F.mse_loss(self.module(batch["x"]), batch["y"])

    torch.manual_seed(0)
    data = {"x": DataLoader(torch.randn(6, 2), batch_size=3), "y": DataLoader(torch.randn(3, 1), batch_size=3)}
    plan = mlopt.compile(mlopt.Graph([problem(data, step)]), progress=False, strict=True)
    losses = [float(plan.step()["p"]["loss"]) for _ in range(40)]
    assert sum(losses[-2:]) < sum(losses[:2])  # two batches make one round


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": []}, r"`data`\['a'\]: the loader is empty"),
        ({}, r"`data`: the loader is empty"),
        ({"a": torch.ones(3)}, r"`data`\['a'\]: expected a loader"),
        ({"a": 3}, r"`data`\['a'\]: expected a loader"),
    ],
)
def test_bad_loaders(data, message):
    with pytest.raises(mlopt.errors.ProblemError, match=message):
        problem(data)


def test_the_loader_that_runs_out_is_named():
    with pytest.raises(mlopt.errors.DataError, match="its data 'b' ran out"):
        values({"a": [torch.ones(1)], "b": iter([torch.ones(1)])}, 2)


class Counting(DataLoader):
    """Counts how often it is asked for an iterator, each of which draws a seed and may start workers."""

    asked = 0

    def __iter__(self):
        self.asked += 1
        return super().__iter__()


def test_a_shuffling_loader_gives_the_batches_of_a_plain_loop():
    """In every epoch: nothing else is drawn from its generator."""

    def shuffled():
        generator = torch.Generator().manual_seed(0)
        return Counting(torch.arange(8.0), batch_size=4, shuffle=True, generator=generator)

    plain, data = shuffled(), shuffled()
    expected = [batch.tolist() for _ in range(4) for batch in plain]
    assert [batch.tensors[0].tolist() for batch in values(data, len(expected))] == expected
    assert data.asked == plain.asked == 4
