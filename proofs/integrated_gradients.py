"""identity: attributions add up to the change of the output, and n nodes give them exactly up to degree 2n

Claim: For F of class C^1 on the line from x' to x, sum_i (x_i - x'_i) int_0^1 d_i F(x' + a (x - x')) da = F(x) - F(x'). With
    Gauss-Legendre quadrature of n nodes, exact for polynomials of degree 2n - 1, attributions of polynomials F of degree
    2n are exact, and so is their sum; for the first coordinate's x^(2n+1) from 0 the sum is off by (2n + 1) times the
    error of a^(2n), which is (n!)^4 / ((2n + 1) ((2n)!)^2), so that it is (n!)^4 / ((2n)!)^2 of the output.
Function: funcscope.mechanistic.integrated_gradients.integrated_gradients
Size: completeness and exactness for every polynomial of degree 4 in two variables, all coefficients and points symbols;
    quadrature for n = 1, 2, 3 nodes (roots of the Legendre polynomials, exactly), every monomial up to degree 2n.
Assumptions: exact arithmetic. That the derivative along the line is the sum of the integrands is the chain rule.
Not covered: rounding; F with kinks on the line, for which completeness holds but quadrature is slow.
"""

import math

import pytest
import sympy as sp
import torch

from funcscope.mechanistic.integrated_gradients import integrated_gradients

a, x, y, x0, y0 = sp.symbols("a x y x0 y0")
NODES = pytest.mark.parametrize("n", [1, 2, 3])


def polynomial(degree):
    terms = [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
    return sum(sp.Symbol(f"c{i}{j}") * x**i * y**j for i, j in terms)


def integrand(F, variable, start):
    line = {x: x0 + a * (x - x0), y: y0 + a * (y - y0)}
    return (variable - start) * sp.diff(F, variable).subs(line, simultaneous=True)


def test_attributions_add_up_to_the_change():
    F = polynomial(4)
    total = sum(sp.integrate(sp.expand(integrand(F, *each)), (a, 0, 1)) for each in ((x, x0), (y, y0)))
    change = F - F.subs({x: x0, y: y0}, simultaneous=True)
    assert sp.expand(total - change) == 0
    one = sp.integrate(sp.expand(integrand(F, x, x0)), (a, 0, 1))
    assert sp.expand(one - change) != 0  # negative control: one entry alone does not
    assert (
        sp.expand(sum(integrand(F, *each) for each in ((x, x0), (y, y0))).subs(a, 1) - change) != 0
    )  # nor the end's slope


def rule(n):
    """Nodes on [0, 1] and weights."""
    P = sp.legendre(n, a)
    roots = sp.Poly(P, a).all_roots()
    weights = [2 / ((1 - r**2) * sp.diff(P, a).subs(a, r) ** 2) for r in roots]
    return [((1 + r) / 2, w / 2) for r, w in zip(roots, weights, strict=True)]


@NODES
def test_quadrature_is_exact_to_degree_2n_minus_1_and_has_its_error_at_2n(n):
    nodes = rule(n)
    for degree in range(2 * n + 1):
        error = sp.Rational(1, degree + 1) - sum(w * r**degree for r, w in nodes)
        claim = sp.factorial(n) ** 4 / ((2 * n + 1) * sp.factorial(2 * n) ** 2) if degree == 2 * n else 0
        assert sp.radsimp(sp.simplify(error - claim)) == 0
    assert claim != 0  # negative control: one degree more is not exact


# Bridge: the shipped attributions in float64.


@NODES
def test_shipped_attributions_are_exact_to_degree_2n_and_off_by_the_claim_above(n):
    point, start = torch.tensor([[1.5, -0.5]], dtype=torch.float64), torch.tensor([[0.5, 0.25]], dtype=torch.float64)

    def power(degree):
        return lambda z: (z[:, 0] + 2 * z[:, 1]) ** degree + z[:, 0] ** degree

    found = integrated_gradients(power(2 * n), point, start, num=n, most=n)
    assert float(found.completeness_error) < 1e-12
    many = integrated_gradients(power(2 * n), point, start, num=4 * n)
    torch.testing.assert_close(found.attributions, many.attributions)
    above = integrated_gradients(lambda z: z[:, 0] ** (2 * n + 1), point[:, :1], num=n, most=n)
    share = math.factorial(n) ** 4 / math.factorial(2 * n) ** 2
    assert float(above.completeness_error) == pytest.approx(share * 1.5 ** (2 * n + 1), rel=1e-9)
