"""Solvers on operators with known solutions, float64; the true residual is recomputed, not believed."""

import pytest
import torch

from mlopt import linalg
from mlopt.linalg import DampedOperator, FunctionOperator, MatrixOperator, Outcome
from tests.helpers.quadratics import spd

N = 12


def rhs(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OPERATORS = {
    "matrix": lambda a: MatrixOperator(a),
    "function": lambda a: FunctionOperator(lambda v: a @ v, len(a), dtype=a.dtype),
    "damped": lambda a: DampedOperator(MatrixOperator(a - 0.3 * torch.eye(len(a), dtype=a.dtype)), 0.3),
}


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
class TestOperator:
    def test_products(self, make):
        a = spd(1, N)
        operator, b = make(a), rhs(3, N)
        torch.testing.assert_close(operator.as_matrix(), a)
        torch.testing.assert_close(operator.mm(b), b @ a)
        torch.testing.assert_close(operator.mv(b[0]), a @ b[0])

    @pytest.mark.parametrize("shape", [(N,), (3, N), (0, N)], ids=str)
    def test_cg(self, make, shape):
        a, b = spd(1, N), rhs(*shape)
        solution = linalg.cg(make(a), b, max_steps=40, rtol=1e-11)
        assert solution.outcome is Outcome.CONVERGED
        residual = (b - solution.value @ a).norm(dim=-1)
        assert (residual <= 2e-11 * b.norm(dim=-1)).all()
        assert solution.num_steps.shape == shape[:-1]

    @pytest.mark.parametrize("num_terms", [1, 2, 7])
    def test_neumann(self, make, num_terms):
        a, b = spd(1, N), rhs(2, N)
        step = torch.eye(N, dtype=a.dtype) - 0.4 * a
        expected = 0.4 * sum(b @ torch.linalg.matrix_power(step, k) for k in range(num_terms))
        solution = linalg.neumann(make(a), b, num_terms=num_terms, scale=0.4)
        torch.testing.assert_close(solution.value, expected, rtol=1e-12, atol=1e-12)
        assert solution.outcome is Outcome.CONVERGED


def test_cg_stops_at_the_tolerance():
    a, b = spd(1, N), rhs(N)
    solution = linalg.cg(MatrixOperator(a), b, max_steps=40, rtol=1e-3)
    assert 0 < solution.num_steps < N
    assert (b - a @ solution.value).norm() <= 1.001e-3 * b.norm()
    assert solution.relative_residual <= 1e-3


def test_cg_says_that_steps_ran_out():
    solution = linalg.cg(MatrixOperator(spd(1, N)), rhs(N), max_steps=2, rtol=1e-12)
    assert solution.outcome is Outcome.MAX_STEPS and solution.num_steps == 2
    assert "raise max_steps" in solution.outcome.advice


def test_cg_rows_stop_by_themselves():
    a = spd(1, N)
    b = rhs(3, N)
    b[1] = torch.linalg.eigh(a).eigenvectors[:, 0]  # one step suffices for an eigenvector
    b[2] = 0
    solution = linalg.cg(MatrixOperator(a), b, max_steps=40, rtol=1e-10)
    assert solution.num_steps[1] == 1 and solution.num_steps[2] == 0 and solution.num_steps[0] > 3
    assert (solution.value[2] == 0).all()
    alone = linalg.cg(MatrixOperator(a), b[0], max_steps=40, rtol=1e-10)
    torch.testing.assert_close(solution.value[0], alone.value)


def test_cg_breakdown_returns_the_iterate_before_it():
    a = torch.diag(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64)
    solution = linalg.cg(MatrixOperator(a), b, max_steps=10, rtol=1e-12)
    assert solution.outcome is Outcome.BREAKDOWN
    assert torch.isfinite(solution.value).all() and solution.num_steps >= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cg_non_finite(bad):
    a, b = spd(1, N), rhs(N)
    b[3] = bad
    assert linalg.cg(MatrixOperator(a), b).outcome is Outcome.NON_FINITE
    a[2, 2] = bad
    assert linalg.cg(MatrixOperator(a), rhs(N)).outcome is Outcome.NON_FINITE


def test_cg_first_guess():
    a, b = spd(1, N), rhs(N)
    exact = torch.linalg.solve(a, b)
    near = linalg.cg(MatrixOperator(a), b, x0=exact + 1e-6, max_steps=40, rtol=1e-8)
    cold = linalg.cg(MatrixOperator(a), b, max_steps=40, rtol=1e-8)
    assert near.num_steps < cold.num_steps
    for guess in (1e3 * exact, torch.full_like(exact, float("nan"))):  # worse than zero: zero is used
        again = linalg.cg(MatrixOperator(a), b, x0=guess, max_steps=40, rtol=1e-8)
        torch.testing.assert_close(again.value, cold.value)


def test_cg_ill_conditioned_scale():
    """Damping and scale belong to the operator: the residual that stops the solve is that of the damped system."""
    a = torch.diag(torch.logspace(-4, 2, N, dtype=torch.float64))
    b = rhs(N)
    solution = linalg.cg(DampedOperator(MatrixOperator(a), 0.5), b, max_steps=200, rtol=1e-10)
    expected = b / (a.diag() + 0.5)
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-10)


