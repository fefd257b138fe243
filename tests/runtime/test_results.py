"""What steps return and leave in ``.grad`` are tensors of their own, whatever the user's code returned."""

import pytest
import torch
from torch import nn

import mlopt
from tests.helpers.steps import GraphBackend, compiled


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.tensor(0.0))


class Own(mlopt.Problem):
    def training_step(self, batch):
        self.module.calls += 1
        w = self.module.w
        return {"loss": w.square(), "w": w, "view": w.view(1)[0], "calls": self.module.calls}


class Loss(mlopt.Problem):
    def training_step(self, batch):
        return self.module.w


class Island(Own):
    def training_step(self, batch):
        if self.module.w.item() < -1e9:  # cannot be captured: runs by plain autograd
            return {}
        return super().training_step(batch)


class Linear(mlopt.Problem):
    """Its gradient is a parameter of the other problem."""

    def training_step(self, batch):
        return self.module.w * self.upper.module.w


class Quadratic(mlopt.Problem):
    def training_step(self, batch):
        return self.module.w.square() + self.lower.module.w.square()


def problem(cls, name="p", **options):
    module = Scale()
    return cls(name, module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.25), **options)


@pytest.mark.parametrize("backend", ["eager", GraphBackend()], ids=["eager", "graphs"])
@pytest.mark.parametrize("cls", [Own, Loss, Island])
@pytest.mark.filterwarnings("ignore::mlopt.errors.IslandWarning")
def test_results_stay_what_they_were(cls, backend, monkeypatch):
    plan = compiled(problem(cls), backend, monkeypatch, strict=cls is not Island)
    results = [plan.step()["p"] for _ in range(2)]
    w = [2.0, 1.75] if cls is Loss else [2.0, 1.0]
    for result, value, calls in zip(results, w, (1, 2), strict=True):
        assert not any(tensor.requires_grad for tensor in result.values())
        found = {key: float(tensor) for key, tensor in result.items()}
        expected = {"loss": value**2, "w": value, "view": value, "calls": calls}
        assert found == ({"loss": value} if cls is Loss else expected)


def test_gradients_can_be_written(monkeypatch):
    lower, upper = problem(Linear, "lower", hypergradient=mlopt.Identity()), problem(Quadratic, "upper")
    plan = compiled([lower, upper], "eager", monkeypatch)
    plan.keep_gradients = True
    plan.step()
    before = upper.module.w.item()
    lower.module.w.grad.zero_()
    assert upper.module.w.item() == before
