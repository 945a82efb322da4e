"""Spectral densities: quadratures that are exact, traces within their own error, error bars that cover."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_eigen import network, prescribed
from torch.testing import assert_close

from funcscope.core.keys import fold_in, key, normal, rademacher
from funcscope.linalg.gauss import christoffel
from funcscope.linalg.krylov import Krylov
from funcscope.linalg.matvec import NonFinite, Products
from funcscope.linalg.quadrature import spectral_density


def of(values: torch.Tensor, **how):
    """The density of diag(values)."""
    return spectral_density(lambda v: values * v, values, **{"key": key(0), **how})


def groups(found, size: int):
    """The same as from fewer probes each."""
    rows = zip(found.nodes.split(size), found.weights.split(size), strict=True)
    return [replace(found, nodes=nodes, weights=weights) for nodes, weights in rows]


def spread(seed: int, n: int = 300) -> torch.Tensor:
    return 1 + normal(key(seed), torch.zeros(n, dtype=torch.float64)).square()


@given(
    seed=st.integers(0, 99),
    distinct=st.integers(1, 5),
    reorthogonalize=st.booleans(),
    distribution=st.sampled_from(["normal", "rademacher"]),
)
def test_the_quadrature_of_a_probe_is_exact_when_it_has_a_step_for_every_eigenvalue(
    seed, distinct, reorthogonalize, distribution
):
    levels = torch.arange(1, distinct + 1, dtype=torch.float64)
    d = levels.repeat(7)
    how = {"reorthogonalize": reorthogonalize, "distribution": distribution}
    found = of(d, key=key(seed), steps=9, num_probes=2, **how)
    draw = normal if distribution == "normal" else rademacher
    for i in range(2):
        v = draw(fold_in(key(seed), i), d)
        mass = torch.stack([v[d == level].square().sum() for level in levels]) / (v @ v)  # oracle: the probe itself
        kept = found.weights[i] > 1e-9
        assert_close(found.nodes[i][kept], levels, atol=1e-8, rtol=0)
        assert_close(found.weights[i][kept], mass, atol=1e-8, rtol=0)
    assert found.num_matvecs == 2 * distinct
    assert found.nodes.shape == found.weights.shape == (2, 9)
    assert_close(found.weights.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_moments_up_to_degree_2m_minus_1_are_those_of_the_probe(reorthogonalize):
    d, m = spread(3, 50), 4
    found = of(d, steps=m, num_probes=1, reorthogonalize=reorthogonalize)
    v = normal(fold_in(key(0), 0), d)
    for degree in range(2 * m):
        exact = (v.square() * d**degree).sum() / (v @ v)
        assert_close((found.weights * found.nodes**degree).sum(), exact, rtol=1e-9, atol=0)
    beyond = (v.square() * d ** (2 * m)).sum() / (v @ v)
    assert abs((found.weights * found.nodes ** (2 * m)).sum() / beyond - 1) > 1e-6  # negative control


def test_every_number_agrees_with_the_dense_spectrum_within_its_error():
    A = prescribed(torch.cat([spread(1, 280), -spread(2, 20)]))
    exact = torch.linalg.eigvalsh(A)
    found = spectral_density(lambda v: A @ v, A[0], key=key(4), num_probes=40, steps=30, check=True)
    assert found.num_matvecs == 40 * 30 + 2
    positive, share = exact[exact > 0], exact.abs() / exact.abs().sum()
    for estimate, truth in (
        (found.trace, exact.sum()),
        (found.trace_squared, exact.square().sum()),
        (found.log_determinant(20.0), (exact + 20).log().sum()),
        (found.function(torch.exp), exact.exp().sum()),
        (found.negative_fraction(), torch.tensor(20 / 300)),
        (found.mass_between(0.0, 2.0), (positive < 2).sum() / 300),
        (found.effective_rank, (-(share * share.log()).sum()).exp()),
        (found.participation_ratio, exact.sum() ** 2 / exact.square().sum()),
    ):
        assert estimate.stderr > 0
        assert abs(float(estimate.value) - float(truth)) < 3.5 * float(estimate.stderr)
        assert estimate.num == 40


@pytest.mark.slow
def test_error_bars_cover():
    """One look at 100 groups of 8 probes: nominal 95 % intervals of Student's t hold the exact value."""
    d = spread(7, 120)
    exact = {
        "trace": d.sum(),
        "trace_squared": d.square().sum(),
        "effective_rank": (-(d / d.sum() * (d / d.sum()).log()).sum()).exp(),
        "participation_ratio": d.sum() ** 2 / d.square().sum(),
    }
    quantile, hits = 2.365, dict.fromkeys(exact, 0)  # 7 degrees of freedom
    for found in groups(of(d, num_probes=8 * 100, steps=6, reorthogonalize=False), 8):
        for name, truth in exact.items():
            estimate = getattr(found, name)
            hits[name] += abs(float(estimate.value - truth)) < quantile * float(estimate.stderr)
    for name, hit in hits.items():
        assert 0.87 < hit / 100 < 0.995, name  # sd .022 at .95


