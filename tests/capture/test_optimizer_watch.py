"""What an optimizer's watch sees: everything that decides what the next step is."""

import copy

import pytest
import torch

from mlopt.capture.optimizer_watch import watch


def make(optimizer=torch.optim.Adam, **options):
    parameters = {name: torch.nn.Parameter(torch.randn(3)) for name in ("a", "b")}
    made = optimizer(parameters.values(), lr=0.1, **options)
    for p in parameters.values():
        p.grad = torch.ones(3)
    made.step()
    return made, parameters


def replace_state(optimizer, parameters):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def swap_parameter(optimizer, parameters):
    optimizer.param_groups[0]["params"][1] = torch.nn.Parameter(torch.zeros(3))


def assign(key, value):
    return lambda optimizer, _: optimizer.param_groups[0].__setitem__(key, value)


SEEN = {
    "a flag": assign("amsgrad", True),
    "a tuple of another length": assign("betas", (0.9, 0.99, 0.999)),
    "a number of another kind": assign("lr", 1),
    "a tensor for a number": assign("lr", torch.tensor(0.1)),
    "a number that steers": assign("weight_decay", 0.1),
    "a new setting": assign("clip", 3.0),
    "a list that was written into": lambda o, _: o.param_groups[0]["layers"].append(4),
    "a setting that is gone": lambda o, _: o.param_groups[0].pop("eps"),
    "another group": lambda o, _: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}),
    "a parameter that is gone": lambda o, _: o.param_groups[0]["params"].pop(),
    "a parameter replaced": swap_parameter,
    "state that was loaded": replace_state,
    "an entry of the state that is gone": lambda o, p: o.state[p["b"]].pop("exp_avg"),
    "no state": lambda o, p: o.state.clear(),
    "a hook": lambda o, _: o.register_step_pre_hook(lambda *_: None),
    "another step": lambda o, _: setattr(o, "step", lambda: None),
}


@pytest.mark.parametrize("change", SEEN)
def test_a_change_is_seen(change):
    optimizer, parameters = make(weight_decay=0.0)
    optimizer.param_groups[0]["layers"] = [1, 2]
    seen = watch(optimizer, parameters, {(0, "weight_decay")})
    assert seen.is_unchanged()
    SEEN[change](optimizer, parameters)
    assert not seen.is_unchanged()


def test_what_the_graph_reads_may_change():
    optimizer, parameters = make()
    seen = watch(optimizer, parameters, set())
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.param_groups[0]["weight_decay"] = 0  # as it was: an int
    with torch.no_grad():
        parameters["a"].zero_()
    optimizer.step()  # the state is written in place
    assert seen.is_unchanged()


def test_there_is_none_over_settings_that_are_tensors():
    optimizer, parameters = make()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    assert watch(optimizer, parameters, set()) is None