def test_neumann_divergence_is_an_outcome():
    a = torch.diag(torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64))
    b = torch.ones(3, dtype=torch.float64)
    assert linalg.neumann(MatrixOperator(a), b, num_terms=20, scale=1.0).outcome is Outcome.DIVERGING
    assert linalg.neumann(MatrixOperator(a), b, num_terms=2000, scale=1.0).outcome is Outcome.NON_FINITE
    fine = linalg.neumann(MatrixOperator(a), b, num_terms=200, scale=0.5)
    torch.testing.assert_close(fine.value, b / a.diag())


def test_matrix_must_be_square():
    with pytest.raises(ValueError, match=r"expected a square matrix \[N, N\], got shape \(2, 3\)"):
        MatrixOperator(torch.zeros(2, 3))


def blocks(count=3):
    """Independent systems side by side."""
    a = torch.stack([spd(s, N) for s in range(count)])
    return a, linalg.BlockOperator(lambda rows: torch.einsum("tij,tj->ti", a, rows), N, count, dtype=a.dtype)


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("shape", [(N,), (3, N)], ids=str)
class TestDirect:
    def test_dense(self, make, shape):
        a, b = spd(1, N), rhs(*shape)
        solution = linalg.dense(make(a), b, chunk_size=5)
        torch.testing.assert_close(solution.value @ a, b, rtol=1e-10, atol=1e-10)
        assert solution.outcome is Outcome.CONVERGED
        assert (solution.relative_residual < 1e-12).all()
        assert solution.num_steps.shape == shape[:-1]

    def test_nystrom_of_full_rank_is_exact(self, make, shape):
        a, b = spd(1, N), rhs(*shape)
        solution = linalg.nystrom(make(a), b, rank=N, damping=0.1)
        torch.testing.assert_close(solution.value @ (a + 0.1 * torch.eye(N, dtype=a.dtype)), b, rtol=1e-8, atol=1e-8)
        assert solution.outcome is Outcome.CONVERGED

    def test_preconditioned_cg(self, make, shape):
        a, b = spd(1, N), rhs(*shape)
        approximation = linalg.nystrom_approximation(make(a), 4)
        solution = linalg.preconditioned_cg(
            make(a), b, lambda r: approximation.precondition(r, 0.5), max_steps=60, rtol=1e-11
        )
        assert solution.outcome is Outcome.CONVERGED
        assert ((b - solution.value @ a).norm(dim=-1) <= 2e-11 * b.norm(dim=-1)).all()


def test_nystrom_of_low_rank_is_exact():
    half = rhs(N, 3)
    for a in (half @ half.T, half @ torch.diag(torch.tensor([1.0, -2.0, 3.0], dtype=half.dtype)) @ half.T):
        b = rhs(N)
        solution = linalg.nystrom(MatrixOperator(a), b, rank=5, damping=0.3)
        expected = torch.linalg.solve(a + 0.3 * torch.eye(N, dtype=a.dtype), b)
        torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-8)


def test_nystrom_says_what_went_wrong():
    a = -0.5 * torch.eye(N, dtype=torch.float64)
    assert linalg.nystrom(MatrixOperator(a), rhs(N), rank=N, damping=0.5).outcome is Outcome.SINGULAR
    assert linalg.nystrom(MatrixOperator(a * float("nan")), rhs(N), rank=2, damping=1.0).outcome is Outcome.NON_FINITE


