"""Hypergradients of quadratic programs against their closed forms, float64."""

import pytest
import torch

import mlopt
from tests.helpers.quadratics import program


def bilevel(estimator, **options):
    lower, upper = program({"lower": ["upper"], "upper": ["lower"]}, **options)
    lower.hypergradient = estimator
    plan = mlopt.compile(mlopt.Graph([lower, upper]), strict=True, progress=False)
    return plan, lower, upper


def pieces(lower, upper):
    """Return v, the direct gradient, H and the mixed derivative d2g/dlambda dtheta as a matrix [lambda, theta]."""
    theta, lam = lower.module().detach(), upper.module().detach()
    v = upper.B["lower"].T @ lam + upper.slope["lower"] + theta
    direct = upper.A @ lam + upper.shift + upper.B["lower"] @ theta
    return v, direct, lower.A, lower.B["upper"].T


def error(plan, expected):
    got = plan.hypergradient("upper")["w"]
    return ((got - expected).norm() / expected.norm()).item()


def test_cg():
    plan, lower, upper = bilevel(mlopt.CG(max_steps=20, rtol=1e-12))
    v, direct, H, mixed = pieces(lower, upper)
    assert error(plan, direct - mixed @ torch.linalg.solve(H, v)) < 1e-8


def test_cg_with_damping():
    plan, lower, upper = bilevel(mlopt.CG(max_steps=20, rtol=1e-12, damping=0.7))
    v, direct, H, mixed = pieces(lower, upper)
    q = torch.linalg.solve(H + 0.7 * torch.eye(len(H), dtype=H.dtype), v)
    assert error(plan, direct - mixed @ q) < 1e-8


@pytest.mark.parametrize("num_terms", [1, 2, 5, 20])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_neumann_sums_exactly_k_terms(num_terms, scale):
    plan, lower, upper = bilevel(mlopt.Neumann(num_terms=num_terms, scale=scale))
    v, direct, H, mixed = pieces(lower, upper)
    step = torch.eye(len(H), dtype=H.dtype) - scale * H
    q = scale * sum(torch.linalg.matrix_power(step, k) @ v for k in range(num_terms))
    assert error(plan, direct - mixed @ q) < 1e-10


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_finite_difference_exact(scale):
    plan, lower, upper = bilevel(mlopt.FiniteDifference(scale=scale))
    v, direct, _, mixed = pieces(lower, upper)
    assert error(plan, direct - mixed @ (scale * v)) < 1e-10


EXACT = {
    "dense": (mlopt.Dense(), 0.0),
    "dense, damped": (mlopt.Dense(damping=0.3), 0.3),
    "nystrom of full rank": (mlopt.Nystrom(rank=4, damping=0.2), 0.2),
    "preconditioned cg": (mlopt.CG(max_steps=30, rtol=1e-12, preconditioner=mlopt.Nystrom(2, 0.1)), 0.0),
}


@pytest.mark.parametrize(("estimator", "damping"), EXACT.values(), ids=EXACT)
def test_exact_estimators(estimator, damping):
    plan, lower, upper = bilevel(estimator)
    v, direct, H, mixed = pieces(lower, upper)
    assert error(plan, direct - mixed @ torch.linalg.solve(H + damping * torch.eye(len(H), dtype=H.dtype), v)) < 1e-8


def test_nystrom_of_low_rank():
    """Rank 2 of 4: the Woodbury formula on the same sketch, with explicit matrices."""
    plan, lower, upper = bilevel(mlopt.Nystrom(rank=2, damping=0.2, seed=5))
    v, direct, H, mixed = pieces(lower, upper)
    sketch = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(5), dtype=H.dtype)).Q
    columns = H @ sketch
    low_rank = columns @ torch.linalg.solve(sketch.T @ H @ sketch, columns.T)
    q = torch.linalg.solve(low_rank + 0.2 * torch.eye(4, dtype=H.dtype), v)
    assert error(plan, direct - mixed @ q) < 1e-9


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_identity(scale):
    plan, lower, upper = bilevel(mlopt.Identity(scale))
    v, direct, _, mixed = pieces(lower, upper)
    assert error(plan, direct - mixed @ (scale * v)) < 1e-10


