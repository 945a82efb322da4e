"""Conjugate gradients. Oracles: dense solves, closed forms, finite termination."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from funcscope.core.keys import fold_in, key, normal
from funcscope.linalg.cg import conjugate_gradient
from funcscope.linalg.matvec import NonFinite


def vector(n, seed, dtype=torch.float64):
    return normal(key(seed), torch.zeros(n, dtype=dtype))


def definite(n, seed, least=1.0):
    a = normal(fold_in(key(seed), "A"), torch.zeros(n, n, dtype=torch.float64))
    return a @ a.T / n + least * torch.eye(n).double()


def true_residual(A, found, b):
    return float((b - A @ found.x).norm() / b.norm())


@given(n=st.integers(1, 20), seed=st.integers(0, 99), damping=st.sampled_from([0.0, 0.7]), warm=st.booleans())
def test_solution_is_the_dense_one(n, seed, damping, warm):
    A, b, calls = definite(n, seed), vector(n, seed), []
    found = conjugate_gradient(
        lambda v: calls.append(1) or A @ v, b, damping=damping, tol=1e-10, x0=vector(n, seed + 1) if warm else None
    )
    full = A + damping * torch.eye(n).double()
    assert_close(found.x, torch.linalg.solve(full, b), rtol=1e-8, atol=1e-8)
    assert (found.status, found.num_matvecs) == ("converged", len(calls))
    assert found.residual == pytest.approx(true_residual(full, found, b), rel=1e-3, abs=1e-14)
    assert found.residual <= 1e-10
    assert found.direction is found.curvature is None


def test_it_ends_after_as_many_steps_as_there_are_eigenvalues():
    d = torch.tensor([1.0, 5.0, 20.0]).double().repeat_interleave(10)
    assert conjugate_gradient(lambda v: d * v, vector(30, 0), tol=1e-12).num_matvecs == 4  # 3 steps and the residual
    ready = conjugate_gradient(lambda v: d * v, d, x0=torch.ones(30).double())
    assert (ready.num_matvecs, ready.residual, ready.status) == (1, 0.0, "converged")


def test_a_preconditioner_takes_fewer_steps():
    d = torch.logspace(0, 6, 200).double()
    A, b = torch.diag(d) + 0.3 * torch.ones(200, 200).double() / 200, vector(200, 1)
    plain = conjugate_gradient(lambda v: A @ v, b, tol=1e-8)
    better = conjugate_gradient(lambda v: A @ v, b, tol=1e-8, preconditioner=lambda v: v / d)
    assert better.status == "converged"
    assert better.num_matvecs < 12 < 100 < plain.num_matvecs
    assert_close(better.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)
    same = conjugate_gradient(lambda v: A @ v, b, tol=1e-8, preconditioner=lambda v: v)  # its own argument
    assert_close(same.x, plain.x)


@given(n=st.integers(2, 12), seed=st.integers(0, 99))
def test_negative_curvature_is_reported_and_not_damped(n, seed):
    A = definite(n, seed)
    values, vectors = torch.linalg.eigh(A)
    A = A - 2 * values[-1] * torch.outer(vectors[:, -1], vectors[:, -1])  # the largest is now the negative one
    found = conjugate_gradient(lambda v: A @ v, vectors[:, -1] + 0.1 * vectors[:, 0], tol=1e-10)
    assert found.status == "negative_curvature"
    p = found.direction
    assert_close(found.curvature, float(p @ A @ p / (p @ p)))
    assert -values[-1] - 1e-9 <= found.curvature <= 0
    cured = conjugate_gradient(lambda v: A @ v, vectors[:, -1], damping=float(values[-1]) + 1, tol=1e-10)
    assert (cured.status, cured.direction) == ("converged", None)


def test_the_iterate_before_negative_curvature_is_kept():
    d, b = torch.tensor([10.0, -1.0]).double(), torch.tensor([1.0, 0.1]).double()
    found = conjugate_gradient(lambda v: d * v, b)
    step = b @ b / (b @ (d * b))
    assert_close(found.x, step * b)  # the first step has positive curvature, the second has not
    assert found.residual == pytest.approx(true_residual(torch.diag(d), found, b))
    assert found.num_matvecs == 3


def test_max_steps_end_with_an_honest_residual():
    A, b = definite(40, 1, least=1e-3), vector(40, 2)
    found = conjugate_gradient(lambda v: A @ v, b, tol=1e-12, max_steps=5)
    assert (found.status, found.num_matvecs) == ("max_steps", 6)
    assert found.residual == pytest.approx(true_residual(A, found, b), rel=1e-6)
    assert found.residual > 1e-6


def test_rounding_ends_in_stagnation_and_not_in_a_false_success():
    A, b = definite(60, 3, least=1e-3).float(), vector(60, 3, torch.float32)
    found = conjugate_gradient(lambda v: A @ v, b, tol=1e-9, max_steps=5000)
    assert found.status == "stagnated"
    exact = (b.double() - A.double() @ found.x.double()).norm() / b.double().norm()
    assert found.residual == pytest.approx(float(exact), rel=0.3)
    assert 1e-9 < found.residual < 1e-2


def test_where_the_recursion_is_wrong_the_steps_start_again_from_the_product():
    A, b, calls = definite(30, 1), vector(30, 2), []

    def drifting(v):
        calls.append(1)
        return A @ v * (1.001 if len(calls) == 2 else 1.0)

    found = conjugate_gradient(drifting, b, tol=1e-8)
    assert found.status == "converged"
    assert true_residual(A, found, b) <= 1e-8
    assert found.num_matvecs == len(calls) > conjugate_gradient(lambda v: A @ v, b, tol=1e-8).num_matvecs + 1


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_unit_of_the_right_side_does_not_matter(size):
    A, b = definite(10, 1).float(), vector(10, 2, torch.float32)
    plain, moved = (conjugate_gradient(lambda v: A @ v, c * b, tol=1e-5) for c in (1.0, size))
    assert_close(moved.x / size, plain.x, rtol=1e-4, atol=1e-5)
    assert moved.status == "converged"
    assert moved.x.dtype == torch.float32


def test_zero_has_the_solution_zero():
    found = conjugate_gradient(lambda v: 2 * v, torch.zeros(4), x0=torch.ones(4))
    assert (found.x.tolist(), found.residual, found.num_matvecs, found.status) == ([0.0] * 4, 0.0, 0, "converged")


def test_arguments_are_left_alone():
    A, b, x0 = definite(8, 1), vector(8, 2), vector(8, 3)
    b_before, x_before = b.clone(), x0.clone()
    conjugate_gradient(lambda v: A @ v, b, x0=x0, preconditioner=lambda v: v)
    conjugate_gradient(lambda v: v, b)  # the matvec returns its argument
    assert torch.equal(b, b_before)
    assert torch.equal(x0, x_before)


def test_bad_requests_get_one_clear_line():
    b = torch.ones(3)
    raw = inspect.unwrap(conjugate_gradient)
    for name, value in (("damping", -1.0), ("damping", float("nan")), ("tol", 0.0), ("max_steps", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            conjugate_gradient(lambda v: v, b, **{name: value})
    with pytest.raises(ValueError, match=r"`x0` must be a flat vector of shape \(3,\)"):
        raw(lambda v: v, b, x0=torch.ones(2))
    with pytest.raises(ValueError, match="`preconditioner` must be positive definite, but r'Mr = -3"):
        conjugate_gradient(lambda v: 2 * v, b, preconditioner=lambda v: -v)
    with pytest.raises(NonFinite):
        conjugate_gradient(lambda v: v / 0, b)
