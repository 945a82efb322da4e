"""Diagonal estimators. Oracles: dense matrices, the definition with one projection per vector, all sign vectors."""

from itertools import product as product_of

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope.linalg.diagonal as module
from funcscope.core.keys import BLOCK, fold_in, key, normal, rademacher
from funcscope.linalg.diagonal import hutchinson_diagonal, xdiag
from funcscope.linalg.matvec import NonFinite
from funcscope.linalg.trace import hutchinson_trace

BOTH = [hutchinson_diagonal, xdiag]


def symmetric(n, seed):
    a = normal(key(seed), torch.zeros(n, n, dtype=torch.float64))
    return a + a.T


def low_rank(n, rank, seed=0):
    a = normal(key(seed), torch.zeros(n, rank, dtype=torch.float64))
    return (a * torch.tensor([(-1.0) ** j for j in range(rank)]).to(a)) @ a.T


def test_hutchinson_diagonal_is_the_mean_of_its_samples():
    A = symmetric(7, 1)
    found = hutchinson_diagonal(lambda v: A @ v, A[0], key=key(3), num=5)
    z = torch.stack([rademacher(fold_in(key(3), i), A[0]) for i in range(5)])
    samples = z * (z @ A)
    assert_close(found.value, samples.mean(0))
    assert_close(found.stderr, samples.std(0) / 5**0.5)
    assert found.num_matvecs == 5
    assert_close(found.value.sum(), hutchinson_trace(lambda v: A @ v, A[0], key=key(3), num=5).value)


def test_the_scatter_keeps_its_digits_on_a_large_diagonal():
    off = symmetric(6, 2).float() * 0.1
    off.fill_diagonal_(0)
    A = off + 3000 * torch.eye(6)  # squares of 9e6, a scatter of 0.1
    found = hutchinson_diagonal(lambda v: A @ v, A[0], key=key(0), num=200)
    wanted = off.norm(dim=1) / 200**0.5
    assert_close(found.stderr, wanted, rtol=0.25, atol=0)


@given(n=st.integers(1, 9), num=st.integers(2, 20), seed=st.integers(0, 99))
def test_a_diagonal_has_no_scatter(n, num, seed):
    d = torch.arange(n).double() - 2
    found = hutchinson_diagonal(lambda v: d * v, d, key=key(seed), num=num)
    assert_close(found.value, d, rtol=1e-12, atol=1e-12)
    assert float(found.stderr.abs().max()) < 1e-12


def xdiag_by_definition(A, omega):
    out = []
    for i in range(omega.shape[1]):
        u, s, _ = torch.linalg.svd(A @ torch.cat([omega[:, :i], omega[:, i + 1 :]], 1), full_matrices=False)
        q = u[:, s > 1e-10 * s.amax()] if s.numel() else u[:, :0]
        out.append((q @ q.T @ A).diagonal() + omega[:, i] * (A @ omega[:, i] - q @ (q.T @ A @ omega[:, i])))
    return torch.stack(out)