def test_dense_refuses_large_problems():
    with pytest.raises(mlopt.errors.ProblemError, match=r"'lower', argument `hypergradient`: Dense.*\[4, 4\]"):
        bilevel(mlopt.Dense(max_size=3))


def test_finite_difference_inexact():
    plan, lower, upper = bilevel(mlopt.FiniteDifference(step=0.01, exact=False))
    v, direct, _, mixed = pieces(lower, upper)
    assert error(plan, direct - mixed @ v) < 1e-9  # the central difference of a bilinear form has no truncation error


def test_warm_start_reaches_the_same_solution():
    plan, lower, upper = bilevel(mlopt.CG(max_steps=20, rtol=1e-12, warm_start=True))
    plan.run(3)
    v, direct, H, mixed = pieces(lower, upper)
    assert error(plan, direct - mixed @ torch.linalg.solve(H, v)) < 1e-8


def test_matches_the_derivative_of_the_true_best_response():
    """At the lower optimum the hypergradient is the derivative of ``f(theta*(lambda), lambda)``."""
    plan, lower, upper = bilevel(mlopt.CG(max_steps=50, rtol=1e-13))

    def best_response(lam):
        return -torch.linalg.solve(lower.A, lower.shift + lower.B["upper"] @ lam + 0 * lam)

    def outer(lam):
        theta = best_response(lam)
        return (
            0.5 * lam @ upper.A @ lam
            + upper.shift @ lam
            + lam @ upper.B["lower"] @ theta
            + upper.slope["lower"] @ theta
            + 0.5 * theta @ theta
        )

    lam = upper.module().detach()
    with torch.no_grad():
        lower.module.w.copy_(best_response(lam))
    assert error(plan, torch.func.grad(outer)(lam)) < 1e-8


def series(A, v, terms=3, scale=0.3):
    return scale * sum(
        torch.linalg.matrix_power(torch.eye(len(A), dtype=A.dtype) - scale * A, k) @ v for k in range(terms)
    )


def damped(A, v, damping=0.2):
    return torch.linalg.solve(A + damping * torch.eye(len(A), dtype=A.dtype), v)


# Every estimator that solves at the present point, and what it stands for.
RULES = {
    "cg": (mlopt.CG(max_steps=50, rtol=1e-13), torch.linalg.solve),
    "damped cg": (mlopt.CG(max_steps=50, rtol=1e-13, damping=0.2), damped),
    "preconditioned cg": (mlopt.CG(max_steps=50, rtol=1e-13, preconditioner=mlopt.Nystrom(2, 0.1)), torch.linalg.solve),
    "dense": (mlopt.Dense(), torch.linalg.solve),
    "nystrom": (mlopt.Nystrom(rank=4, damping=0.2), damped),
    "neumann": (mlopt.Neumann(num_terms=3, scale=0.3), series),
    "identity": (mlopt.Identity(0.7), lambda A, v: 0.7 * v),
    "finite difference": (mlopt.FiniteDifference(scale=0.7), lambda A, v: 0.7 * v),
    "central difference": (mlopt.FiniteDifference(step=0.01, exact=False), lambda A, v: v),
    "sama": (mlopt.SAMA(), lambda A, v: 0.1 * v),  # the learning rate of plain SGD
}


@pytest.fixture(params=RULES.values(), ids=RULES)
def rule(request):
    return request.param


def compiled(spec, rule):
    problems = program(spec)
    for problem in problems:
        problem.hypergradient = rule[0]
        problem.rule = rule[1]
    plan = mlopt.compile(mlopt.Graph(problems), strict=True, progress=False)
    return plan, {p.name: p for p in problems}


def gradient(problems, loss, wrt):
    """d loss / d wrt by autograd on the user's own code."""
    return torch.autograd.grad(problems[loss].training_step(None), problems[wrt].module.w)[0]