def test_nystrom_makes_its_products_at_once():
    a, calls = spd(1, N), []

    def rows(v):
        calls.append(len(v))
        return v @ a

    operator = FunctionOperator(lambda v: a @ v, N, rows=rows, dtype=a.dtype)
    linalg.nystrom(operator, rhs(N), rank=4, damping=0.1)
    assert calls == [4]


def test_preconditioning_pays_on_a_bad_condition_number():
    """Four large eigenvalues; a sketch of eight finds them."""
    q = torch.linalg.qr(rhs(40, 40)).Q
    values = torch.cat([torch.tensor([1e4, 3e3, 1e3, 500.0]), torch.linspace(1, 2, 36)]).double()
    operator, b = MatrixOperator(q @ torch.diag(values) @ q.T), rhs(40)
    plain = linalg.cg(operator, b, max_steps=200, rtol=1e-10)
    approximation = linalg.nystrom_approximation(operator, 8)
    better = linalg.preconditioned_cg(
        operator, b, lambda r: approximation.precondition(r, 1.0), max_steps=200, rtol=1e-10
    )
    assert better.outcome is Outcome.CONVERGED
    assert int(better.num_steps) < int(plain.num_steps) - 3


def test_preconditioner_is_positive_definite_for_an_indefinite_operator():
    a = spd(1, N) - torch.eye(N, dtype=torch.float64)
    approximation = linalg.nystrom_approximation(MatrixOperator(a), 6)
    matrix = approximation.precondition(torch.eye(N, dtype=a.dtype), 0.1)
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_preconditioned_cg_outcomes():
    a, b = spd(1, N), rhs(N)
    run = lambda m, b, **o: linalg.preconditioned_cg(MatrixOperator(m), b, lambda r: r, **o)  # noqa: E731
    assert run(-a, b).outcome is Outcome.BREAKDOWN
    assert run(a * float("inf"), b).outcome is Outcome.NON_FINITE
    assert run(a, b, max_steps=2).outcome is Outcome.MAX_STEPS
    zero = run(a, torch.zeros_like(b))
    assert zero.outcome is Outcome.CONVERGED
    assert not zero.value.any()
    mixed = run(a, torch.stack([b, torch.zeros_like(b)]), rtol=1e-10)
    plain = linalg.cg(MatrixOperator(a), b, rtol=1e-10)
    torch.testing.assert_close(mixed.value[0], plain.value, rtol=1e-8, atol=1e-8)
    assert mixed.num_steps.tolist() == [int(plain.num_steps), 0]
    exact = run(a, b, x0=torch.linalg.solve(a, b), rtol=1e-8)
    assert int(exact.num_steps) == 0


def test_dense_on_indefinite_and_singular_matrices():
    a = spd(1, N) - torch.eye(N, dtype=torch.float64)
    b = rhs(N)
    solution = linalg.dense(MatrixOperator(a), b)
    assert solution.outcome is Outcome.CONVERGED
    torch.testing.assert_close(a @ solution.value, b, rtol=1e-9, atol=1e-9)
    half = rhs(N, 4)
    singular = half @ half.T
    b = singular @ rhs(N)
    solution = linalg.dense(MatrixOperator(singular), b)
    assert solution.outcome is Outcome.SINGULAR
    torch.testing.assert_close(solution.value, torch.linalg.pinv(singular) @ b, rtol=1e-6, atol=1e-6)
    assert linalg.dense(MatrixOperator(a * float("nan")), b).outcome is Outcome.NON_FINITE


def test_blocks_are_solved_one_by_one():
    a, operator = blocks()
    b = rhs(3, N)
    expected = torch.linalg.solve(a, b[..., None])[..., 0]
    torch.testing.assert_close(operator.as_matrix(), a)
    for solution in (linalg.dense(operator, b), linalg.cg(operator, b, max_steps=50, rtol=1e-12)):
        torch.testing.assert_close(solution.value, expected, rtol=1e-9, atol=1e-9)
        assert solution.outcomes.shape == (3,)
    with pytest.raises(ValueError, match="there are T maps|expected \\[T, N\\]"):
        operator.mv(b[0])
