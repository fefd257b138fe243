"""Bad input: each case one clear error that names the problem, what was expected and what to do."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import mlopt
from mlopt import errors
from tests.helpers.bilevel import Classifier, Reweight, data, make


def problem(step, name="lower", **options):
    module = options.pop("module", None) or nn.Linear(6, 3)
    cls = type("Custom", (mlopt.Problem,), {"training_step": step})
    options.setdefault("optimizer", torch.optim.SGD(module.parameters(), lr=0.1))
    options.setdefault("data", data())
    return cls(name, module=module, **options)


def compile_one(step, **options):
    return mlopt.compile(mlopt.Graph([problem(step, **options)]), progress=False)


def test_no_optimizer():
    with pytest.raises(
        errors.ProblemError, match=r"'lower', argument `optimizer`: expected .*Optimizer, got None; pass"
    ):
        problem(None, optimizer=None)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


class Wrapping(torch.optim.SGD):
    """Steps another optimizer; `shared` tells whether it has the groups of that one, too."""

    def __init__(self, params, shared):
        params = list(params)
        super().__init__(params, lr=0.1)
        self.base = None if shared else torch.optim.SGD(params, lr=0.1)
        self.bases = [torch.optim.SGD(params, lr=0.1)]
        if shared:
            self.param_groups = self.bases[0].param_groups


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_scheduler_of_another_optimizer(kind):
    step = lambda self, batch: self(batch[0]).square().mean()  # noqa: E731
    module = nn.Linear(6, 3)
    own, other = torch.optim.Adam(module.parameters()), torch.optim.SGD(module.parameters(), lr=0.1)
    text = f"'lower', argument `scheduler`: expected .* own optimizer, got {kind} of another SGD, .*; make it from the"
    with pytest.raises(errors.ProblemError, match=text):
        compile_one(step, module=module, optimizer=own, scheduler=SCHEDULERS[kind](other))
    compile_one(step, module=module, optimizer=own, scheduler=SCHEDULERS[kind](own)).run(2)


@pytest.mark.parametrize("shared", [True, False])
def test_scheduler_of_a_wrapped_optimizer(shared):
    module = nn.Linear(6, 3)
    optimizer = Wrapping(module.parameters(), shared)
    scheduler = lr_scheduler.StepLR(optimizer.bases[0] if shared else optimizer.base, 1)
    compile_one(
        lambda self, batch: self(batch[0]).square().mean(), module=module, optimizer=optimizer, scheduler=scheduler
    )


def test_scheduler_and_optimizer_that_a_problem_makes_itself():
    class Configured(mlopt.Problem):
        def training_step(self, batch):
            return self(batch[0]).square().mean()

        def configure_optimizer(self):
            return torch.optim.SGD(self.module.parameters(), lr=0.1)

        def configure_scheduler(self):
            return lr_scheduler.ExponentialLR(self.optimizer, 0.5)

    fit = Configured("fit", module=nn.Linear(6, 3), data=data())
    mlopt.compile(mlopt.Graph([fit]), progress=False).run(2)
    assert fit.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    fit.optimizer = torch.optim.SGD(fit.module.parameters(), lr=0.1)  # its scheduler is left behind
    with pytest.raises(errors.ProblemError, match="'fit', argument `scheduler`: .* got ExponentialLR of another SGD"):
        mlopt.compile(mlopt.Graph([fit]), progress=False)


def test_step_that_needs_a_closure():
    module = nn.Linear(6, 3)
    step = lambda self, batch: self(batch[0]).square().mean()  # noqa: E731
    optimizer = torch.optim.LBFGS(module.parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 1)  # which wraps the step
    text = (
        r"'lower', argument `optimizer`: the step of LBFGS cannot be called without 'closure': .*optimizer_step\(self\)"
    )
    for options in ({}, {"scheduler": scheduler}):
        with pytest.raises(errors.ProblemError, match=text):
            compile_one(step, module=module, optimizer=optimizer, **options)

    class Own(mlopt.Problem):
        def training_step(self, batch):
            return self(batch[0]).square().mean()

        def optimizer_step(self):
            for p in self.trained_parameters().values():
                p.data.sub_(p.grad, alpha=0.1)

    before = module.weight.detach().clone()
    own = Own("own", module=module, optimizer=torch.optim.LBFGS(module.parameters()), data=data())
    mlopt.compile(mlopt.Graph([own]), progress=False).run(2)
    assert not torch.equal(module.weight, before)


def test_foreign_parameters():
    with pytest.raises(
        errors.ProblemError, match=r"'lower', argument `optimizer`: it holds 2 parameter\(s\) that are not"
    ):
        problem(None, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_nothing_to_train():
    module = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(errors.ProblemError, match="'lower'.*none of the parameters it holds requires a gradient"):
        problem(None, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))


def test_empty_loader_with_a_length():
    with pytest.raises(errors.ProblemError, match=r"'lower', argument `data`: the loader is empty \(length 0\)"):
        problem(None, data=[])


def test_empty_loader_without_a_length():
    class Empty:
        def __iter__(self):
            return iter(())

    with pytest.raises(errors.DataError, match="'lower': its data yields no batch"):
        compile_one(lambda self, batch: self(batch[0]).mean(), data=Empty())


def test_iterator_that_runs_out():
    step = lambda self, batch: self(batch[0]).square().mean()  # noqa: E731
    plan = compile_one(step, data=iter(data((4, 4, 4))))
    plan.run(3)
    with pytest.raises(errors.DataError, match="'lower': its data ran out, and .* cannot be iterated again"):
        plan.step()


def test_failed_step_changes_nothing():
    plan = compile_one(lambda self, batch: self(batch[0]).square().mean(), data=iter(data((4, 4))))
    plan.run(2)
    module = plan.graph.problems["lower"].module
    before = module.weight.clone()
    with pytest.raises(errors.DataError):
        plan.step()
    assert torch.equal(module.weight, before) and plan.num_steps == 2


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (lambda self, batch: self(batch[0]), r"'lower': .* loss of shape \(12, 3\), expected a scalar; reduce it"),
        (lambda self, batch: None, "'lower': training_step returned None as the loss.*forget to return"),
        (lambda self, batch: {"acc": 1.0}, r"'lower': .* dict without the key 'loss' \(keys: acc\)"),
        (lambda self, batch: self(batch[0]).mean().item(), "'lower': .*as the loss, expected a scalar tensor"),
        (lambda self, batch: batch[0].mean(), "'lower': .* depends on no trainable parameter"),
        (lambda self, batch: self(batch[0]).mean().detach(), "'lower': .* depends on no trainable parameter"),
        (lambda self, batch: self(batch[0]).argmax(), "'lower': .* loss of dtype torch.int64"),
    ],
)
def test_loss_is_no_differentiable_scalar(step, text):
    with pytest.raises(errors.LossError, match=text):
        compile_one(step)


def test_unknown_problem_name():
    with pytest.raises(
        errors.UnknownNameError, match=r"'classifier': self.rewieght is neither .*did you mean self.reweight"
    ):

        class Typo(Classifier):
            def training_step(self, batch):
                return self.rewieght(batch[0]).mean()

        lower, upper = make(classifier=Typo)
        mlopt.compile(mlopt.Graph([lower, upper]), progress=False)


def test_two_problems_of_one_name():
    step = lambda self, batch: self(batch[0]).mean()  # noqa: E731
    with pytest.raises(errors.GraphError, match="two problems are named 'lower'"):
        mlopt.Graph([problem(step), problem(step)])


@pytest.mark.parametrize("name", ["not an identifier", "module", "training_step", "", 3])
def test_bad_names(name):
    with pytest.raises(errors.ProblemError, match="argument `name`"):
        problem(None, name=name)


def test_problem_hidden_by_an_attribute():
    lower, upper = make()
    lower.reweight = 3
    with pytest.raises(errors.GraphError, match="'classifier' has an attribute 'reweight', which hides the problem"):
        mlopt.Graph([lower, upper])


def test_parameter_in_two_optimizers():
    module = nn.Linear(6, 3)
    step = lambda self, batch: self(batch[0]).mean()  # noqa: E731
    with pytest.raises(errors.GraphError, match="parameter 'weight' of problem 'b' is also trained by problem 'a'"):
        mlopt.Graph([problem(step, "a", module=module), problem(step, "b", module=module)])


@pytest.mark.parametrize(("argument", "value"), [("unroll_steps", 0), ("unroll_steps", 1.5), ("warmup_steps", -1)])
def test_bad_counts(argument, value):
    with pytest.raises(errors.ProblemError, match=f"'lower', argument `{argument}`: expected an integer >="):
        problem(None, **{argument: value})


@pytest.mark.parametrize(
    "make_estimator",
    [
        lambda: mlopt.CG(max_steps=0),
        lambda: mlopt.CG(damping=-1.0),
        lambda: mlopt.CG(rtol=float("nan")),
        lambda: mlopt.Neumann(num_terms=0),
        lambda: mlopt.Neumann(scale=0.0),
        lambda: mlopt.FiniteDifference(step=-0.1),
    ],
)
def test_bad_estimator_settings(make_estimator):
    with pytest.raises(ValueError, match="argument `.*`: expected .* got"):
        make_estimator()


def test_declared_edge_that_no_loss_reads():
    first = problem(lambda self, batch: self(batch[0]).square().mean(), "first")
    second = problem(lambda self, batch: self(batch[0]).square().mean(), "second")
    graph = mlopt.Graph([first, second], dependencies={"l2u": {"first": ["second"]}})
    text = "declare the lower_to_upper edge 'first' -> 'second', but the loss of 'second' reads no .*weight, bias"
    with pytest.raises(errors.GraphError, match=text):
        mlopt.compile(graph, progress=False)


def test_edge_that_was_not_declared():
    lower, upper = make()
    graph = mlopt.Graph([lower, upper], dependencies={"l2u": {lower: [upper]}})
    text = r"the loss of 'classifier' reads parameters of 'reweight' \(0.weight.*do not declare the upper_to_lower edge"
    with pytest.raises(errors.GraphError, match=text):
        mlopt.compile(graph, progress=False)


def test_right_declaration_is_accepted():
    lower, upper = make()
    dependencies = {"l2u": {lower: [upper]}, "u2l": {"reweight": ["classifier"]}}
    mlopt.compile(mlopt.Graph([lower, upper], dependencies=dependencies), progress=False).step()


def test_declared_cycle_is_printed():
    step = lambda self, batch: self(batch[0]).mean()  # noqa: E731
    with pytest.raises(errors.GraphError, match="l2u edges form a cycle (a -> b -> a|b -> a -> b)"):
        mlopt.Graph([problem(step, "a"), problem(step, "b")], dependencies={"l2u": {"a": ["b"], "b": ["a"]}})


def test_declared_unknown_problem():
    with pytest.raises(errors.GraphError, match="unknown problem 'nobody'"):
        mlopt.Graph(list(make()), dependencies={"l2u": {"classifier": ["nobody"]}})


def test_edges_before_compilation():
    with pytest.raises(errors.GraphError, match="not known yet: they are found in the losses by mlopt.compile"):
        _ = mlopt.Graph(list(make())).nx


def test_upper_problem_that_reads_nothing_below():
    lower, upper = make()
    upper.training_step = lambda batch: upper.module(batch[0][:, :1]).mean()
    with pytest.warns(
        errors.StructureWarning, match="'reweight' shapes the loss of 'classifier' but its own loss reads"
    ):
        mlopt.compile(mlopt.Graph([lower, upper]), progress=False)


@pytest.mark.parametrize("island", [False, True])
def test_upper_problem_that_no_loss_depends_on(island):
    """The lower loss detaches the weights: nothing depends on the upper parameters."""
    lower, upper = make()

    def detached(batch):
        if island:
            print("step")
        x, y = batch
        return F.cross_entropy(lower.module(x), y) * lower.reweight(torch.zeros(1, 1)).detach().sum()

    lower.training_step = detached
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = mlopt.compile(mlopt.Graph([lower, upper]), progress=False)
    messages = [str(w.message) for w in caught if w.category is errors.StructureWarning]
    assert any(
        "'reweight': its hypergradient is zero" in m and "0.weight, 0.bias, 2.weight, 2.bias" in m for m in messages
    )
    assert bool(plan._report.islands) == island
    assert not any(g.any() for g in plan.hypergradient("reweight").values())


def structure_warnings(problems, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mlopt.compile(mlopt.Graph(problems), progress=False, **options)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught if w.category is errors.StructureWarning]


def test_upper_problem_listed_first():
    """The order is said to be the reason; what is given to the lower problem is not said to be without effect."""
    lower, upper = make(unroll_steps=3)
    (message,) = structure_warnings([upper, lower])
    assert message == (
        "problem 'reweight': its hypergradient is zero. Problem 'classifier' reads it, but comes later "
        "and so counts as the upper of the two; did you mean Graph([classifier, reweight])? The lowest comes first"
    )
    assert structure_warnings([lower, upper]) == []


def reading(name, *others):
    """A problem whose loss reads the parameters of `others`, of which it may be one."""

    def step(self, batch):
        parts = [self(batch[0]) if other == name else getattr(self, other)(batch[0]) for other in others]
        return sum(parts[1:], parts[0]).square().mean()

    return problem(step, name)


@pytest.mark.parametrize(
    ("order", "advice"),
    [
        ("top mid low", "'top': its hypergradient is zero. Problem 'mid' reads it, .* mean Graph([low, mid, top])?"),
        ("low top mid", "'top': its hypergradient is zero. Problem 'mid' reads it, .* mean Graph([low, mid, top])?"),
    ],
)
def test_order_of_three_levels(order, advice):
    made = {
        "low": reading("low", "low", "mid"),
        "mid": reading("mid", "low", "mid", "top"),
        "top": reading("top", "mid"),
    }
    found = structure_warnings([made[name] for name in order.split()])
    assert any(re.search(re.escape(advice).replace(re.escape(".*"), ".*"), message) for message in found), found
    assert structure_warnings([made[name] for name in ("low", "mid", "top")]) == []


def test_problem_that_comes_before_the_one_it_should_be_above():
    """The lower loss reads the topmost problem, which reads the middle one, which is listed last."""
    low, mid, top = reading("low", "low", "top"), reading("mid", "low", "mid"), reading("top", "mid")
    found = structure_warnings([low, top, mid])
    assert any(
        m.endswith("direct gradient only. It reads 'mid', which comes after it in the list; the lowest comes first")
        for m in found
    )
    assert any(
        "'top': its hypergradient is zero. It reads 'mid', which comes later and" in m
        and "Graph([low, mid, top])?" in m
        for m in found
    )
    assert structure_warnings([low, mid, top]) == []


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"unroll_steps": 5}, "unroll_steps=5 has"),
        ({"warmup_steps": 10}, "warmup_steps=10 has"),
        ({"hypergradient": mlopt.Identity()}, "hypergradient=Identity(scale=1.0) has"),
        (
            {"unroll_steps": 2, "hypergradient": mlopt.Identity()},
            "unroll_steps=2 and hypergradient=Identity(scale=1.0) have",
        ),
    ],
)
def test_settings_that_need_a_problem_above(options, settings):
    lower, upper = make()
    for name, value in options.items():
        setattr(upper, name, value)
    (message,) = structure_warnings([lower, upper])
    assert message.startswith(f"problem 'reweight': no problem is above it, so {settings} no effect: ")
    them = "them" if len(options) > 1 else "it"
    assert message.endswith(
        f"Leave {them} out, or give {them} to a problem below ('classifier'; the lowest comes first in the list)"
    )


def test_settings_of_a_lower_problem_or_a_single_one_are_used():
    step = lambda self, batch: self(batch[0]).square().mean()  # noqa: E731
    options = {"unroll_steps": 2, "warmup_steps": 3, "hypergradient": mlopt.CG(max_steps=2)}
    assert structure_warnings([problem(step, **options)]) == []
    assert structure_warnings(make(**options)) == []

    lower, upper = make(**options)
    for name, value in options.items():
        setattr(upper, name, value)
    assert structure_warnings([lower, upper]) == []  # given to all alike

    class Restarting(Reweight):
        def on_inner_loop_start(self):
            pass

    lower, upper = make()
    again = Restarting("reweight", module=upper.module, optimizer=upper.optimizer, data=upper.data, unroll_steps=2)
    assert structure_warnings([lower, again]) == []  # its unrolls are seen by the hook


def test_capture_failure_quotes_the_line():
    def step(self, batch):
        loss = self(batch[0]).square().mean()
        if loss > 1:  # data-dependent
            loss = loss * 2
        return loss

    with pytest.raises(
        errors.CaptureError, match=r"'lower': .*could not be captured(.|\n)*if loss > 1:  # data-dependent"
    ):
        mlopt.compile(mlopt.Graph([problem(step)]), progress=False, strict=True)
    with pytest.warns(errors.IslandWarning, match=r"if loss > 1:  # data-dependent(.|\n)*runs by plain autograd"):
        compile_one(step).run(2)


def test_code_that_fails_by_itself_is_no_island():
    def step(self, batch):
        return self(batch[0].T).mean()  # wrong shape

    with pytest.raises(
        errors.CaptureError, match=r"self\(batch\[0\].T\).mean\(\)  # wrong shape(.|\n)*the mistake is in"
    ):
        compile_one(step)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ((torch.randn(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.long)), RuntimeError, "same dtype"),
        ((torch.randn(4, 6), torch.full((4,), 7)), IndexError, "Target 7 is out of bounds"),
    ],
    ids=["dtype", "label"],
)
def test_error_of_torch_names_the_problem(wrong, kind, text, verify):
    """On the first batch, by compile or (without verification) by the first step, and on a later one."""

    def notes(batches, num_steps):
        step = lambda self, batch: F.cross_entropy(self(batch[0]), batch[1])  # noqa: E731
        with pytest.raises(kind, match=text) as caught:
            mlopt.compile(mlopt.Graph([problem(step, data=batches)]), verify=verify, progress=False).run(num_steps)
        return caught.value.__notes__

    at_compilation = ["(in problem 'lower', on its first batch, while it was compiled)"]
    assert notes([wrong], 1) == (at_compilation if verify else ["(in step 1 of problem 'lower')"])
    assert notes([*data((4, 4)), wrong], 3) == ["(in step 3 of problem 'lower')"]


def test_error_of_the_loader_names_the_problem():
    class Broken:
        def __iter__(self):
            raise OSError("no such file")

    with pytest.raises(OSError, match="no such file") as caught:
        compile_one(lambda self, batch: self(batch[0]).mean(), data=Broken())
    assert caught.value.__notes__ == ["(in problem 'lower', on its first batch, while it was compiled)"]


def test_loose_tensor_that_requires_a_gradient():
    loose = torch.ones(3, requires_grad=True)
    with pytest.raises(errors.ProblemError, match="'lower'.*requires a gradient but is no parameter of any problem"):
        compile_one(lambda self, batch: (self(batch[0]) * loose).mean())


def test_batch_with_unknown_objects():
    with pytest.raises(errors.DataError, match="'lower': its batch holds a builtins.object"):
        compile_one(lambda self, batch: self(batch["x"]).mean(), data=[{"x": torch.ones(2, 6), "y": object()}])


def test_unknown_backend():
    with pytest.raises(ValueError, match="expected one of 'auto', 'eager', 'inductor', 'native', got 'fast'"):
        mlopt.compile(mlopt.Graph(list(make())), backend="fast")


def test_engine_names_the_problem_of_a_non_finite_loss():
    plan = compile_one(lambda self, batch: self(batch[0]).square().mean() * float("inf"))
    with pytest.raises(errors.NonFiniteError, match="'lower': its loss is (inf|nan) at step 1"):
        mlopt.Engine(plan, steps=3, log_every=1, progress=False).run()


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("cg", r"got 'cg'; pass for example mlopt.CG\(\)"),
        (mlopt.CG, r"got the class CG; pass an instance, CG\(...\)"),
        (7, "got 7; pass for example"),
    ],
)
def test_hypergradient_that_is_no_estimator(value, got):
    text = f"'lower', argument `hypergradient`: expected an mlopt.AbstractEstimator or None, {got}"
    with pytest.raises(errors.ProblemError, match=text):
        problem(None, hypergradient=value)


def test_problems_that_are_in_no_graph():
    lower, upper = make()
    text = r"compile, argument `graph`: expected an mlopt.Graph, got list; .* mlopt.compile\(mlopt.Graph\(\["
    with pytest.raises(errors.GraphError, match=text):
        mlopt.compile([lower, upper])
    with pytest.raises(errors.GraphError, match=r"`problems`: expected a list of problems, got Classifier; write"):
        mlopt.Graph(lower, upper)


def test_engine_around_a_graph():
    text = r"Engine, argument `plan`: expected an mlopt.Plan, got Graph; .* mlopt.Engine\(mlopt.compile\(graph\)"
    with pytest.raises(ValueError, match=text):
        mlopt.Engine(mlopt.Graph(list(make())), steps=3)
    with pytest.raises(ValueError, match="argument `plan`: expected an mlopt.Plan, got the class Plan$"):
        mlopt.Engine(mlopt.Plan, steps=3)