def response(problems, name, cotangent, onto):
    """``-(d2g/d onto d name)^T q`` with explicit matrices; q as the estimator understands it."""
    p = problems[name]
    return -p.B[onto].T @ p.rule(p.A, cotangent)


def test_three_level_chain(rule):
    """c reads b, b reads a, a reads c."""
    plan, ps = compiled({"a": ["c"], "b": ["a"], "c": ["b"]}, rule)
    v_b = gradient(ps, "c", "b")
    v_a = response(ps, "b", v_b, "a")
    expected = gradient(ps, "c", "c") + response(ps, "a", v_a, "c")
    torch.testing.assert_close(plan.hypergradient("c")["w"], expected, rtol=1e-8, atol=1e-9)


def test_diamond_sums_both_branches(rule):
    plan, ps = compiled({"a": ["u"], "b": ["a", "u"], "c": ["a"], "u": ["b", "c"]}, rule)
    v_b, v_c = gradient(ps, "u", "b"), gradient(ps, "u", "c")
    v_a = response(ps, "b", v_b, "a") + response(ps, "c", v_c, "a")
    expected = gradient(ps, "u", "u") + response(ps, "b", v_b, "u") + response(ps, "a", v_a, "u")
    torch.testing.assert_close(plan.hypergradient("u")["w"], expected, rtol=1e-8, atol=1e-9)


def test_two_uppers_on_one_lower(rule):
    plan, ps = compiled({"a": ["u1", "u2"], "u1": ["a"], "u2": ["a"]}, rule)
    for u in ("u1", "u2"):
        expected = gradient(ps, u, u) + response(ps, "a", gradient(ps, u, "a"), u)
        torch.testing.assert_close(plan.hypergradient(u)["w"], expected, rtol=1e-8, atol=1e-9)


def test_nested_three_level(rule):
    """b reads w; w reads b and u; u reads w and b: the middle problem is itself an upper one.

    The middle problem's H is its partial Hessian, and b's optimum depends on u through w only.
    """
    plan, ps = compiled({"b": ["w"], "w": ["b", "u"], "u": ["w", "b"]}, rule)
    middle = gradient(ps, "w", "w") + response(ps, "b", gradient(ps, "w", "b"), "w")
    torch.testing.assert_close(plan.hypergradient("w")["w"], middle, rtol=1e-8, atol=1e-9)
    v_w = gradient(ps, "u", "w") + response(ps, "b", gradient(ps, "u", "b"), "w")
    expected = gradient(ps, "u", "u") + response(ps, "w", v_w, "u")
    torch.testing.assert_close(plan.hypergradient("u")["w"], expected, rtol=1e-8, atol=1e-9)


def test_nested_three_level_with_the_top_read_at_the_bottom(rule):
    """As above, and b reads u: the middle problem's condition depends on u through b's optimum as well."""
    plan, ps = compiled({"b": ["w", "u"], "w": ["b", "u"], "u": ["w", "b"]}, rule)
    v_b = gradient(ps, "u", "b")
    v_w = gradient(ps, "u", "w") + response(ps, "b", v_b, "w")
    v_b_for_w = response(ps, "w", v_w, "b")
    expected = (
        gradient(ps, "u", "u")
        + response(ps, "b", v_b, "u")
        + response(ps, "w", v_w, "u")
        + response(ps, "b", v_b_for_w, "u")
    )
    torch.testing.assert_close(plan.hypergradient("u")["w"], expected, rtol=1e-8, atol=1e-9)


def test_problem_that_cannot_depend_on_the_upper_is_a_constant(rule):
    """u reads b, and nobody below reads u through b: only the direct gradient is left."""
    plan, ps = compiled({"b": [], "a": ["u"], "u": ["a", "b"]}, rule)
    expected = gradient(ps, "u", "u") + response(ps, "a", gradient(ps, "u", "a"), "u")
    torch.testing.assert_close(plan.hypergradient("u")["w"], expected, rtol=1e-8, atol=1e-9)
    assert "[b]" not in str(plan.program)