@pytest.mark.slow
def test_square_of_the_trace_has_no_bias_where_the_plain_square_has():
    d = torch.cat([torch.ones(60), -torch.ones(60)]).double()  # trace 0, ratio 0
    parts = groups(of(d, num_probes=450, steps=2, reorthogonalize=False), 3)
    values = torch.stack([part.participation_ratio.value for part in parts])
    assert abs(float(values.mean() / (values.std() / 150**0.5))) < 3.5
    plain = torch.stack([part.trace.value for part in parts]).square() / 120
    assert float(plain.mean() / (plain.std() / 150**0.5)) > 5  # negative control


@pytest.mark.slow
def test_a_rank_from_few_probes_has_no_bias_where_the_plain_statistic_has():
    d = torch.cat([torch.tensor([200.0, 100.0, 50.0]), torch.linspace(0, 1, 220)]).double()  # few values have the trace
    share = d / d.sum()
    exact = float((-torch.special.xlogy(share, share).sum()).exp())
    parts = list(groups(of(d, num_probes=8 * 150, steps=16, reorthogonalize=True), 8))
    values = torch.stack([part.effective_rank.value for part in parts])
    assert abs(float((values.mean() - exact) / (values.std() / 150**0.5))) < 3.5
    size = torch.stack([part.function(torch.abs).value for part in parts])
    logs = torch.stack([part.function(lambda x: torch.special.xlogy(x.abs(), x.abs())).value for part in parts])
    plain = size * torch.exp(-logs / size)
    assert float((plain.mean() - exact) / (plain.std() / 150**0.5)) > 4  # negative control


def test_one_step_resolves_the_trace_alone():
    found = of(spread(7, 120), num_probes=8, steps=1)
    assert abs(float(found.trace.value) - float(spread(7, 120).sum())) < 4 * float(found.trace.stderr)
    assert found.trace_squared.value.isnan()
    assert math.isnan(found.trace_squared_interval()[0])
    assert not found.resolution("effective_rank").resolved
    assert not found.negative_resolution().resolved
    assert of(torch.ones(1), num_probes=3, steps=1).resolution("effective_rank").resolved  # one number, one step


@pytest.mark.slow
def test_no_more_steps_are_advised_than_there_are_eigenvalues():
    d = torch.cat([torch.linspace(-1e-3, 1e-3, 29), torch.tensor([100.0])]).double()
    found = of(d, num_probes=400, steps=6)
    assert not found.negative_resolution(1e-9).resolved
    assert found.negative_resolution(1e-9).steps == 30


