"""exhaustive and identity: two random directions of m dimensions have cos^2 = 1 / m in the mean, and the |cos| that is said

Claim: Let u be uniform on the unit sphere of R^m and v any unit vector. Then E (u.v)^2 = 1 / m and E |u.v| =
    Gamma(m/2) / (sqrt(pi) Gamma((m+1)/2)), which is sqrt(2 / (pi m)) (1 + O(1/m)) and below it for no m. The law of u does
    not change under permutations of coordinates and signs; the mean of the square of a coordinate over these alone is
    |x|^2 / m for every x. The density of t = u.v is proportional to (1 - t^2)^((m-3)/2), that of the angle to
    sin^(m-2): the angle is uniform for m = 2 only.
Function: funcscope.representation.overlap_moments.mean_abs_coordinate
Size: the square for m = 2, 3, 4 over all 2^m m! signed permutations of a vector of symbols; both moments from the density for
    m = 2 to 7.
Assumptions: exact arithmetic; independent directions.
Not covered: means over the dependent pairs of a given matrix; that the limit is reached (checked at m = 10^6 in float64).
"""

from itertools import permutations, product
from math import isclose

import pytest
import sympy as sp

from funcscope.representation import mean_abs_coordinate

THETA = sp.Symbol("theta", positive=True)


def moment(of, m):
    """The mean of a function of the angle between two directions, which is symmetric about a right angle."""
    half = (THETA, 0, sp.pi / 2)
    return sp.integrate(of * sp.sin(THETA) ** (m - 2), half) / sp.integrate(sp.sin(THETA) ** (m - 2), half)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_the_mean_square_over_signed_permutations_is_the_norm_over_m(m):
    x = sp.symbols(f"x0:{m}", real=True)
    images = [s * x[p[0]] for p in permutations(range(m)) for s in (1, -1) for _ in product((1, -1), repeat=m - 1)]
    squares, firsts = sum(y**2 for y in images), sum(images)
    assert sp.expand(squares / len(images) - sum(y**2 for y in x) / m) == 0
    assert firsts == 0
    assert sp.expand(squares / len(images) - sum(y**2 for y in x) / (m - 1)) != 0  # negative control


@pytest.mark.parametrize("m", range(2, 8))
def test_moments_from_the_density_are_the_closed_forms(m):
    assert sp.simplify(moment(sp.cos(THETA) ** 2, m) - sp.Rational(1, m)) == 0
    mean = sp.gamma(sp.Rational(m, 2)) / (sp.sqrt(sp.pi) * sp.gamma(sp.Rational(m + 1, 2)))
    assert sp.simplify(moment(sp.cos(THETA), m) - mean) == 0
    assert mean.evalf() > sp.sqrt(2 / (sp.pi * m)).evalf()
    uniform = sp.integrate(sp.cos(THETA), (THETA, 0, sp.pi / 2)) * 2 / sp.pi  # negative control: uniform angles
    assert (sp.simplify(uniform - mean) == 0) == (m == 2)


# Bridge: the shipped function in float64.


@pytest.mark.parametrize("m", [1, 2, 3, 10, 101])
def test_shipped_moment_is_the_closed_form(m):
    exact = sp.gamma(sp.Rational(m, 2)) / (sp.sqrt(sp.pi) * sp.gamma(sp.Rational(m + 1, 2)))
    assert isclose(mean_abs_coordinate(m), float(exact.evalf(30)), rel_tol=1e-12)
    assert not isclose(mean_abs_coordinate(m), float(sp.sqrt(2 / (sp.pi * m))), rel_tol=1e-3)  # asymptotic only


def test_shipped_moment_tends_to_the_asymptotic_one():
    assert isclose(mean_abs_coordinate(10**6), float(sp.sqrt(2 / (sp.pi * 10**6))), rel_tol=1e-6)
