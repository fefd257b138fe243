"""What a problem may bring along itself: batches, modules and optimizers, an environment, state."""

import types

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import mlopt
from mlopt.errors import IslandWarning, ProblemError, SaveError
from tests.helpers.bilevel import Classifier, compiled, data, make


def plan_of(*problems, **options):
    return mlopt.compile(mlopt.Graph(list(problems)), progress=False, **{"strict": True, **options})


class Drawing(Classifier):
    """Draws from a buffer that grows, like a replay buffer."""

    def get_batch(self):
        self.asked = [*getattr(self, "asked", []), self.module[0].weight.detach().sum().item()]
        generator = torch.Generator().manual_seed(len(self.asked))
        return torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)


def test_batches_are_drawn_when_they_are_used():
    plan, lower, _ = compiled(classifier=Drawing, data=None, gradient_accumulation=2)
    first = float(lower.module[0].weight.sum())
    assert lower.asked == [first]  # to compile; the first step uses it
    weights = [first]
    for step in range(1, 5):
        plan.run(1)
        assert lower.asked[2 * step - 1] == weights[-1]  # drawn at the parameters that it is used with
        weights.append(float(lower.module[0].weight.sum()))
        assert len(lower.asked) == 2 * step
    plan.run(3)
    assert len(lower.asked) == 14


def test_get_batch_trains_like_the_same_data():
    batches = []

    class Recorded(Drawing):
        def get_batch(self):
            batches.append(super().get_batch())
            return batches[-1]

    torch.manual_seed(0)
    plan, lower, upper = compiled(classifier=Recorded, data=None)
    plan.run(4)
    torch.manual_seed(0)
    plan, other, other_upper = compiled(data=batches)
    plan.run(4)
    for a, b in ((lower, other), (upper, other_upper)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q)


def test_inner_loops_begin_before_their_first_batch_is_drawn():
    seen = []

    class Episodes(Drawing):
        def on_inner_loop_start(self):
            seen.append("start")

        def get_batch(self):
            seen.append("batch")
            return super().get_batch()

    plan, *_ = compiled(classifier=Episodes, data=None, unroll_steps=2)
    plan.run(4)
    # The first batch was drawn to compile.
    assert seen == ["batch", "start", "batch", "start", "batch", "batch"]


class Watching(Classifier):
    def epoch_callback(self):
        pass


@pytest.mark.parametrize(("kind", "count"), [(Classifier, 4), (Drawing, 1), (Watching, 1)])
def test_no_batch_is_fetched_ahead_of_its_step(monkeypatch, kind, count):
    """Native loops fetch the batches of many steps at once."""
    plan, *_ = compiled(classifier=kind, unroll_steps=4, data=None if kind is Drawing else data((12,)))
    derivatives = types.SimpleNamespace(is_random=False, step=types.SimpleNamespace(is_used=lambda: True))
    monkeypatch.setattr(plan._executor, "derivatives", lambda name, batch: derivatives)
    assert plan._ahead.steps_until_due(10) == count


@pytest.mark.parametrize(("kind", "method"), [(Drawing, "get_batch"), (Watching, "epoch_callback")])
def test_code_is_not_part_of_a_saved_plan(tmp_path, kind, method):
    plan, *_ = compiled(classifier=kind)
    with pytest.raises(SaveError, match=f"problem 'classifier' overrides {method}"):
        plan.save(tmp_path / "saved")


def test_state_of_the_users_own():
    class Kept(Drawing):
        def get_extra_state(self):
            return {"asked": list(self.asked)}

        def set_extra_state(self, state):
            self.asked = state["asked"]

    plan, lower, _ = compiled(classifier=Kept, data=None)
    plan.run(3)
    state = plan.state_dict()
    plan.run(3)
    after = {k: v.clone() for k, v in lower.module.state_dict().items()}
    plan.load_state_dict(state)
    assert len(lower.asked) == 3
    plan.run(3)
    assert all(torch.equal(v, after[k]) for k, v in lower.module.state_dict().items())


def test_data_is_not_read_beside_get_batch():
    def refuse():
        raise AssertionError
        yield

    plan, *_ = compiled(classifier=Drawing, data=iter(refuse()))
    plan.run(2)


