"""Steps as one graph against the optimizer's own, in float64; runs of them; what is left to the optimizer."""

import functools

import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import mlopt
from tests.helpers import bilevel, optimizers
from tests.helpers.extras import extras
from tests.helpers.steps import (
    GraphBackend,
    Net,
    Regression,
    assert_same_state,
    batches,
    compiled,
    is_step,
    problem,
    state_of,
)


def build(name):
    cls, settings = optimizers.ELEMENTWISE[name]
    return lambda net: cls([p for p in net.parameters() if p.requires_grad], **settings)


def sgd(net, **options):
    return optim.SGD([p for p in net.parameters() if p.requires_grad], **{"lr": 0.1, "momentum": 0.9, **options})


def compiled_step(plan, name="net"):
    (derivatives,) = plan._report.graphs[name]
    return derivatives.step


def count_runs(monkeypatch, plan, name="net"):
    """The number of steps of every run of the compiled step."""
    step, runs = compiled_step(plan, name), []
    run = type(step).run

    def counted(self, given, schedule, **options):
        outcome = run(self, given, schedule, **options)
        if self is step:
            runs.append(outcome.num_steps)
        return outcome

    monkeypatch.setattr(type(step), "run", counted)
    return runs


def compare(make, monkeypatch, *, steps=(1, 1, 7, 4), runs=None, tolerance=1e-12):
    """Train two equal problems, by graphs and by the optimizer itself."""
    ours, theirs = make(), make()
    torch.manual_seed(6)  # a loader that shuffles draws its order at the first look
    plan = compiled(ours, GraphBackend(), monkeypatch)
    torch.manual_seed(6)
    reference = compiled(theirs, "eager", monkeypatch)
    made = count_runs(monkeypatch, plan) if compiled_step(plan) else []
    torch.manual_seed(7)
    results = [plan.run(n) for n in steps]
    torch.manual_seed(7)
    for n, result in zip(steps, results, strict=True):
        for _ in range(n):
            expected = reference.step()
        assert result.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(result[name], expected[name], rtol=tolerance, atol=tolerance)
    assert_same_state(state_of(ours), state_of(theirs), tolerance)
    assert plan.num_steps == sum(steps)
    if runs is not None:
        assert made == runs
    return plan, reference


# The first step makes the optimizer's state, by itself. RAdam looks at its counter at every step. OldAdam and Lion
# count in Python numbers.
FIRST_BY_ITSELF = [1, 7, 4]
RUNS = {
    "sgd": [1, 1, 7, 4],
    "sgd-maximize": [1, 1, 7, 4],
    "adagrad": [1, 1, 7, 4],  # has state from the start
    "adagrad-decay": [1, 1, 7, 4],
    "radam": [1] * 8,
    "radam-decay": [1] * 8,
    "radam-decoupled": [1] * 8,
}


