"""Trace estimators. Oracles: dense matrices, the definitions with one projection per vector, closed forms."""

import inspect
from itertools import product as product_of

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope.linalg.trace as trace
from funcscope.core.keys import fold_in, key, normal, rademacher
from funcscope.linalg.diagonal import sketch
from funcscope.linalg.matvec import NonFinite, Products
from funcscope.linalg.trace import TraceEstimate, block_traces, hutchinson_trace, hutchpp_trace, xtrace

P = 60
ORDER = torch.arange(P, dtype=torch.float64)
SPECTRA = {
    "flat": 3 - 2 * ORDER / P,
    "power": (ORDER + 1) ** -2,
    "exponential": 0.7**ORDER,
    "step": torch.where(ORDER < 5, 1.0, 1e-3),
    "both signs": (ORDER + 1) ** -2 * (-1) ** ORDER,
}
ALL = [hutchinson_trace, hutchpp_trace, xtrace]
SKETCHED = [hutchpp_trace, xtrace]


def symmetric(n, seed):
    a = normal(key(seed), torch.zeros(n, n, dtype=torch.float64))
    return a + a.T


def with_spectrum(values, seed=0):
    n = len(values)
    q = torch.linalg.qr(normal(key(seed), torch.zeros(n, n, dtype=torch.float64))).Q
    return (q * values) @ q.T


def product(A):
    return lambda v: A @ v


def like(n, dtype=torch.float64):
    return torch.zeros(n, dtype=dtype)


def runs(f, A, num, keys, **settings):
    """Errors and standard errors over many keys."""
    found = [f(product(A), A[0], key=fold_in(key(7), i), num=num, **settings) for i in range(keys)]
    errors = torch.stack([e.value for e in found]) - A.trace()
    return errors, torch.stack([e.stderr for e in found])


@pytest.fixture
def quick_draws(monkeypatch):
    """Draws of the same laws without worker threads, for the tests that take thousands."""

    def generator(key):
        return torch.Generator().manual_seed(key.bits % 2**32)

    def quick_normal(key, like):
        return torch.randn(like.shape, generator=generator(key), dtype=like.dtype)

    def quick_signs(key, like):
        return torch.randint(0, 2, like.shape, generator=generator(key)).to(like) * 2 - 1

    draws = {"normal": quick_normal, "rademacher": quick_signs}
    monkeypatch.setattr(trace, "random", lambda key, like, distribution: draws[distribution](key, like))
    monkeypatch.setattr(trace, "normal", quick_normal)


@pytest.fixture
def all_signs(monkeypatch):
    """Probe i is the i-th of the 2^n vectors of signs: an estimate with 2^n of them has no sampling error."""

    def signs(key, like):
        return torch.tensor(list(product_of((-1.0, 1.0), repeat=len(like)))).to(like)[key]

    monkeypatch.setattr(trace, "random", lambda key, like, _: signs(key, like))
    monkeypatch.setattr(trace, "rademacher", signs)
    monkeypatch.setattr(trace, "fold_in", lambda key, i: i)


def rms(x):
    return float(x.square().mean().sqrt())


# Hutchinson


@given(n=st.integers(1, 9), num=st.integers(1, 12), seed=st.integers(0, 99))
def test_hutchinson_with_signs_has_no_scatter_on_a_diagonal(n, num, seed):
    diagonal = torch.arange(n).double() - 2
    found = hutchinson_trace(lambda v: diagonal * v, diagonal, key=key(seed), num=num)
    assert found.samples.tolist() == [float(diagonal.sum())] * num
    assert float(hutchinson_trace(lambda v: v, like(n), key=key(seed), num=9, distribution="normal").stderr) > 0


@pytest.mark.parametrize(("distribution", "draw"), [("rademacher", rademacher), ("normal", normal)])
def test_hutchinson_is_the_mean_of_its_forms(distribution, draw):
    A = symmetric(7, 1)
    found = hutchinson_trace(product(A), A[0], key=key(3), num=5, distribution=distribution)
    z = torch.stack([draw(fold_in(key(3), i), A[0]) for i in range(5)])
    assert_close(found.samples, ((z @ A) * z).sum(1))
    assert_close(found.value, found.samples.mean())
    assert_close(found.stderr, found.samples.std() / 5**0.5)
    assert (found.num_matvecs, found.method) == (5, "hutchinson")


@pytest.mark.usefixtures("all_signs")
def test_hutchinson_with_signs_has_the_mean_and_variance_of_its_docstring():
    A = symmetric(5, 2)
    x = hutchinson_trace(product(A), A[0], key=key(0), num=32).samples
    assert_close(x.mean(), A.trace())
    assert_close(x.var(correction=0), 2 * (A.square().sum() - A.diagonal().square().sum()))


