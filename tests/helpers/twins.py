"""Two equal programs, of which one makes steps by native programs: they must agree bit for bit."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

import mlopt
from mlopt.runtime.native_step import NativeStep
from tests.helpers.packages import PackageBackend
from tests.helpers.steps import compiled

CG = mlopt.CG(max_steps=3, damping=0.1)
FIRST = 3  # the first native step of an optimizer that makes its state in its first one


class Lower(mlopt.Problem):
    def training_step(self, batch):
        x, y = batch
        rates = self.upper.module.rates
        decay = sum(r * p.square().sum() for r, p in zip(rates, self.module.parameters(), strict=False))
        return F.cross_entropy(self.module(x), y) + decay


class Upper(mlopt.Problem):
    """Returns metrics of all kinds: tensors, a parameter, the loss itself, a number, a constant."""

    def training_step(self, batch):
        x, y = batch
        logits = self.module(self.lower(x))
        loss = F.cross_entropy(logits, y)
        hits = (logits.argmax(1) == y).float().mean()
        return {"loss": loss, "acc": hits, "scale": self.module.scale, "again": loss, "n": hits.item(), "half": 0.5}


class Head(nn.Module):
    """Parameters read by the loss alone, by the problem below alone, and by nobody; buffers that its loss writes."""

    def __init__(self, dropout):
        super().__init__()
        self.rates = nn.Parameter(torch.full((2,), 0.05))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.ones(2))
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("last_scale", torch.tensor(0.0))
        self.register_buffer("one", torch.tensor(1.0))
        self.register_buffer("two", torch.tensor(2.0))

    def forward(self, logits):
        self.last_scale.copy_(self.scale.detach())
        one = self.one.clone()
        self.one.copy_(self.two)
        self.two.copy_(one)
        return self.dropout(self.norm(logits)) * self.scale


def adam(parameters):
    return optim.Adam(parameters, lr=0.02)


def batches(sizes):
    return [(torch.randn(n, 5), torch.randint(0, 3, (n,))) for n in sizes]


def make(
    optimizer=adam,
    *,
    estimator=CG,
    scheduler=None,
    sizes=(8, 8),
    data=None,
    dropout=0.0,
    lower_dropout=0.0,
    lower=None,
    upper=Upper,
    **options,
):
    """Return two problems; `options` go to the upper one, `lower` are those of the other."""
    net, head = nn.Sequential(nn.Linear(5, 3), nn.Dropout(lower_dropout)), Head(dropout)
    sgd, made = optim.SGD(net.parameters(), lr=0.1, momentum=0.9), optimizer(head.parameters())
    return [
        Lower(
            "lower",
            module=net,
            optimizer=sgd,
            data=batches(sizes) if data is None else data(),
            hypergradient=estimator,
            **(lower or {}),
        ),
        upper(
            "upper",
            module=head,
            optimizer=made,
            data=batches(sizes) if data is None else data(),
            scheduler=scheduler and scheduler(made),
            **options,
        ),
    ]


def assert_same(a, b, where=""):
    """Everything equal, NaN included, down to types."""
    assert type(a) is type(b), (where, a, b)
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{k}")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad), (where, a, b)
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), (where, a, b)
    else:
        assert a == b or (a != a and b != b), (where, a, b)


class Twins:
    """The two programs.

    Args:
        make: Makes the problems.
        monkeypatch: The fixture.
        backend: What both are compiled by, or one for each; default: packages that are Python functions.
        options: Of `mlopt.compile`.

    Attributes:
        ours: The problems that make native steps; `plan` is theirs.
        theirs: The others; `reference` is theirs.
        num_native: How many steps were native.
        said: The warnings of all steps.
    """

    def __init__(self, make, monkeypatch, backend=None, **options):
        self.num_native, self.said = 0, ""
        results = NativeStep.results

        def counted(step, values):
            self.num_native += 1
            return results(step, values)

        monkeypatch.setattr(NativeStep, "results", counted)
        made = []
        backends = backend if isinstance(backend, list) else [backend or PackageBackend()] * 2
        for each in backends:
            torch.manual_seed(3)
            problems = make()
            made.append((problems, compiled(problems, each, monkeypatch, **options)))
        (self.ours, self.plan), (self.theirs, self.reference) = made
        self.reference._executor.native.step = lambda *args: None
        self.reference._rounds.run = lambda limit: None
        self._random = [torch.get_rng_state()] * 2
        self._results = []

    def each(self, change):
        """Change both programs: `change` is called with the plan and the problems of each, and must give the same."""
        outcomes = []
        for k, (plan, problems) in enumerate([(self.plan, self.ours), (self.reference, self.theirs)]):
            with self._random_numbers(k):
                outcomes.append(change(plan, problems))
        assert_same(*outcomes)

    def step(self, times=1):
        """Make steps of both and compare all there is to compare; return how many were native."""
        before = self.num_native
        for _ in range(times):
            outcomes = [self._step(k, plan) for k, plan in enumerate((self.plan, self.reference))]
            assert_same(*outcomes)
        self.compare_results()
        return self.num_native - before

    def run(self, steps, error=None):
        """Run both, in rounds and step by step, with an error for both if there is to be one."""
        outcomes = []
        for k, plan in enumerate((self.plan, self.reference)):
            with self._random_numbers(k):
                if error is None:
                    outcomes.append((plan.run(steps), plan.state_dict(), plan.num_steps))
                else:
                    with pytest.raises(type(error)):
                        plan.run(steps)
                    outcomes.append((plan.state_dict(), plan.num_steps))
        assert_same(*outcomes)

    def compare_results(self):
        """Compare what earlier steps have returned, as it is now."""
        for ours, theirs in zip(self._results[::2], self._results[1::2], strict=True):
            assert_same(ours, theirs)

    @contextlib.contextmanager
    def _random_numbers(self, k):
        """Each program draws its own, from the same state: shuffled batches of both are the same."""
        torch.set_rng_state(self._random[k])
        yield
        self._random[k] = torch.get_rng_state()

    def _step(self, k, plan):
        with self._random_numbers(k), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            results = plan.step()
        self.said += "".join(str(w.message) for w in said)
        self._results.append(results)
        gradients = {n: [p.grad for p in q.module.parameters()] for n, q in plan.graph.problems.items()}
        return copy.deepcopy((results, plan.state_dict(), gradients, [str(w.message) for w in said]))
