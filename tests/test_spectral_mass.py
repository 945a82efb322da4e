"""Shares of a spectrum: brackets that hold the probe's own share, and what is said where they are wide."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from test_eigen import network, prescribed
from test_quadrature import of
from torch.testing import assert_close

from funcscope.core.keys import fold_in, key, normal
from funcscope.linalg.quadrature import spectral_density
from funcscope.linalg.spectral_mass import SpectralMass, bracket


def levels() -> torch.Tensor:
    return torch.tensor([-2.0, 0.0, 1.0, 1.1, 7.0], dtype=torch.float64).repeat_interleave(60)


SPECTRA = {
    "gaps": torch.cat([torch.linspace(-3, -2, 100), torch.linspace(0, 0.5, 100), torch.linspace(4, 5, 100)]),
    "clusters": levels() + 1e-6 * normal(key(1), levels()),
    "copies": levels(),
    "even": torch.linspace(-1, 1, 300),
    "graded": torch.logspace(0.3, -16, 300, dtype=torch.float64),
    "low rank": torch.cat([torch.logspace(0, -5, 100), torch.zeros(200)]),
    "network": network(300),
}


def own_share(d: torch.Tensor, i: int, low: float, high: float) -> float:
    """Oracle: of probe i of `of(d)`, the part of its squares in the eigenvectors between."""
    v = normal(fold_in(key(0), i), d).double()
    return float(v[(d >= low) & (d < high)].square().sum() / (v @ v))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_the_bracket_holds_the_share_of_the_probe(name, dtype, reorthogonalize):
    d = SPECTRA[name].to(dtype)
    ends = float(d.min()) - 0.1, float(d.max()) + 0.1
    borders = [*np.linspace(*ends, 11), -1e-3, -1e-6, 1e-6, 1e-3, *d[::60].tolist(), math.inf]
    outside = 0
    for steps in (5, 20, 60, 310):
        found = of(d, num_probes=1, steps=steps, reorthogonalize=reorthogonalize)
        for low in (-math.inf, -0.5):
            for high in (x for x in borders if x > low):
                mass, truth = found.mass_between(low, high), own_share(d, 0, low, high)
                assert mass.low - 1e-6 <= truth <= mass.high + 1e-6
                assert mass.low - 1e-9 <= float(mass.value) <= mass.high + 1e-9
                outside += abs(float(mass.value) - truth) > 0.01
    assert outside or name in ("copies", "clusters")  # negative control: values alone are off


def test_the_spectrum_of_a_dense_matrix_is_within_bracket_and_error():
    A = prescribed(torch.cat([torch.logspace(0.3, -9, 240), torch.linspace(-0.2, -0.1, 60)]))
    exact = torch.linalg.eigvalsh(A)
    found = spectral_density(lambda v: A @ v, A[0], key=key(2), num_probes=20, steps=30)
    for low, high in ((-1.0, 0.0), (1e-6, 1e9), (1e-3, 1.0), (0.1, 0.2), (-0.15, 0.15)):
        mass, truth = found.mass_between(low, high), float(((exact >= low) & (exact < high)).double().mean())
        error = 3.5 * float(mass.stderr)
        assert mass.low - error <= truth <= mass.high + error


@pytest.mark.parametrize("at", [-0.7, -0.1, 0.35, 0.8])
def test_no_distribution_with_the_same_moments_is_outside(at):
    """Linear programming over all distributions on a grid with the moments of one of them, and at a node sharp."""
    points = np.linspace(-1, 1, 401)
    d = torch.as_tensor(points)
    found = of(d, num_probes=1, steps=4)
    v = normal(fold_in(key(0), 0), d)
    powers = np.polynomial.legendre.legvander(points, 7).T  # degree 2 m - 1
    moments = powers @ (v.square() / (v @ v)).numpy()
    for x in (at, float(found.nodes[0, 1]) + 1e-9):
        below = (points < x).astype(float)
        least, most = (sign * linprog(sign * below, A_eq=powers, b_eq=moments).fun for sign in (1, -1))
        mass = found.mass_between(-math.inf, x)
        assert mass.low - 1e-7 <= least
        assert most <= mass.high + 1e-7
    up_to = found.weights[0, :2].sum()
    assert most == pytest.approx(float(up_to), abs=0.02)  # sharp but for the grid


def test_brackets_of_three_nodes():
    nodes, weights = torch.tensor([[0.0, 1.0, 2.0]]).double(), torch.tensor([[0.2, 0.5, 0.3]]).double()
    never, ends = torch.tensor([False]), {-1.0: (0, 0.2), 0.5: (0, 0.7), 1.5: (0.2, 1), 1.0: (0, 1), 2.5: (0.7, 1)}
    for at, (least, most) in (ends | {-math.inf: (0, 0), math.inf: (1, 1)}).items():
        assert [float(x) for x in bracket(nodes, weights, at, 0.01, never)] == pytest.approx([least, most])
    for at, share in ((-1.0, 0), (0.5, 0.2), (1.5, 0.7), (2.5, 1)):
        assert [float(x) for x in bracket(nodes, weights, at, 0.01, ~never)] == pytest.approx([share] * 2)
    assert [float(x) for x in bracket(nodes, weights, 1.0, 0.01, ~never)] == pytest.approx([0.2, 0.7])


def test_a_space_that_ends_leaves_nothing_open():
    for d, steps in (
        (torch.tensor([-1.0, 2.0, 5.0]), 40),
        (torch.tensor([1.0, 3.0]).repeat(200), 9),
        (torch.ones(1), 1),
    ):
        for reorthogonalize in (True, False):
            found = of(d.double(), num_probes=4, steps=steps, reorthogonalize=reorthogonalize)
            for low, high in ((0.0, 2.5), (-2.0, 1.5), (2.5, 9.0)):
                mass = found.mass_between(low, high)
                assert mass.resolved
                assert_close(mass.high, mass.low, atol=1e-12, rtol=0)
                assert mass.low == pytest.approx(float(mass.value))


@pytest.mark.slow
def test_as_many_steps_as_eigenvalues_are_not_exact_where_nodes_repeat():
    d = SPECTRA["network"]
    for steps in (300, 310):
        with_, without = (of(d, num_probes=2, steps=steps, reorthogonalize=flag) for flag in (True, False))
        masses = [found.mass_between(0.001, 0.02) for found in (with_, without)]
        truth = (own_share(d, 0, 0.001, 0.02) + own_share(d, 1, 0.001, 0.02)) / 2
        assert abs(float(masses[1].value) - truth) > 1e-3  # negative control
        assert all(mass.low <= truth <= mass.high for mass in masses)


def test_a_share_that_few_steps_leave_open_is_not_resolved():
    d = SPECTRA["graded"]
    open_ = of(d, num_probes=4, steps=20).mass_between(1e-6, 1e9)
    assert abs(float(open_.value) - float((d > 1e-6).double().mean())) > 4 * float(open_.stderr)  # what is to be said
    assert not open_.resolved
    assert open_.low < float((d > 1e-6).double().mean()) < open_.high
    assert open_.steps > 20
    assert str(open_) == f"{open_.low:.3g} to {open_.high:.3g}, not resolved: some {open_.steps} steps would be needed"
    assert not open_.frame()["resolved"].any()
    fine = of(d, num_probes=4, steps=60, reorthogonalize=True).mass_between(0.1, 1e9)
    assert fine.resolved
    assert fine.steps == 60
    assert "±" in str(fine)
    assert set(fine.named("share")) == {"share", "share_stderr", "share_low", "share_high"}
    assert isinstance(fine, SpectralMass)


def test_what_may_be_noise_has_its_bounds_where_it_is_open():
    open_ = of(SPECTRA["low rank"], num_probes=4, steps=20).said_negative()
    known = of(torch.tensor([0.0, 0.0, 1.0]).double().repeat(50), num_probes=4, steps=9).said_negative()
    assert " to " in open_.split(";")[1]
    assert known.startswith("0 ± 0 (n = 4); below")
    assert " to " not in known


def drawn(seed, make):
    return make(torch.Generator().manual_seed(seed))


def with_outliers(draw):
    far = -10 * torch.rand(6, generator=draw).double() - 2
    return torch.cat([far, torch.rand(194, generator=draw).double()]).sort().values


def in_a_tail(draw):
    torch.rand(30, generator=draw)
    return (-torch.randn(30, generator=draw).double().abs().exp()).sort().values


@pytest.mark.parametrize(
    ("make", "seed", "steps", "at"),
    [
        (in_a_tail, 52, 40, -1.4684727981785164), (with_outliers, 5, 100, 0.1), (with_outliers, 5, 100, 0.3),
        (with_outliers, 6, 100, 0.3), (with_outliers, 6, 100, 0.7),
    ],
)  # fmt: skip
def test_copies_of_nodes_are_no_ends_of_krylov_spaces(make, seed, steps, at):
    """Outliers converge first, and come again without reorthogonalisation, some to the last bit with a weight of 0."""
    eigenvalues, seen = drawn(seed, make), []

    def matvec(v):
        seen.append(v.clone())
        return eigenvalues * v

    like = torch.zeros_like(eigenvalues)
    density = spectral_density(matvec, like, key=key(seed), num_probes=1, steps=steps)
    weights = seen[0].square() / seen[0].square().sum()
    mass, true = density.mass_between(-math.inf, at), float(weights[eigenvalues < at].sum())
    assert mass.low - 1e-9 <= true <= mass.high + 1e-9
    assert mass.high > mass.low