def test_the_density_integrates_to_one_and_has_its_error():
    d = network(400)
    found = of(d, num_probes=6, steps=30)
    for scale, width in (("linear", None), ("linear", 0.3), ("symlog", 0.05)):
        grid = found.grid(20_000, width=width, scale=scale)
        assert (grid.diff() > 0).all()
        mean, stderr = found.density(grid, width)
        assert_close(float(torch.trapezoid(mean, grid)), 1.0, atol=1e-4, rtol=0)
        assert mean.shape == stderr.shape == grid.shape
        assert (stderr >= 0).all()
    width = 0.3
    at = torch.tensor([1.0, 30.0], dtype=torch.float64)
    bumps = torch.exp(-(((at[:, None, None] - found.nodes) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
    rows = (bumps * found.weights).sum(2)
    mean, stderr = found.density(at, width)
    assert_close(mean, rows.mean(1))
    assert_close(stderr, rows.std(1) / 6**0.5)


def test_the_density_is_that_of_a_semicircle():
    n = 400
    raw = normal(key(0), torch.zeros(n, n, dtype=torch.float64))
    A = (raw + raw.T) / math.sqrt(2 * n)  # Wigner: the semicircle of radius 2
    found = spectral_density(lambda v: A @ v, raw[0], key=key(1), num_probes=10, steps=40)
    at = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    mean, _ = found.density(at, 0.15)
    assert_close(mean, (4 - at.square()).sqrt() / (2 * math.pi), atol=0.03, rtol=0)
    assert abs(float(found.mass_between(-1.0, 1.0).value) - (1 / 3 + math.sqrt(3) / (2 * math.pi))) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_reorthogonalisation_nodes_repeat_and_the_quadrature_stays(dtype):
    d = network(800).to(dtype)
    with_, without = (of(d, num_probes=3, steps=60, reorthogonalize=flag) for flag in (True, False))
    top = [(f.nodes > 41.8).sum(1).tolist() for f in (with_, without)]
    assert top[0] == [1, 1, 1]
    assert min(top[1]) > 1  # ghosts, which share the weight:
    shares = [(f.weights * (f.nodes > 41.8)).sum(1) for f in (with_, without)]
    assert_close(shares[1], shares[0], rtol=1e-2, atol=0)
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    for name in ("trace", "trace_squared"):
        assert_close(getattr(without, name).value, getattr(with_, name).value, rtol=rtol, atol=0)
    assert_close(without.log_determinant(5.0).value, with_.log_determinant(5.0).value, rtol=1e-4, atol=0)
    grid = with_.grid(500, width=1.0)
    assert_close(without.density(grid, 1.0)[0], with_.density(grid, 1.0)[0], rtol=0, atol=1e-3)


def test_noise_of_a_singular_matrix_is_not_negative_curvature():
    X = normal(key(0), torch.zeros(40, 600))
    found = spectral_density(lambda v: X.T @ (X @ v), X[0], key=key(1), num_probes=4, steps=60)
    assert float(found.negative_fraction().value) == 0
    assert float(found.negative_fraction(0.0).value) > 0.1  # what it would be without a tolerance
    assert abs(float(found.mass_between(-1.0, 1.0).value) - 560 / 600) < 0.05


def test_fewer_parameters_than_steps_is_exact_and_padded():
    d = torch.tensor([-1.0, 2.0, 5.0], dtype=torch.float64)
    found = of(d, num_probes=5, steps=40)
    assert found.num_matvecs == 15
    assert found.nodes.shape == (5, 40)
    assert_close(found.nodes[:, :3], d.expand(5, 3))
    assert (found.weights[:, 3:] == 0).all()
    assert torch.isfinite(found.function(lambda x: x.abs().log()).value)  # no node at 0 fills a row
    one = of(torch.tensor([3.0]), num_probes=2)
    assert float(one.trace.value) == pytest.approx(3)
    assert float(one.trace.stderr) == pytest.approx(0, abs=1e-12)
    assert one.num_matvecs == 2


def test_undefined_is_nan():
    zero = of(torch.zeros(5), num_probes=3)
    assert float(zero.trace.value) == 0
    assert math.isnan(zero.effective_rank.value)
    assert math.isnan(zero.participation_ratio.value)
    assert float(zero.negative_fraction().value) == 0
    assert torch.isfinite(zero.density(zero.grid())[0]).all()
    one = of(spread(0), num_probes=1, steps=3)
    assert math.isnan(one.trace.stderr)
    assert math.isnan(one.effective_rank.stderr)
    assert math.isnan(one.participation_ratio.value)
    assert one.density(one.grid(5))[1].isnan().all()
    assert math.isnan(of(spread(0), num_probes=2, steps=3).participation_ratio.stderr)
    d = torch.tensor([-1.0, 2.0, 5.0], dtype=torch.float64)
    assert math.isnan(of(d).log_determinant(1.0).value)
    assert math.isfinite(of(d).log_determinant(1.1).value)


def test_the_identity_and_equal_eigenvalues():
    found = of(torch.full((50,), -2.0, dtype=torch.float64), num_probes=4)
    assert found.num_matvecs == 4
    for estimate, truth in (
        (found.trace, -100),
        (found.effective_rank, 50),
        (found.participation_ratio, 50),
        (found.negative_fraction(), 1),
    ):
        assert float(estimate.value) == pytest.approx(truth)
        assert float(estimate.stderr) == pytest.approx(0, abs=1e-9)


def test_the_lanczos_matrix_is_that_of_the_textbook():
    d, steps = spread(5, 30), 6
    space = Krylov(Products(lambda v: d * v), d, key=key(0))
    v = normal(key(1), d)
    space.begin(v)
    while space.size < steps:
        space.expand()
    K = np.stack([(v * d**j).numpy() for j in range(steps)], 1)
    Q, _ = np.linalg.qr(K)
    T = torch.as_tensor(Q.T @ (d.numpy()[:, None] * Q))
    assert_close(space.T.abs(), T.abs(), atol=1e-7, rtol=0)


def test_the_same_key_gives_the_same_bits_whatever_the_number_of_probes():
    d = network(300).float()
    few, many, other = (of(d, key=key(k), num_probes=n, steps=12) for k, n in ((1, 2), (1, 4), (2, 2)))
    assert torch.equal(few.nodes, many.nodes[:2])
    assert torch.equal(few.weights, many.weights[:2])
    assert not torch.equal(few.nodes, other.nodes)


def test_bad_requests_get_one_clear_line():
    like, raw = torch.zeros(6), inspect.unwrap(spectral_density)
    for how, message in (
        ({"num_probes": 0}, "`num_probes` must be an integer of at least 1, got 0"),
        ({"steps": 0}, "`steps` must be an integer of at least 1, got 0"),
        ({"distribution": "cauchy"}, "`distribution` must be one of 'normal', 'rademacher', got 'cauchy'"),
    ):
        with pytest.raises(ValueError, match=message):
            raw(lambda v: v, like, **{"key": key(0), **how})
    with pytest.raises(TypeError, match="`like` must be float32 or float64"):
        raw(lambda v: v, like.half(), key=key(0))
    with pytest.raises(ValueError, match="not symmetric"):
        raw(lambda v: v.roll(1), like, key=key(0), check=True)
    with pytest.raises(NonFinite, match="product 1"):
        raw(lambda v: v / 0, like, key=key(0), reorthogonalize=False)
    found = of(spread(0), steps=2)
    with pytest.raises(ValueError, match="`low` must be below `high`"):
        found.mass_between(1.0, 1.0)
    with pytest.raises(ValueError, match="`width` must be a finite number above 0"):
        found.density(found.grid(3), 0.0)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_the_negative_share_of_a_probe_is_within_the_bound(reorthogonalize):
    d = torch.cat([torch.linspace(5, 50, 10), 0.1 * normal(key(1), torch.zeros(600)) + 0.05]).double()
    for steps in (10, 30, 60):
        found = of(d, num_probes=1, steps=steps, reorthogonalize=reorthogonalize)
        v = normal(fold_in(key(0), 0), d)
        exact = float(v[d < -found.edge()].square().sum() / (v @ v))  # oracle: the probe itself
        assert abs(float(found.negative_fraction().value) - exact) <= found.negative_resolution().bound + 1e-9


@pytest.mark.slow
def test_a_fraction_that_few_steps_miss_is_not_resolved():
    d = torch.cat([torch.linspace(5, 50, 10), 0.3 * normal(key(1), torch.zeros(600)) + 0.2]).double()
    few, many = of(d, steps=8, reorthogonalize=True), of(d, steps=300, num_probes=3, reorthogonalize=True)
    assert not few.negative_resolution().resolved
    assert few.negative_resolution().steps > 8
    assert "not resolved" in str(few)
    assert abs(float(many.negative_fraction().value) - float((d < 0).double().mean())) < 0.05
    assert many.negative_resolution().resolved


def test_half_the_steps_are_those_of_a_shorter_run():
    d = spread(3)
    half, short = of(d, steps=16, reorthogonalize=True).halved, of(d, steps=8, reorthogonalize=True)
    assert_close(half.nodes, short.nodes)
    assert_close(half.weights, short.weights)


@pytest.mark.slow
@pytest.mark.parametrize("top", [1, 2, 30])
def test_the_interval_of_the_square_covers(top):
    d = torch.full((150,), 0.05, dtype=torch.float64)
    d[:top] = torch.linspace(3, 2, top, dtype=torch.float64)
    hits = 0
    for index in range(200):
        low, high = of(d, key=key(index), steps=4).trace_squared_interval()
        hits += low <= float(d.square().sum()) <= high
    assert 0.9 <= hits / 200 <= 0.99


@pytest.mark.parametrize("at", [-0.4, 0.3, 2.0])
def test_the_christoffel_function_is_that_of_the_orthonormal_polynomials(at):
    nodes = torch.tensor([-1.0, -0.2, 0.1, 0.9, 1.5], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64)
    powers = nodes[:, None] ** torch.arange(5)
    R = torch.linalg.qr(weights.sqrt()[:, None] * powers).R  # powers = polynomials R, orthonormal on the nodes
    p = torch.linalg.solve_triangular(
        R.T, (torch.tensor(at, dtype=torch.float64) ** torch.arange(5))[:, None], upper=False
    )
    assert christoffel(nodes, weights, at, 1e-12) == pytest.approx(min(1.0, 1 / float(p.square().sum())), rel=1e-9)