@pytest.mark.usefixtures("quick_draws")
def test_hutchinson_with_normal_draws_has_the_variance_of_its_docstring():
    A = symmetric(5, 2)
    x = hutchinson_trace(product(A), A[0], key=key(0), num=3000, distribution="normal").samples
    spread = ((x - x.mean()) ** 2).std() / len(x) ** 0.5
    assert abs(x.var() - 2 * A.square().sum()) < 4 * spread


@given(n=st.integers(1, 9), seed=st.integers(0, 99), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_estimates_are_linear_in_the_operator_with_a_common_key(n, seed, a, b):
    A, B = symmetric(n, seed), symmetric(n, seed + 1)
    groups = {"x": [slice(0, 1)], "all": [slice(0, n)]}
    both, first, second = (block_traces(product(M), A[0], groups, key=key(seed), num=3) for M in (a * A + b * B, A, B))
    for name in groups:
        assert_close(both.samples[name], a * first.samples[name] + b * second.samples[name])
    assert_close(both.total.samples, a * first.total.samples + b * second.total.samples)


@pytest.mark.parametrize("f", SKETCHED)
@given(n=st.integers(1, 9), num=st.integers(3, 12), seed=st.integers(0, 99), c=st.sampled_from([-3.0, 1e-12, 0.5, 1e9]))
def test_sketched_estimates_scale_with_the_operator(f, n, num, seed, c):
    A = symmetric(n, seed)
    one, many = (f(product(M), A[0], key=key(seed), num=num) for M in (A, c * A))
    assert_close(many.samples, c * one.samples, rtol=1e-7, atol=1e-9 * abs(c))


# the definitions, with one projection per vector


def basis_of(Y):
    u, s, _ = torch.linalg.svd(Y, full_matrices=False)
    return u[:, s > 1e-10 * s.amax()] if s.numel() and s.amax() > 0 else u[:, :0]


def xtrace_by_definition(A, k, seed):
    n = len(A)
    omega = torch.stack([normal(fold_in(key(seed), i), A[0]) for i in range(k)], dim=1)
    out = []
    for i in range(k):
        q = basis_of(A @ torch.cat([omega[:, :i], omega[:, i + 1 :]], 1))
        u = omega[:, i] - q @ (q.T @ omega[:, i])
        out.append((q.T @ A @ q).trace() + (n - q.shape[1]) * (u @ A @ u) / (u @ u))
    return torch.stack(out)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num", [2, 3, 4, 5, 12, 21])
def test_xtrace_is_its_definition(name, num):
    A = with_spectrum(SPECTRA[name])
    found = xtrace(product(A), A[0], key=key(4), num=num)
    assert_close(found.samples, xtrace_by_definition(A, num // 2, 4), rtol=1e-9, atol=1e-12)
    assert (found.num_matvecs, found.method, len(found.samples)) == (num // 2 * 2, "xtrace", num // 2)
    assert_close(found.value, found.samples.mean())


@pytest.mark.parametrize("num", [3, 4, 5, 12, 22])
def test_hutchpp_is_its_definition(num):
    A = with_spectrum(SPECTRA["both signs"])
    found = hutchpp_trace(product(A), A[0], key=key(4), num=num)
    third = num // 3
    s, g = (
        torch.stack([rademacher(fold_in(fold_in(key(4), name), i), A[0]) for i in range(m)], dim=1)
        for name, m in (("sketch", third), ("rest", num - 2 * third))
    )
    q = basis_of(A @ s)
    g = g - q @ (q.T @ g)
    assert_close(found.samples, (q.T @ A @ q).trace() + (g * (A @ g)).sum(0), rtol=1e-9, atol=1e-12)
    assert (found.num_matvecs, found.method) == (num, "hutch++")


@pytest.mark.usefixtures("quick_draws")
@pytest.mark.parametrize("f", SKETCHED)
def test_sketched_estimates_are_unbiased(f):
    errors, _ = runs(f, with_spectrum(0.7 ** ORDER[:20]), 7, 300)
    assert abs(errors.mean()) < 3 * errors.std() / 300**0.5


# how good they are


@pytest.mark.usefixtures("quick_draws")
@pytest.mark.parametrize("name", SPECTRA)
def test_xtrace_wins_where_the_spectrum_decays_and_loses_a_root_of_2_where_not(name):
    A, keys = with_spectrum(SPECTRA[name]), 40
    ours, plain = (rms(runs(f, A, 20, keys)[0]) for f in (xtrace, hutchinson_trace))
    assert ours < {"flat": 1.8, "power": 0.15, "exponential": 0.3, "step": 0.01, "both signs": 0.4}[name] * plain


def test_xtrace_has_no_scatter_on_a_multiple_of_the_identity():
    found = xtrace(lambda v: 3 * v, like(P), key=key(0), num=10)
    assert_close(found.samples, torch.full((5,), 3.0 * P, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_draws")
@pytest.mark.parametrize("f", ALL)
def test_error_bars_cover(f):
    errors, stderr = runs(f, with_spectrum(SPECTRA["power"]), 20, 200)
    covered = float((errors.abs() < 2 * stderr).double().mean())
    assert {hutchinson_trace: 0.85, hutchpp_trace: 0.75, xtrace: 0.7}[f] < covered < 0.99
    assert 0.7 < rms(stderr) / rms(errors) < 1.25


# low rank, small sizes, dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 3, 7])
@pytest.mark.parametrize("f", SKETCHED)
def test_low_rank_is_exact(f, rank, dtype):
    values = torch.where(rank > ORDER, (ORDER + 1) * (-1) ** ORDER, 0.0)
    A = with_spectrum(values).to(dtype)
    found = f(product(A), A[0], key=key(2), num=26)
    size = float(values.abs().max())
    assert found.samples.isfinite().all()
    assert_close(found.samples, torch.full_like(found.samples, float(values.sum())),
                 rtol=0, atol=60 * torch.finfo(dtype).eps * size)  # fmt: skip
    if rank <= 1:  # of higher rank rounding in A itself may add directions
        assert found.num_matvecs <= 26 - (13 - rank if f is xtrace else 8 - rank) + 1


@pytest.mark.parametrize("f", SKETCHED)
def test_a_slow_decay_below_rounding_is_no_obstacle(f):
    A = with_spectrum(0.1**ORDER)
    for dtype in (torch.float32, torch.float64):
        found = f(product(A.to(dtype)), like(P, dtype), key=key(0), num=50)
        assert_close(found.samples, A.trace().expand(len(found.samples)), rtol=0, atol=60 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("f", ALL)
@given(n=st.integers(1, 9), num=st.integers(3, 20), seed=st.integers(0, 99))
def test_any_number_of_products_does(f, n, num, seed):
    A, calls = symmetric(n, seed), []
    found = f(lambda v: calls.append(1) or A @ v, A[0], key=key(seed), num=num)
    assert len(calls) == found.num_matvecs <= num
    assert found.value.isfinite()
    if num >= n and f is not hutchinson_trace:
        assert (found.method, found.num_matvecs, float(found.stderr)) == ("exact", n, 0.0)
        assert_close(found.value, A.trace())


@pytest.mark.parametrize("f", ALL)
def test_float32_is_float64_rounded(f):
    A = with_spectrum(SPECTRA["power"])
    wide, narrow = (f(product(A.to(t)), A[0].to(t), key=key(1), num=12) for t in (torch.float64, torch.float32))
    assert_close(narrow.samples, wide.samples, rtol=1e-4, atol=1e-5)
    assert narrow.value.dtype == torch.float64


@pytest.mark.parametrize("f", ALL)
def test_a_matvec_may_return_its_argument_or_its_own_buffer(f):
    buffer, A = like(P), with_spectrum(SPECTRA["power"])
    assert_close(f(lambda v: torch.mv(A, v, out=buffer), like(P), key=key(1), num=12).samples,
                 f(product(A), like(P), key=key(1), num=12).samples)  # fmt: skip
    assert_close(f(lambda v: v, like(P), key=key(1), num=12).samples,
                 f(lambda v: v.clone(), like(P), key=key(1), num=12).samples)  # fmt: skip


# the sketch: rank-deficient products


def projectors(found):
    """The projector of each set of products with one left out."""
    q = found.basis.T
    return [q @ (torch.eye(found.rank).to(q) - torch.outer(s, s)) @ q.T for s in found.left_out.T]


@pytest.mark.parametrize("columns", [
    [[1, 0, 0], [1, 0, 0], [0, 2, 0]],  # the last one alone has its direction
    [[1, 0, 0], [-1, 0, 0], [2, 0, 0]],
    [[0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 2, 0]],
    [[0, 0, 0], [0, 0, 0]],
    [[1, 0, 0], [1, 1e-5, 0], [0, 0, 3]],
    [[0, 0, 0], [0, 0, 3], [1, 0, 1]],
])  # fmt: skip
def test_left_out_projectors_are_those_of_the_other_products(columns):
    Y = torch.tensor(columns, dtype=torch.float64).T
    found = sketch(Products(lambda v: v), lambda i: Y[:, i], Y[:, 0], Y.shape[1])
    assert_close(found.basis @ found.basis.T, torch.eye(found.rank).to(Y))
    assert_close(found.basis.T @ found.coefs, Y)
    for i, ours in enumerate(projectors(found)):
        q = basis_of(torch.cat([Y[:, :i], Y[:, i + 1 :]], 1))
        assert_close(ours, q @ q.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_basis_is_orthonormal_where_the_products_almost_coincide(dtype):
    noise = torch.stack([normal(fold_in(key(0), i), like(500, dtype)) for i in range(12)])
    for size in (1e-2, 1e-4, 1e-6, 1e-9, 0.0):
        rows = noise[:1] + size * noise
        found = sketch(Products(lambda v: v), rows.__getitem__, rows[0], 12)
        assert_close(found.basis @ found.basis.T, torch.eye(found.rank, dtype=dtype),
                     rtol=0, atol=30 * torch.finfo(dtype).eps)  # fmt: skip
        assert (found.basis.T.double() @ found.coefs - rows.T.double()).norm(dim=0).max() <= 2 * found.floor + 1e-300
        assert found.left_out.isfinite().all()
    assert found.rank == 1


# blocks

GROUPS = {"a": [slice(0, 3)], "b": [slice(3, 5), slice(8, 10)], "c": [slice(5, 8)]}


def test_block_traces_sum_to_the_hutchinson_estimate_of_the_same_key():
    A = symmetric(10, 5)
    found = block_traces(product(A), A[0], GROUPS, key=key(2), num=6)
    plain = hutchinson_trace(product(A), A[0], key=key(2), num=6)
    assert torch.equal(found.total.samples, plain.samples)
    assert_close(sum(found.samples.values()), plain.samples)
    assert_close(sum(e.value for e in found.estimates.values()), plain.value)
    assert found.total.num_matvecs == 6


@pytest.mark.usefixtures("all_signs")
def test_block_traces_have_the_mean_variance_and_covariance_of_the_docstring():
    A, parts = symmetric(6, 5), {"a": [slice(0, 2), slice(3, 4)], "b": [slice(2, 3), slice(4, 5)], "c": [slice(5, 6)]}
    found = block_traces(product(A), A[0], parts, key=key(2), num=64)
    at = {name: torch.cat([torch.arange(6)[s] for s in slices]) for name, slices in parts.items()}
    for name, b in at.items():
        inner, x = A[b][:, b], found.samples[name]
        coupling = A[b].square().sum() - inner.square().sum()
        assert_close(x.mean(), inner.trace())
        assert_close(x.var(correction=0), 2 * (inner.square().sum() - inner.diagonal().square().sum()) + coupling)
        assert_close(found[name].stderr, x.std() / 8)
    x, y = (found.samples[name] - found.samples[name].mean() for name in "ab")
    assert_close((x * y).mean(), A[at["a"]][:, at["b"]].square().sum())


# results and requests


def test_one_sample_has_no_standard_error():
    for f, num in ((hutchinson_trace, 1), (hutchpp_trace, 3), (xtrace, 3)):
        found = f(lambda v: v, like(P), key=key(0), num=num)
        assert found.stderr.isnan()
        assert found.value.isfinite()
    assert block_traces(lambda v: v, like(10), GROUPS, key=key(0), num=1)["a"].stderr.isnan()


def test_an_estimate_prints_itself():
    samples = torch.tensor([12.0, 12.6], dtype=torch.float64)
    assert str(TraceEstimate.of_samples(samples, 16, "xtrace")) == "12.3 ± 0.3 (n = 16)"


def test_bad_requests_get_one_clear_line():
    for f, least in ((hutchinson_trace, 1), (hutchpp_trace, 3), (xtrace, 2)):
        raw = inspect.unwrap(f)
        with pytest.raises(ValueError, match=f"`num` must be an integer of at least {least}, got {least - 1}"):
            f(lambda v: v, like(5), key=key(0), num=least - 1)
        with pytest.raises(ValueError, match=r"`like` must be a flat vector .* got shape \(2, 2\)"):
            raw(lambda v: v, torch.zeros(2, 2), key=key(0), num=4)
        with pytest.raises(TypeError, match=r"float32 or float64, got .*bfloat16"):
            raw(lambda v: v, torch.zeros(5, dtype=torch.bfloat16), key=key(0), num=4)
        with pytest.raises(NonFinite, match="product 1 has 5 entries"):
            f(lambda v: v / 0, like(5), key=key(0), num=4)
    for f in (hutchinson_trace, hutchpp_trace):
        with pytest.raises(ValueError, match="`distribution` must be one of 'normal', 'rademacher'"):
            inspect.unwrap(f)(lambda v: v, like(5), key=key(0), num=4, distribution="uniform")
    for slices, message in (
        ([slice(0, 11)], r"`groups\['x'\]` must hold slices of step 1 with 0 <= start < stop <= 10, got slice\(0, 11"),
        ([slice(0, 4, 2)], "step 1"),
        ([slice(3, 3)], "start < stop"),
        ([slice(-2, None)], "0 <= start"),
        ([], "at least one slice"),
        ([slice(4, 6), slice(0, 5)], "coordinate 4 is in two slices"),
    ):
        with pytest.raises(ValueError, match=message):
            block_traces(lambda v: v, like(10), {"x": slices}, key=key(0), num=2)