@pytest.mark.parametrize("name", extras(optimizers.ELEMENTWISE, lambda name: "-" in name))
def test_every_optimizer(name, monkeypatch):
    plan, _ = compare(lambda: problem(build(name)), monkeypatch, tolerance=1e-11)
    step = compiled_step(plan)
    if name in ("asgd", "lion"):  # what their code asks of numbers changes with the steps
        return
    assert step is not None and step.is_used(), plan.explain()
    ours, runs = problem(build(name)), None
    plan = compiled(ours, GraphBackend(), monkeypatch)
    runs = count_runs(monkeypatch, plan)
    for n in (1, 1, 7, 4):
        plan.run(n)
    assert runs == RUNS.get(name, FIRST_BY_ITSELF)
    assert "one graph makes this step" in plan.explain()


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 3, 0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=40),
        lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    ],
    ids=["step", "cosine", "one-cycle", "lambda"],
)
@pytest.mark.parametrize("name", ["sgd-momentum", "adam"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_schedulers(name, make, monkeypatch):
    compare(lambda: problem(build(name), scheduler=make), monkeypatch, runs=FIRST_BY_ITSELF)


def test_a_scheduler_that_changes_what_the_optimizer_branches_on(monkeypatch):
    """Weight decay becomes 0 in the middle of a run: torch leaves the term out from there on."""

    class Decay(lr_scheduler.LRScheduler):
        def get_lr(self):
            for group in self.optimizer.param_groups:
                group["weight_decay"] = 0.1 if self.last_epoch < 6 else 0.0
            return [0.1 / (1 + self.last_epoch)]

    make = functools.partial(problem, functools.partial(sgd, weight_decay=0.1), scheduler=Decay)
    compare(make, monkeypatch, runs=[1, 4])


def test_clipping_and_normalisation(monkeypatch):
    for options in ({"clip_norm": 0.05}, {"normalize_gradient": True}, {"clip_norm": 2.0, "normalize_gradient": True}):
        compare(lambda options=options: problem(build("adam"), **options), monkeypatch, runs=FIRST_BY_ITSELF)


def test_param_groups_and_untrained_parameters(monkeypatch):
    def make(net):
        return optim.AdamW(
            [
                {"params": net.first.parameters(), "lr": 0.1},
                {"params": [net.hidden.weight, net.unused], "weight_decay": 0.0, "betas": (0.5, 0.9)},
                {"params": net.last.parameters(), "amsgrad": True},
            ]
        )

    plan, _ = compare(lambda: problem(make), monkeypatch, runs=FIRST_BY_ITSELF)
    net = plan.graph.problems["net"].module
    assert torch.equal(net.unused, torch.ones(5)) and net.unused not in plan.graph.problems["net"].optimizer.state


def test_batch_norm(monkeypatch):
    net = functools.partial(Net, batch_norm=True)
    compare(lambda: problem(sgd, net=net), monkeypatch, runs=FIRST_BY_ITSELF)


def test_dropout_draws_the_same_masks(monkeypatch):
    """The last step of a run is made by itself: a hypergradient needs the random numbers that it began with."""
    net = functools.partial(Net, dropout=0.4)
    compare(lambda: problem(sgd, net=net), monkeypatch, runs=[1, 6, 1, 3, 1])


def test_dropout_and_data_that_may_draw_run_step_by_step(monkeypatch):
    net = functools.partial(Net, dropout=0.4)

    def make():
        return problem(sgd, net=net, data=DataLoader(batches(4, 1), batch_size=None, shuffle=True))

    compare(make, monkeypatch, runs=[1] * 12)


def test_shuffled_data(monkeypatch):
    def make():
        x, y = batches(1, 22)[0]
        return problem(sgd, data=DataLoader([*zip(x, y, strict=True)], batch_size=4, shuffle=True))

    # 22 samples in batches of 4: the last batch of an epoch, of 2, has other sizes.
    compare(make, monkeypatch, steps=(1, 11, 5))


def test_changes_between_runs_are_seen(monkeypatch):
    def make():
        return problem(sgd)

    ours, theirs = make(), make()
    plan, reference = compiled(ours, GraphBackend(), monkeypatch), compiled(theirs, "eager", monkeypatch)
    runs = count_runs(monkeypatch, plan)
    changes = [
        lambda p: p.optimizer.param_groups[0].update(lr=0.01),
        lambda p: p.optimizer.param_groups[0].update(nesterov=True),  # another graph: the optimizer steps
        lambda p: p.optimizer.param_groups[0].update(nesterov=False),
        lambda p: p.module.first.weight.data.mul_(2),
        lambda p: p.optimizer.load_state_dict(p.optimizer.state_dict()),
        lambda p: p.optimizer.state.clear(),
        lambda p: p.optimizer.param_groups[0].update(momentum=0.0),
    ]
    plan.run(3), reference.run(3)
    for change in changes:
        change(ours), change(theirs)
        plan.run(3), reference.run(3)
        assert_same_state(state_of(ours), state_of(theirs))
    assert runs == [2, 3, 3, 3, 3, 2]


def test_state_is_written_in_place_and_gradients_are_none(monkeypatch):
    ours = problem(build("adam"))
    plan = compiled(ours, GraphBackend(), monkeypatch)
    plan.run(2)
    tensors = [*ours.module.parameters(), *(t for s in ours.optimizer.state.values() for t in s.values())]
    memory = [t.data_ptr() for t in tensors]
    plan.run(5)
    now = [*ours.module.parameters(), *(t for s in ours.optimizer.state.values() for t in s.values())]
    assert all(a is b for a, b in zip(tensors, now, strict=True)) and [t.data_ptr() for t in now] == memory
    assert all(p.grad is None for p in ours.module.parameters())
    assert all(p.requires_grad and p.is_leaf for p in ours.trained_parameters().values())
    plan.keep_gradients = True
    plan.run(2)
    assert {n for n, p in ours.module.named_parameters() if p.grad is not None} == {
        n for n in ours.trained_parameters() if n != "unused"
    }
    ours.optimizer.step()  # the user's optimizer goes on


def test_hooks_are_called(monkeypatch):
    ours, theirs = problem(sgd), problem(sgd)
    plan, reference = compiled(ours, GraphBackend(), monkeypatch), compiled(theirs, "eager", monkeypatch)
    runs = count_runs(monkeypatch, plan)
    plan.run(4), reference.run(4)
    seen = []
    handle = ours.optimizer.register_step_post_hook(lambda *args: seen.append(1))
    plan.run(4), reference.run(4)
    assert len(seen) == 4
    handle.remove()
    plan.run(4), reference.run(4)
    assert runs == [3, 4]
    assert_same_state(state_of(ours), state_of(theirs))


def test_an_optimizer_that_cannot_be_captured_steps_by_itself(monkeypatch):
    class Noisy(optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(torch.randn_like(p), alpha=1e-3)
            return super().step(closure)

    def make():
        return problem(lambda net: Noisy([p for p in net.parameters() if p.requires_grad], lr=0.1))

    plan, _ = compare(make, monkeypatch)
    assert compiled_step(plan) is None
    assert "the optimizer steps by itself" in plan.explain() and "Noisy draws random numbers" in plan.explain()


def test_a_wrong_step_is_not_used(monkeypatch):
    class Wrong(GraphBackend):
        def lower(self, module):
            graph = super().lower(module)
            if is_step(module):
                forward = graph._forward
                graph._forward = lambda *args: [r * 1.001 if i == 3 else r for i, r in enumerate(forward(*args))]
            return graph

    with pytest.raises(mlopt.errors.VerificationError, match="compiled step disagrees with its optimizer's own"):
        compiled(problem(build("adam")), Wrong(), monkeypatch)


class Failing(GraphBackend):
    """The step graph raises, or Ctrl-C is pressed, in a given call."""

    def __init__(self):
        self.countdown, self.error = -1, RuntimeError("no more")

    def lower(self, module):
        graph = super().lower(module)
        if is_step(module):
            forward = graph._forward

            def fail(*args):
                self.countdown -= 1
                if self.countdown == 0:
                    raise self.error
                return forward(*args)

            graph._forward = fail
        return graph


@pytest.mark.parametrize("scheduled", [False, True])
def test_an_error_in_the_middle_leaves_whole_steps(scheduled, monkeypatch):
    """A step graph that fails gives way to the optimizer; training goes on with the same numbers."""
    make = functools.partial(
        problem, build("adam"), scheduler=(lambda o: lr_scheduler.StepLR(o, 2, 0.5)) if scheduled else None
    )
    ours, theirs, backend = make(), make(), Failing()
    plan, reference = compiled(ours, backend, monkeypatch), compiled(theirs, "eager", monkeypatch)
    plan.run(3), reference.run(3)
    backend.countdown = 4
    plan.run(8), reference.run(8)
    assert_same_state(state_of(ours), state_of(theirs))
    assert compiled_step(plan).given_up == "no more" and not compiled_step(plan).is_used()


def test_ctrl_c_in_the_middle_leaves_whole_steps(monkeypatch):
    make = functools.partial(problem, build("adam"), scheduler=lambda o: lr_scheduler.StepLR(o, 2, 0.5))
    ours, theirs, backend = make(), make(), Failing()
    plan, reference = compiled(ours, backend, monkeypatch), compiled(theirs, "eager", monkeypatch)
    plan.run(3), reference.run(3)
    backend.countdown, backend.error = 4, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        plan.run(8)
    reference.run(3)
    assert plan.num_steps == 6
    assert_same_state(state_of(ours), state_of(theirs))
    plan.run(4), reference.run(4)
    assert_same_state(state_of(ours), state_of(theirs))


def test_errors_name_problem_and_step(monkeypatch):
    def broken():
        yield from batches(2)
        x, y = batches(1)[0]
        yield x, y + 3  # no such class

    class Data:
        def __iter__(self):
            return broken()

    plan = compiled(problem(sgd, data=Data()), GraphBackend(), monkeypatch)
    with pytest.raises(IndexError) as caught:
        plan.run(5)
    assert caught.value.__notes__ == ["(in step 3 of problem 'net')"]
    assert plan.num_steps == 2


@pytest.mark.parametrize("accumulation", extras([2, 1], lambda n: n == 1))
@pytest.mark.parametrize("estimator", [mlopt.CG(max_steps=5, damping=1.0), mlopt.Unroll(3)], ids=["cg", "unroll"])
@pytest.mark.parametrize("roll_back", extras([False, True], lambda roll: not roll))
def test_bilevel(accumulation, estimator, roll_back, monkeypatch):
    """Steps below, run ahead until the problem above is due, give the same hypergradients."""

    def make():
        torch.manual_seed(0)
        lower, upper = bilevel.make(
            dropout=0.3,
            batch_norm=True,
            dtype=torch.float64,
            unroll_steps=4,
            warmup_steps=3,
            hypergradient=estimator,
            gradient_accumulation=accumulation,
        )
        upper.roll_back = roll_back
        return [lower, upper]

    ours, theirs = make(), make()
    plan, reference = compiled(ours, GraphBackend(), monkeypatch), compiled(theirs, "eager", monkeypatch)
    torch.manual_seed(5)
    results = plan.run(26)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    expected = {}
    for _ in range(26):
        expected.update(reference.step())
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_state(state_of(a), state_of(b), 1e-9)
        torch.testing.assert_close(results[a.name], expected[a.name], rtol=1e-9, atol=1e-9)
    for name, value in plan.hypergradient("reweight").items():
        torch.testing.assert_close(value, reference.hypergradient("reweight")[name], rtol=1e-8, atol=1e-10)


def test_steps_are_fused_up_to_the_next_due_step(monkeypatch):
    lower, upper = bilevel.make(dtype=torch.float64, unroll_steps=4, warmup_steps=3)
    plan = compiled([lower, upper], GraphBackend(), monkeypatch)
    runs = count_runs(monkeypatch, plan, "classifier")
    plan.run(20)
    # The first step is the optimizer's; the problem above is due after 3 + 4 steps, then after every 4.
    assert runs == [6, 4, 4, 4, 1]
    assert "up to 4 of them" in plan.explain()


def test_two_lowest_problems_run_ahead_each(monkeypatch):
    def make():
        problems = [problem(sgd), problem(build("adam"))]
        problems[1].name = "other"
        return problems

    ours, theirs = make(), make()
    plan, reference = compiled(ours, GraphBackend(), monkeypatch), compiled(theirs, "eager", monkeypatch)
    runs = count_runs(monkeypatch, plan)
    plan.run(9), reference.run(9)
    assert runs == [8]
    for a, b in zip(ours, theirs, strict=True):
        assert_same_state(state_of(a), state_of(b))


def test_learned_settings(monkeypatch):
    class Tuned(bilevel.Classifier):
        def training_step(self, batch):
            x, y = batch
            return nn.functional.cross_entropy(self.module(x), y)

        def optimizer_hyperparameters(self):
            return {"lr": 0.1 * self.reweight.module[0].weight.sigmoid().mean()}

    def make():
        torch.manual_seed(0)
        return [*bilevel.make(dtype=torch.float64, classifier=Tuned, unroll_steps=3, hypergradient=mlopt.Unroll(3))]

    ours, theirs = make(), make()
    plan, reference = compiled(ours, GraphBackend(), monkeypatch), compiled(theirs, "eager", monkeypatch)
    plan.run(10), reference.run(10)
    for a, b in zip(ours, theirs, strict=True):
        assert_same_state(state_of(a), state_of(b), 1e-10)


def test_tasks(monkeypatch):
    def make():
        net = nn.Linear(6, 3).double()
        torch.manual_seed(0)
        x, y = batches(1, 8)[0]
        from tests.helpers.steps import Regression

        return Regression(
            "net",
            module=net,
            optimizer=optim.Adam(net.parameters(), lr=0.1),
            data=[(x.reshape(2, 4, 6), y.reshape(2, 4))],
            tasks=2,
        )

    torch.manual_seed(0)
    ours = make()
    theirs = make()
    theirs.module.load_state_dict(ours.module.state_dict())
    plan, reference = compiled(ours, GraphBackend(), monkeypatch), compiled(theirs, "eager", monkeypatch)
    runs = count_runs(monkeypatch, plan)
    plan.run(6), reference.run(6)
    assert runs == [5]
    assert_same_state(state_of(ours), state_of(theirs))


def test_engine_runs_ahead_between_its_looks(monkeypatch):
    ours = problem(sgd)
    plan = compiled(ours, GraphBackend(), monkeypatch)
    runs = count_runs(monkeypatch, plan)
    looks = []
    engine = mlopt.Engine(plan, 50, log_every=20, validate=lambda: looks.append(plan.num_steps), validate_every=25)
    history = engine.run()
    assert runs == [19, 5, 15, 10] and looks == [25, 50] and [t for t, _ in history["net.loss"]] == [20, 40, 50]

    class Each(mlopt.engine.Callback):
        def on_step_end(self, engine, results):
            looks.append("each")

    looks.clear()
    mlopt.Engine(plan, 5, callbacks=[Each()]).run()
    assert looks == ["each"] * 5


class WithMetrics(Regression):
    def training_step(self, batch):
        loss = super().training_step(batch)["loss"]
        return {"loss": loss, "twice": 2 * loss, "vector": loss.repeat(19), "share": 0.5}


def test_means_are_over_every_step_of_a_native_loop(monkeypatch):
    def make():
        made = problem(sgd)
        return WithMetrics("net", module=made.module, optimizer=made.optimizer, data=batches(), hypergradient=None)

    plan, reference = compiled(make(), GraphBackend(), monkeypatch), compiled(make(), "eager", monkeypatch)
    runs = count_runs(monkeypatch, plan)
    history = mlopt.Engine(plan, 40, log_every=20).run()
    assert runs == [19, 20]
    expected = [[reference.step()["net"] for _ in range(20)] for _ in range(2)]
    for name in ("loss", "twice"):
        assert [t for t, _ in history[f"net.{name}"]] == [20, 40]
        means = [sum(float(r[name]) for r in results) / 20 for results in expected]
        torch.testing.assert_close([m for _, m in history[f"net.{name}"]], means, rtol=1e-12, atol=0)
    assert history["net.share"] == [(20, 0.5), (40, 0.5)] and "net.vector" not in history


def test_settings_in_float32_are_no_disagreement(monkeypatch):
    """With a tensor for its rate, Adam computes a step of float64 parameters in part in float32; the graph does not."""
    made = problem(lambda net: torch.optim.Adam(net.parameters(), lr=torch.tensor(0.02)))
    plan = compiled(made, GraphBackend(), monkeypatch)  # strict: a disagreement is an error
    assert plan._report.graphs["net"][0].step.is_used()
