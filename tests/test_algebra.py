"""Operator algebra. Oracles: the same algebra of dense matrices, eigh, scipy."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh
from torch.testing import assert_close

from funcscope.core.keys import key, normal
from funcscope.linalg.algebra import (
    added,
    dense,
    embedded,
    gathered,
    masked,
    principal,
    projected,
    scaled,
    shifted,
    to_scipy,
)
from funcscope.linalg.matvec import NonFinite

N = 9
SLICES = [slice(5, 8), slice(0, 2)]
INDEX = torch.tensor([5, 6, 7, 0, 1])


def symmetric(n, seed):
    a = normal(key(seed), torch.zeros(n, n, dtype=torch.float64))
    return a + a.T


A, B = symmetric(N, 0), symmetric(N, 1)
LIKE = A[0]
KEPT = torch.zeros(N, dtype=torch.bool).index_fill(0, INDEX, True)
Q = torch.linalg.qr(normal(key(2), torch.zeros(N, 3, dtype=torch.float64))).Q
OUT = torch.eye(N).double() - Q @ Q.T
D = torch.diag(KEPT.double())


def a(v):
    return A @ v


def b(v):
    return B @ v


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize(("matvec", "wanted"), [
    (a, A),
    (added(a), A),
    (added(a, b, a), 2 * A + B),
    (scaled(a, -2.5), -2.5 * A),
    (shifted(a, 0.5), A + 0.5 * torch.eye(N).double()),
    (projected(a, Q.T), OUT @ A @ OUT),
    (projected(a, Q.T[:0]), A),
    (masked(a, KEPT), D @ A @ D),
    (masked(a, SLICES), D @ A @ D),
    (added(scaled(projected(a, Q.T), 2.0), shifted(masked(b, SLICES), -1.0)),
     2 * OUT @ A @ OUT + D @ B @ D - torch.eye(N).double()),
])  # fmt: skip
def test_closures_are_the_matrices(matvec, wanted, chunk):
    assert_close(dense(matvec, LIKE, chunk=chunk), wanted)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_principal_submatrix_is_an_operator_of_its_own_size(chunk):
    block = principal(a, LIKE, SLICES)
    assert_close(dense(block, gathered(LIKE, SLICES), chunk=chunk), A[INDEX][:, INDEX])


@given(seed=st.integers(0, 99), n=st.integers(1, 8))
def test_deflation_by_eigenvectors_leaves_the_other_eigenvalues(seed, n):
    M = symmetric(n, seed)
    values, vectors = torch.linalg.eigh(M)
    deflated = dense(projected(lambda v: M @ v, vectors.T[-1:]), M[0])
    left = torch.cat([values[:-1], torch.zeros(1).double()]).sort().values
    assert_close(torch.linalg.eigvalsh(deflated), left, rtol=1e-9, atol=1e-9)


def test_dense_keeps_rows_and_columns_apart():
    M = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for chunk in (None, 1, 2):
        assert_close(dense(lambda v: M @ v, M[0], chunk=chunk), M)


def test_gathered_and_embedded_are_inverse():
    v = torch.arange(N).double()
    short = gathered(v, SLICES)
    assert short.tolist() == INDEX.tolist()
    assert_close(embedded(short, SLICES, N), D @ v)
    with pytest.raises(ValueError, match="`vector` must have the 5 entries of its slices, got 6"):
        embedded(torch.zeros(6), SLICES, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy_finds_the_eigenvalues(dtype):
    M, calls = A.to(dtype), []
    operator = to_scipy(lambda v: calls.append(v.dtype) or M @ v, M[0])
    start = np.ones(N, dtype=operator.dtype)
    values = eigsh(operator, k=3, which="LA", return_eigenvectors=False, v0=start)
    wanted = torch.linalg.eigvalsh(A)[-3:].numpy()
    np.testing.assert_allclose(np.sort(values), wanted, rtol=1e-10 if dtype == torch.float64 else 1e-5)
    assert set(calls) == {dtype}
    assert operator.dtype == np.dtype(str(dtype).removeprefix("torch."))
    np.testing.assert_allclose(operator @ np.eye(N), A.numpy(), rtol=1e-5)  # matrices, too
    np.testing.assert_allclose(operator.T @ start, operator @ start)


@pytest.mark.parametrize("make", [
    added, lambda f: scaled(f, 2.0), lambda f: shifted(f, 1.0), lambda f: projected(f, Q.T),
    lambda f: masked(f, KEPT), lambda f: masked(f, SLICES),
])  # fmt: skip
def test_a_product_takes_one_product_and_changes_nothing(make):
    calls, v = [], normal(key(3), LIKE)
    before, buffer = v.clone(), torch.zeros(N).double()
    found = make(lambda v: calls.append(1) or torch.mv(A, v, out=buffer))(v)
    assert len(calls) == 1
    assert torch.equal(v, before)
    assert torch.equal(found, make(a)(v))


def test_a_sum_is_right_where_its_parts_return_their_argument_or_share_a_buffer():
    v, buffer = normal(key(3), LIKE), torch.zeros(N).double()
    before = v.clone()
    assert_close(added(lambda v: v, b)(v), v + B @ v)
    assert torch.equal(v, before)
    first, second = (lambda v, M=M: torch.mv(M, v, out=buffer) for M in (A, B))
    assert_close(added(first, second)(v), (A + B) @ v)


def test_bad_requests_get_one_clear_line():
    with pytest.raises(ValueError, match="at least one operator"):
        added()
    for f, name in ((scaled, "factor"), (shifted, "shift")):
        with pytest.raises(ValueError, match=f"`{name}` must be a finite number, got nan"):
            f(a, float("nan"))
    with pytest.raises(ValueError, match=r"`basis` must have orthonormal rows, but .* off the identity by 3"):
        projected(a, 2 * Q.T)
    with pytest.raises(ValueError, match="orthonormal"):
        projected(a, Q.T * (1 + 1e-9))
    for slices in ([slice(0, 10)], [slice(0, 3), slice(2, 4)], []):
        with pytest.raises(ValueError, match="`slices` must"):
            principal(a, LIKE, slices)
    with pytest.raises(ValueError, match="`kept` must"):
        masked(a, [slice(0, 10)])(LIKE)
    with pytest.raises(ValueError, match="at most `limit` = 8 entries, got 9"):
        dense(a, LIKE, limit=8)
    for chunk in (None, 3):
        with pytest.raises(NonFinite, match="product 1"):
            dense(lambda v: v / 0, LIKE, chunk=chunk)
    with pytest.raises(ValueError, match="`chunk`"):
        dense(a, LIKE, chunk=0)
    with pytest.raises(TypeError, match="float32 or float64"):
        inspect.unwrap(to_scipy)(a, LIKE.half())
    with pytest.raises(NonFinite):
        to_scipy(lambda v: v / 0, LIKE) @ np.ones(N)
