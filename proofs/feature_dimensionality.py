"""general and exhaustive: feature dimensionalities add up to the rank at most, and to it just for eigenvectors

Claim: For rows w_i of W and M = W'W let D_i = |w_i|^4 / (w_i' M w_i), 0 for w_i = 0. Then sum_i D_i <= rank W, with equality
    if and only if every row that is not 0 is an eigenvector of M. In an orthonormal basis of eigenvectors of M, with
    eigenvalues l_k > 0 on its range and a_k the coordinates of w_i, D_i = (sum a^2)^2 / sum l a^2, and
    (sum l a^2) (sum a^2 / l) - (sum a^2)^2 = sum_{k<j} a_k^2 a_j^2 (l_k - l_j)^2 / (l_k l_j) >= 0:
    D_i <= w_i' M^+ w_i, equal just where all coordinates that are not 0 have one eigenvalue. The right sides add up to
    tr(M^+ M) = rank W.
Function: funcscope.representation.superposition.feature_dimensionality
Size: the identity pair by pair, every size, and whole for ranks 2, 3, 4 of symbols; the bound and its equality over all 729
    matrices of 3 x 2 with entries -1, 0, 1.
Assumptions: exact arithmetic.
Not covered: which of these features a network uses; rounding.
"""

from fractions import Fraction
from itertools import product

import pytest
import sympy as sp
import torch

from funcscope.representation import feature_dimensionality


def parts(rank):
    return sp.symbols(f"a0:{rank}", real=True), sp.symbols(f"l0:{rank}", positive=True)


def test_a_pair_of_coordinates_adds_what_is_not_negative():
    a, b, k, j = *sp.symbols("a b", real=True), *sp.symbols("k j", positive=True)
    both = a**2 * b**2 * (k / j + j / k) - 2 * a**2 * b**2  # the terms of a pair in the product and in the square
    square = a**2 * b**2 * (k - j) ** 2 / (k * j)
    assert sp.simplify(both - square) == 0
    assert square.is_nonnegative
    assert sp.simplify(a**2 * (k / k) * a**2 - a**4) == 0  # a coordinate with itself: nothing


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_the_gap_is_the_sum_over_pairs(rank):
    a, size = parts(rank)
    square, weighted = sum(x**2 for x in a), sum(s * x**2 for s, x in zip(size, a, strict=True))
    inverse = sum(x**2 / s for s, x in zip(size, a, strict=True))
    pairs = [(k, j) for k in range(rank) for j in range(k + 1, rank)]
    gap = sum(a[k] ** 2 * a[j] ** 2 * (size[k] - size[j]) ** 2 / (size[k] * size[j]) for k, j in pairs)
    assert sp.simplify(weighted * inverse - square**2 - gap) == 0
    assert sp.simplify(weighted * inverse - square**2) != 0  # negative control: not an equality
    assert gap.subs(dict.fromkeys(size, size[0])) == 0  # one eigenvalue


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def exact(rows):
    """Dimensionalities, whether all rows are eigenvectors of M, and the rank, of rows in two dimensions."""
    m = [[dot([r[i] for r in rows], [r[j] for r in rows]) for j in (0, 1)] for i in (0, 1)]
    images = [[dot(m[0], r), dot(m[1], r)] for r in rows]
    each = [
        Fraction(dot(r, r) ** 2, dot(r, image)) if any(r) else Fraction(0)
        for r, image in zip(rows, images, strict=True)
    ]
    eigen = all(r[0] * image[1] == r[1] * image[0] for r, image in zip(rows, images, strict=True))
    rank = 2 if m[0][0] * m[1][1] != m[0][1] ** 2 else int(m[0][0] + m[1][1] > 0)
    return each, eigen, rank


def test_the_bound_and_its_equality_over_all_small_matrices():
    below = 0
    for entries in product((-1, 0, 1), repeat=6):
        each, eigen, rank = exact([entries[i : i + 2] for i in (0, 2, 4)])
        assert sum(each) <= rank
        assert (sum(each) == rank) == eigen
        below += sum(each) < rank
    assert below > 0  # negative control: the bound is not always reached


# Bridge: the shipped function in float64, against exact rationals.


def test_shipped_dimensionalities_are_the_exact_ones():
    for entries in [(1, 0, 0, 1, -1, 1), (1, 1, 1, -1, 0, 0), (1, 0, -1, 0, 0, 1), (0, 0, 0, 0, 0, 0)]:
        rows = [entries[i : i + 2] for i in (0, 2, 4)]
        each, _, _ = exact(rows)
        made = feature_dimensionality(torch.tensor(rows, dtype=torch.float64))
        assert torch.allclose(made, torch.tensor([float(x) for x in each], dtype=torch.float64), rtol=1e-14, atol=0)
