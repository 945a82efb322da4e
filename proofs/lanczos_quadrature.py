"""identity: m steps of Lanczos integrate polynomials exactly up to degree 2m - 1, and no further

Claim: Let T be the tridiagonal matrix of m Lanczos steps on a symmetric A from a unit vector v, with eigenvalues theta_i
    and the first components s_i of its unit eigenvectors. Then v' A^k v = sum_i s_i^2 theta_i^k for every k <= 2m - 1, and
    v' A^(2m) v is larger by (b_1 ... b_m)^2, where b_1, ..., b_m are the norms that the m steps leave.
Function: funcscope.linalg.quadrature.spectral_density
Size: every A and v with a Krylov space of more than m dimensions, m = 1, ..., 4; the recurrence for every spectrum of 3
    eigenvalues, the nodes and weights for m = 2.
Assumptions: exact arithmetic. Not proved here: that a symmetric T has orthonormal eigenvectors.
Not covered: rounding and the loss of orthogonality; the error for functions that are not polynomials.
"""

from fractions import Fraction
from math import prod

import pytest
import sympy as sp
import torch

from funcscope.core.keys import fold_in, key, normal
from funcscope.linalg.quadrature import spectral_density

a, b = sp.symbols("a1:9", real=True), sp.symbols("b1:9", positive=True)


def jacobi(size):
    """A in its Lanczos basis, v first: a_j on the diagonal, b_j beside it."""
    return sp.Matrix(size, size, lambda i, j: a[i] if i == j else b[min(i, j)] if abs(i - j) == 1 else sp.Integer(0))


def corner(T, degree):
    """(T^degree)_11."""
    x = sp.eye(T.rows)[:, 0]
    for _ in range(degree):
        x = (T * x).expand()
    return x[0]


def lanczos(levels, mass, steps, tidy=lambda x: x):
    """a_j and b_j^2 by the monic recurrence p <- (x - a) p - b^2 p_old, without roots: exact in any field."""
    p, old, size, diagonal, squares = [1] * len(mass), [0] * len(mass), None, [], []
    for _ in range(steps):
        norm = tidy(sum(m * x * x for m, x in zip(mass, p, strict=True)))
        if size is not None:
            squares.append(tidy(norm / size))
        size = norm
        diagonal.append(tidy(sum(m * x * x * lam for m, x, lam in zip(mass, p, levels, strict=True)) / norm))
        back = squares[-1] if squares else 0
        p, old = [tidy((lam - diagonal[-1]) * x - back * y) for lam, x, y in zip(levels, p, old, strict=True)], p
    return diagonal, [*squares, sum(m * x * x for m, x in zip(mass, p, strict=True)) / size]


@pytest.mark.parametrize("m", range(1, 5))
@pytest.mark.parametrize("more", [1, 2])
def test_moments_of_every_tridiagonal_matrix_are_those_of_its_corner_up_to_degree_2m_minus_1(m, more):
    whole, cut = jacobi(m + more), jacobi(m)
    for degree in range(2 * m):
        assert sp.expand(corner(whole, degree) - corner(cut, degree)) == 0
    gap = sp.expand(corner(whole, 2 * m) - corner(cut, 2 * m))
    assert sp.expand(gap - prod(b[j] ** 2 for j in range(m))) == 0
    assert gap != 0  # negative control: degree 2m is not exact


def test_the_recurrence_makes_every_matrix_tridiagonal():
    """Of 3 eigenvalues and a vector with squared components in proportion to w: p_0, p_1, p_2 are orthogonal."""
    levels, w = sp.symbols("l1:4", real=True), sp.symbols("w1:4", positive=True)
    (a1, a2), (b1, b2) = lanczos(levels, w, 2, sp.factor)
    rows = [[1] * 3, [sp.factor(lam - a1) for lam in levels]]
    rows.append([sp.factor((lam - a2) * x - b1) for lam, x in zip(levels, rows[1], strict=True)])

    def inner(p, q):
        return sp.factor(sum(m * x * y for m, x, y in zip(w, p, q, strict=True)))

    assert inner(rows[0], rows[1]) == inner(rows[0], rows[2]) == inner(rows[1], rows[2]) == 0
    assert sp.factor(inner(rows[1], rows[1]) / sum(w) - b1) == 0
    assert sp.factor(inner(rows[2], rows[2]) / inner(rows[1], rows[1]) - b2) == 0
    rows[2] = [x + b1 for x in rows[2]]  # negative control: without the term of the vector before
    assert inner(rows[0], rows[2]) != 0


def test_nodes_and_weights_of_every_2_by_2_matrix_are_its_powers():
    T = jacobi(2)
    centre, radius = (a[0] + a[1]) / 2, sp.sqrt((a[0] - a[1]) ** 2 / 4 + b[0] ** 2)
    nodes = [centre + radius, centre - radius]
    vectors = [sp.Matrix([b[0], theta - a[0]]) for theta in nodes]
    for theta, s in zip(nodes, vectors, strict=True):
        assert (T * s - theta * s).expand() == sp.zeros(2, 1)
    weights = [s[0] ** 2 / s.dot(s) for s in vectors]  # squared first components of unit vectors
    for degree in range(4):
        total = sum(w * theta**degree for w, theta in zip(weights, nodes, strict=True))
        assert sp.simplify(total - corner(T, degree)) == 0
    last = sum(s[1] ** 2 / s.dot(s) * theta for s, theta in zip(vectors, nodes, strict=True))
    assert sp.simplify(last - corner(T, 1)) != 0  # negative control: the other component


# Bridge: the moments of the very probe that was drawn, in exact rationals; float64 rounds in the shipped function only.


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_shipped_quadrature_is_exact_to_degree_2m_minus_1_and_off_by_the_product_at_2m(m, reorthogonalize):
    levels = [Fraction(k * k - 9, 4) for k in range(9)]
    values = torch.tensor([float(x) for x in levels], dtype=torch.float64)
    found = spectral_density(
        lambda v: values * v, values, key=key(2), num_probes=1, steps=m, reorthogonalize=reorthogonalize
    )
    drawn = normal(fold_in(key(2), 0), values)
    mass = [Fraction(x) ** 2 for x in drawn.tolist()]
    mass = [x / sum(mass) for x in mass]
    for degree in range(2 * m + 1):
        exact = sum(w * lam**degree for w, lam in zip(mass, levels, strict=True))
        scale = float(sum(w * abs(lam) ** degree for w, lam in zip(mass, levels, strict=True)))
        shipped = float((found.weights * found.nodes**degree).sum())
        gap = float(exact - prod(lanczos(levels, mass, m)[1])) if degree == 2 * m else float(exact)
        assert abs(shipped - gap) < 1e-12 * scale
        assert degree < 2 * m or abs(shipped - float(exact)) > 1e-5 * scale  # negative control