def test_configure_methods_make_what_is_not_given():
    calls = []

    class Made(Classifier):
        def configure_module(self):
            calls.append("module")
            return nn.Sequential(nn.Linear(6, 3))

        def configure_optimizer(self):
            calls.append("optimizer")
            return torch.optim.SGD(self.module.parameters(), lr=0.1)

        def configure_scheduler(self):
            calls.append("scheduler")
            return torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)

        def configure_data(self):
            calls.append("data")
            return data((12, 12))

    made = Made("classifier")
    assert calls == ["module", "optimizer", "scheduler", "data"]
    upper = make()[1]
    plan_of(made, upper).run(2)
    assert made.optimizer.param_groups[0]["lr"] == 0.025 and len(calls) == 4
    net = nn.Linear(6, 3)
    given = Made("classifier", module=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.2), data=data())
    assert calls[4:] == ["scheduler"] and given.module is net and given.optimizer.param_groups[0]["lr"] == 0.2
    with pytest.raises(ProblemError, match=r"argument `module`: .*got NoneType.*or override configure_module"):
        Classifier("classifier")
    with pytest.raises(ProblemError, match=r"argument `optimizer`: .*got None.*or override configure_optimizer"):
        Classifier("classifier", module=net)


@pytest.mark.parametrize("kind", ["list", "loaders"])
def test_epoch_callback(kind):
    steps = []

    class Counting(Classifier):
        plan = None

        def training_step(self, batch):
            return super().training_step(batch["a"] if kind == "loaders" else batch)

        def epoch_callback(self):
            steps.append(self.plan.num_steps)

    batches = data((12, 12, 12))
    given = {"a": DataLoader(batches, batch_size=None), "b": data((2,))} if kind == "loaders" else batches
    plan, lower, _ = compiled(classifier=Counting, data=given)
    lower.plan = plan
    plan.run(4)
    assert steps == [3]  # before the fourth step
    plan.run(2)
    plan.hypergradient("reweight")
    state = plan.state_dict()
    assert steps == [3]
    plan.run(5)
    assert steps == [3, 6, 9]
    plan.load_state_dict(state)
    plan.run(3)
    assert steps == [3, 6, 9, 6]


def test_a_pass_whose_first_batch_was_only_looked_at():
    passes = []

    class Counting(Classifier):
        def epoch_callback(self):
            passes.append(True)

    plan, *_ = compiled(classifier=Counting)  # two batches
    plan.run(2)
    plan._executor.states["classifier"].stream.peek()
    state = plan.state_dict()
    plan.run(1)
    assert passes == [True]
    plan.load_state_dict(state)
    plan.run(1)
    assert passes == [True, True]


class Corridor:
    """An environment whose code would stand still in a captured graph."""

    def __init__(self):
        self.position = 0

    def step(self):
        self.position += 1
        return float(self.position)


def test_a_loss_that_acts_on_an_env_is_an_island():
    class Acting(Classifier):
        def training_step(self, batch):
            return super().training_step(batch) * self.env.step()

    lower, upper = make(classifier=Acting, env=Corridor())
    with pytest.warns(IslandWarning, match="reads the `env` of problem 'classifier'"):
        plan = plan_of(lower, upper, strict=False)
    before = lower.env.position
    plan.run(3)
    assert lower.env.position >= before + 3


def test_an_env_used_by_get_batch_costs_nothing():
    class Acting(Classifier):
        def get_batch(self):
            self.env.step()
            return data()[0]

    lower, upper = make(classifier=Acting, env=Corridor(), data=None)
    plan = plan_of(lower, upper)  # strict: captured
    plan.run(3)
    assert lower.env.position == 3 and lower.num_calls < 6


def test_nested_metrics():
    class Nested(Classifier):
        def training_step(self, batch):
            loss = super().training_step(batch)
            return {"loss": loss, "part": {"half": loss.detach() / 2, "of": {"one": 1}}}

    plan, *_ = compiled(classifier=Nested)
    result = plan.step()["classifier"]
    assert set(result) == {"loss", "part/half", "part/of/one"}
    assert result["part/half"] == result["loss"] / 2 and result["part/of/one"] == 1
