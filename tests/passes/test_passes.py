"""Each pass: what it removes, the same numbers after it, nothing to do, idempotence."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from mlopt.autodiff.trace import keep_random_layout
from mlopt.passes import (
    has_writes,
    merge_equal_nodes_pass,
    remove_dead_nodes_pass,
    remove_fresh_writes_pass,
    remove_identities_pass,
    remove_neutral_operands_pass,
    run_default_passes,
)

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def traced(function):
    module = make_fx(function)(X)
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    module.recompile()
    return module


def calls(module):
    return sum(n.op == "call_function" for n in module.graph.nodes)


CASES = {
    "merge": (merge_equal_nodes_pass, lambda x: (x.exp() + x.exp() * x.sin() + x.sin(),), 1 + 1 + 1 + 2),
    "merge keeps dtypes apart": (
        merge_equal_nodes_pass,
        lambda x: (x.sum() + 1, torch.full((2,), 1), torch.full((2,), 1.0)),
        4,
    ),
    "merge keeps -0.0 apart": (merge_equal_nodes_pass, lambda x: (x.clamp(min=0.0), x.clamp(min=-0.0)), 2),
    "dead": (remove_dead_nodes_pass, lambda x: (x.exp(), x.sin())[:1], 1),
    # The first of the two transposes is left for dead-code removal.
    "identities": (remove_identities_pass, lambda x: (x.detach().clone().t().t().view(4, 4).exp(),), 2),
    "neutral operands": (  # the tensors of zeros and ones are left for dead-code removal
        remove_neutral_operands_pass,
        lambda x: ((torch.ones(4, 4) * (torch.zeros(1, 4).expand(4, 4) + x) + 0.0 - torch.full((4, 4), 0.0)) / 1,),
        4,
    ),
    "powers of zero": (remove_neutral_operands_pass, lambda x: (x.exp() * (x.pow(0.0) * 1.0),), 2),
    "operands that are not neutral": (
        remove_neutral_operands_pass,
        lambda x: (x * torch.zeros_like(x), torch.zeros_like(x) - x, 1 / x, x.int() + 0.0, x[0] + torch.zeros(4, 4)),
        10,
    ),
    "layouts": (remove_neutral_operands_pass, lambda x: (torch.zeros(4, 4) + x.t(), torch.ones(2, 1, 1) * x), 5),
    "writes to fresh tensors": (
        remove_fresh_writes_pass,
        lambda x: (x.clone().mul_(2).add_(1), x.clone().lerp_(x, 0.5)),
        5,
    ),
    "a clone that changes the layout stays": (
        remove_identities_pass,
        lambda x: (x.clone(memory_format=torch.contiguous_format),),
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_pass(name):
    rewrite, function, expected = CASES[name]
    module = traced(function)
    before = module(X)
    assert rewrite(module) is module
    assert calls(module) == expected, module.code
    assert all(torch.equal(a, b) for a, b in zip(before, module(X), strict=True))
    code = module.code
    assert rewrite(module).code == code


def test_random_calls_stay():
    """Two draws are not equal, and one that nothing reads still moves the generator."""
    module = traced(lambda x: (torch.rand_like(x) - torch.rand_like(x),))
    module = run_default_passes(module)
    assert calls(module) == 3
    dead = traced(lambda x: (torch.rand_like(x), x.exp())[1:])
    assert calls(run_default_passes(dead)) == 2


def writes_twice(x):
    a = x.clone()
    b = a.t()
    a.mul_(2)
    return (a, b)


def writes_an_input(x):
    return (x.add_(1),)


def writes_another_dtype(x):
    return (x.int().add_(x.int()), x.to(torch.float16).add_(x[0, 0].half()), x.half().add_(x))


@pytest.mark.parametrize(("function", "left"), [(writes_twice, 1), (writes_an_input, 1), (writes_another_dtype, 1)])
def test_writes_that_others_see_stay(function, left):
    module = make_fx(function)(X.clone())
    expected = function(X.clone())
    remove_fresh_writes_pass(module)
    mutable = [n for n in module.graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]
    assert len(mutable) == left
    assert has_writes(module)
    for a, b in zip(module(X.clone()), expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_writes_with_a_free_size():
    module = make_fx(lambda x: (x.exp().div_(x.shape[0]),), tracing_mode="symbolic")(X)
    expected = module(X)
    assert not has_writes(remove_fresh_writes_pass(module))
    torch.testing.assert_close(module(X), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.t()], ids=["", "transposed"])
def test_masks_of_dropout(layout):
    """The functional operation draws as the writing one does, once `keep_random_layout` has seen it."""
    module = make_fx(lambda x: (F.dropout(layout(x), 0.3),))(X)
    assert has_writes(module)
    torch.manual_seed(5)
    expected = F.dropout(layout(X), 0.3)
    assert not has_writes(remove_fresh_writes_pass(module))
    keep_random_layout(module)
    torch.manual_seed(5)
    torch.testing.assert_close(module(X)[0], expected, rtol=0, atol=0)


def test_a_mask_without_a_given_probability_stays():
    module = make_fx(lambda x: (torch.empty_like(x).bernoulli_(),))(X)
    list(module.graph.nodes)[-2].args = list(module.graph.nodes)[-2].args[:1]
    assert has_writes(remove_fresh_writes_pass(module))