@pytest.mark.parametrize("num", [2, 3, 4, 9, 16])
def test_xdiag_is_its_definition(num):
    A = symmetric(30, 1)
    found = xdiag(lambda v: A @ v, A[0], key=key(3), num=num)
    omega = torch.stack([rademacher(fold_in(key(3), i), A[0]) for i in range(num // 2)], dim=1)
    samples = xdiag_by_definition(A, omega)
    assert_close(found.value, samples.mean(0))
    if num > 3:
        assert_close(found.stderr, samples.std(0) / (num // 2) ** 0.5)
    assert found.num_matvecs == num // 2 * 2


@pytest.mark.parametrize("A", [symmetric(5, 1), low_rank(5, 1), torch.ones(5, 5).double()], ids=["full", "one", "ones"])
def test_xdiag_is_unbiased_over_all_signs(A, monkeypatch):
    signs = [torch.tensor([1.0, *rest], dtype=torch.float64) for rest in product_of((-1.0, 1.0), repeat=4)]
    monkeypatch.setattr(module, "fold_in", lambda pair, i: pair[i])  # an overall sign of a vector changes nothing
    monkeypatch.setattr(module, "rademacher", lambda at, like: signs[at])
    monkeypatch.setattr(module, "draw", lambda at, num, distribution, start, stop, device: signs[at])
    monkeypatch.setattr(module, "check_sampled", lambda *_: None)
    raw = module.xdiag.__wrapped__ if hasattr(module.xdiag, "__wrapped__") else module.xdiag
    found = [raw(lambda v: A @ v, A[0], key=pair, num=4).value for pair in product_of(range(16), repeat=2)]
    assert_close(torch.stack(found).mean(0), A.diagonal(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_xdiag_is_exact_on_a_low_rank(rank, dtype):
    A = low_rank(40, rank).to(dtype)
    found = xdiag(lambda v: A @ v, A[0], key=key(0), num=16)
    size = 100 * torch.finfo(dtype).eps * float(A.abs().max())
    assert_close(found.value, A.diagonal(), rtol=0, atol=size)
    assert float(found.stderr.max()) <= size
    assert found.value.dtype == found.stderr.dtype == dtype


def test_xdiag_wins_where_the_spectrum_decays():
    q = torch.linalg.qr(symmetric(60, 3)).Q
    A = (q * 0.6 ** torch.arange(60)) @ q.T
    error = {}
    for f in BOTH:
        found = [f(lambda v: A @ v, A[0], key=fold_in(key(5), i), num=20) for i in range(10)]
        gaps = torch.stack([e.value - A.diagonal() for e in found])
        error[f] = float(gaps.square().mean().sqrt())
        reported = float(torch.stack([e.stderr for e in found]).square().mean().sqrt())
        assert 0.5 < reported / error[f] < 1.5
    assert error[xdiag] < 0.3 * error[hutchinson_diagonal]


def test_slabs_of_a_long_vector_fit_together():
    n = BLOCK + 3
    d = torch.linspace(-1, 1, n)
    vector = normal(key(1), d)
    found = xdiag(lambda v: vector * (vector @ v) / n + 0 * d, d, key=key(0), num=4)
    assert_close(found.value, vector.square() / n, rtol=1e-3, atol=1e-6)
    plain = xdiag(lambda v: d * v, d, key=key(0), num=4)
    omega = torch.stack([rademacher(fold_in(key(0), i), d) for i in range(2)], dim=1)
    y = d[:, None] * omega
    samples = []
    for i in range(2):  # Q_i is the other product alone
        q = y[:, 1 - i] / y[:, 1 - i].norm()
        samples.append(d * q * q + omega[:, i] * (y[:, i] - q * (q @ y[:, i])))
    assert_close(plain.value, torch.stack(samples).mean(0), rtol=1e-3, atol=1e-4)


@given(n=st.integers(1, 6), num=st.integers(2, 14), seed=st.integers(0, 99))
def test_any_number_of_products_does(n, num, seed):
    A, calls = symmetric(n, seed), []
    found = xdiag(lambda v: calls.append(1) or A @ v, A[0], key=key(seed), num=num)
    assert len(calls) == found.num_matvecs <= num
    assert found.value.isfinite().all()
    if num >= n:
        assert_close(found.value, A.diagonal())
        assert (found.num_matvecs, float(found.stderr.max())) == (n, 0.0)


@pytest.mark.parametrize("f", BOTH)
def test_a_matvec_may_return_its_argument_or_its_own_buffer(f):
    buffer, A = torch.zeros(20).double(), symmetric(20, 1)
    own = f(lambda v: torch.mv(A, v, out=buffer), buffer, key=key(1), num=6)
    assert_close(own.value, f(lambda v: A @ v, buffer, key=key(1), num=6).value)
    same, copy = (f(g, torch.zeros(20).double(), key=key(1), num=6) for g in (lambda v: v, lambda v: v.clone()))
    assert_close(same.value, copy.value)


def test_results_are_short_and_one_sample_has_no_error():
    one = hutchinson_diagonal(lambda v: v, torch.zeros(5), key=key(0), num=1)
    assert one.stderr.isnan().all()
    assert xdiag(lambda v: v, torch.zeros(5), key=key(0), num=3).stderr.isnan().all()
    for f, least in ((hutchinson_diagonal, 1), (xdiag, 2)):
        with pytest.raises(ValueError, match=f"`num` must be an integer of at least {least}"):
            f(lambda v: v, torch.zeros(5), key=key(0), num=least - 1)
        with pytest.raises(NonFinite, match="product 1"):
            f(lambda v: v / 0, torch.zeros(5), key=key(0), num=4)
