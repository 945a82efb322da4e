"""exhaustive and identity: mean and variance of Hutchinson's estimates of a trace, of its blocks and of a diagonal

Claim: For symmetric A and z with independent entries, z'Az has mean tr A; its variance is 2 (||A||_F^2 - sum_j A_jj^2)
    for random signs and 2 ||A||_F^2 for standard normal entries: more by 2 sum_j A_jj^2, so that signs are never worse,
    and no worse only for a zero diagonal. For a block b of the coordinates z_b'(Az)_b has mean tr A_bb and, with signs,
    variance 2 (||A_bb||_F^2 - sum_{j in b} A_jj^2) + sum_{c != b} ||A_bc||_F^2; two disjoint blocks have covariance
    ||A_bc||_F^2. The entry z_j (Az)_j has mean A_jj and, with signs, variance sum_{l != j} A_jl^2. The mean of m
    independent samples has the same mean and 1/m of each variance and covariance.
Function: funcscope.linalg.trace.hutchinson_trace, funcscope.linalg.trace.block_traces,
    funcscope.linalg.diagonal.hutchinson_diagonal
Size: every symmetric A of n = 2, 3, 4 coordinates; signs by all 2^n vectors, normal entries by their moments
    E[z^2] = 1, E[z^4] = 3 (Isserlis); every block of n = 2, 3, 4 coordinates and every pair of disjoint blocks.
Assumptions: A symmetric for the variances; the means need no symmetry (shown for n = 2, 3). Independence of samples.
Not covered: the quality of the random numbers; rounding; the distribution beyond two moments, so that an error bar of a
    few samples covers less than the normal law says.
"""

from itertools import combinations, product

import pytest
import sympy as sp
import torch

import funcscope.linalg.diagonal as diagonal
import funcscope.linalg.space as space
import funcscope.linalg.trace as trace
from funcscope.core.keys import key

SIZES = pytest.mark.parametrize("n", [2, 3, 4])
NORMAL_MOMENTS = {0: 1, 1: 0, 2: 1, 3: 0, 4: 3}


def symmetric(n):
    return sp.Matrix(n, n, lambda i, j: sp.Symbol(f"a{min(i, j)}{max(i, j)}", real=True))


def vectors(n):
    """The whole sample space of n random signs."""
    return [sp.Matrix(z) for z in product((-1, 1), repeat=n)]


def over_signs(statistic, n):
    values = [statistic(z) for z in vectors(n)]
    return sp.expand(sum(values) / len(values))


def over_normals(statistic, n):
    """The mean of a polynomial of independent standard normal entries, monomial by monomial."""
    z = sp.symbols(f"z0:{n}")
    terms = sp.Poly(sp.expand(statistic(sp.Matrix(z))), *z).terms()
    return sp.expand(sum(c * sp.prod(NORMAL_MOMENTS[power] for power in powers) for powers, c in terms))


def part(A, block):
    """z -> z_b'(Az)_b."""
    return lambda z: sum(z[i] * A[i, j] * z[j] for i in block for j in range(len(z)))


def covariance(mean, x, y, n):
    return sp.expand(mean(lambda z: sp.expand(x(z) * y(z)), n) - mean(x, n) * mean(y, n))


def squares(A, rows, columns):
    return sum(A[i, j] ** 2 for i in rows for j in columns)


def variance_of_block(A, b):
    n = A.shape[0]
    rest = [j for j in range(n) if j not in b]
    return 2 * (squares(A, b, b) - sum(A[j, j] ** 2 for j in b)) + squares(A, b, rest)


def blocks(n):
    return [b for size in range(1, n + 1) for b in combinations(range(n), size)]


@SIZES
def test_mean_and_variance_for_signs(n):
    A, every = symmetric(n), range(n)
    form = part(A, every)
    claim = 2 * (squares(A, every, every) - sum(A[j, j] ** 2 for j in every))
    found = covariance(over_signs, form, form, n)
    assert sp.expand(over_signs(form, n) - A.trace()) == 0
    assert sp.expand(found - claim) == 0
    assert sp.expand(found - claim / 2) != 0  # negative controls
    assert sp.expand(found - 2 * squares(A, every, every)) != 0


@SIZES
def test_mean_and_variance_for_normal_entries(n):
    A, every = symmetric(n), range(n)
    form = part(A, every)
    found = covariance(over_normals, form, form, n)
    assert sp.expand(over_normals(form, n) - A.trace()) == 0
    assert sp.expand(found - 2 * squares(A, every, every)) == 0
    assert sp.expand(found - squares(A, every, every)) != 0  # negative control


@SIZES
def test_signs_are_never_worse_than_normal_entries(n):
    A = symmetric(n)
    form = part(A, range(n))
    more = covariance(over_normals, form, form, n) - covariance(over_signs, form, form, n)
    assert sp.expand(more - 2 * sum(A[j, j] ** 2 for j in range(n))) == 0
    assert (2 * sum(A[j, j] ** 2 for j in range(n))).is_nonnegative  # real entries
    assert sp.expand(more).subs({A[j, j]: 0 for j in range(n)}) == 0  # equal for a zero diagonal


@SIZES
def test_blocks_of_one_sweep(n):
    A = symmetric(n)
    for b in blocks(n):
        x = part(A, b)
        found = covariance(over_signs, x, x, n)
        assert sp.expand(over_signs(x, n) - sum(A[j, j] for j in b)) == 0
        assert sp.expand(found - variance_of_block(A, b)) == 0
        if len(b) < n:  # negative control: the coupling to the other coordinates
            inner = A.extract(list(b), list(b))
            assert sp.expand(found - variance_of_block(inner, range(len(b)))) != 0


@SIZES
def test_disjoint_blocks_have_the_covariance_of_their_coupling(n):
    A = symmetric(n)
    for b, c in combinations(blocks(n), 2):
        if not set(b) & set(c):
            found = covariance(over_signs, part(A, b), part(A, c), n)
            assert sp.expand(found - squares(A, b, c)) == 0
            assert found != 0  # negative control: they are not uncorrelated


@SIZES
def test_entries_of_the_diagonal(n):
    A = symmetric(n)
    for j in range(n):
        x = part(A, [j])
        found = covariance(over_signs, x, x, n)
        assert sp.expand(found - squares(A, [j], [i for i in range(n) if i != j])) == 0
        assert sp.expand(found - squares(A, [j], range(n))) != 0  # negative control


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("mean", [over_signs, over_normals])
def test_means_need_no_symmetry_and_variances_do(n, mean):
    A = sp.Matrix(n, n, sp.symbols(f"a0:{n * n}", real=True))
    for b in blocks(n):
        assert sp.expand(mean(part(A, b), n) - sum(A[j, j] for j in b)) == 0
    form = part(A, range(n))
    half = (A + A.T) / 2
    assert (
        sp.expand(covariance(mean, form, form, n) - covariance(mean, part(half, range(n)), part(half, range(n)), n))
        == 0
    )
    assert sp.expand(covariance(over_signs, form, form, n) - variance_of_block(A, range(n))) != 0


def test_a_mean_of_independent_samples_has_a_share_of_the_covariance():
    A, n = symmetric(2), 2
    x, y = part(A, [0]), part(A, [1])
    pairs = [(sp.Matrix(z[:n]), sp.Matrix(z[n:])) for z in product((-1, 1), repeat=2 * n)]

    def over_pairs(statistic):
        return sp.expand(sum(statistic(*pair) for pair in pairs) / len(pairs))

    def both(f):
        return lambda z, w: (f(z) + f(w)) / 2

    found = over_pairs(lambda z, w: both(x)(z, w) * both(y)(z, w)) - over_pairs(both(x)) * over_pairs(both(y))
    assert sp.expand(found - covariance(over_signs, x, y, n) / 2) == 0


# Bridges: the shipped functions, given every vector of signs once. Integers make no rounding, so that equality is exact.


@pytest.fixture
def every_vector(monkeypatch):
    def signs(index, like):
        return torch.tensor([float(x) for x in vectors(len(like))[index]]).to(like)

    for module in (trace, diagonal):
        monkeypatch.setattr(module, "fold_in", lambda _, index: index)
        monkeypatch.setattr(module, "rademacher", signs)
    monkeypatch.setattr(space.Whole, "draw", lambda self, index, _: signs(index, self.like))


def integers(n):
    A = sp.Matrix(n, n, lambda i, j: (3 * min(i, j) ** 2 + 5 * max(i, j)) % 7 - 3)
    return A, torch.tensor(A.tolist(), dtype=torch.float64)


@SIZES
@pytest.mark.usefixtures("every_vector")
def test_shipped_traces_have_these_moments(n):
    A, dense = integers(n)
    groups = {str(b): [slice(j, j + 1) for j in b] for b in blocks(n)}
    plain = trace.hutchinson_trace(lambda v: dense @ v, dense[0], key=key(0), num=2**n)
    found = trace.block_traces(lambda v: dense @ v, dense[0], groups, key=key(0), num=2**n)
    assert plain.samples.mean() == int(A.trace())
    assert plain.samples.var(correction=0) == int(variance_of_block(A, range(n)))
    for b in blocks(n):
        samples = found.samples[str(b)]
        assert samples.mean() == int(sum(A[j, j] for j in b))
        assert samples.var(correction=0) == int(variance_of_block(A, b))
        assert found[str(b)].stderr.item() == pytest.approx((int(variance_of_block(A, b)) / (2**n - 1)) ** 0.5)


@SIZES
@pytest.mark.usefixtures("every_vector")
def test_shipped_diagonal_has_these_moments(n):
    A, dense = integers(n)
    found = diagonal.hutchinson_diagonal(lambda v: dense @ v, dense[0], key=key(0), num=2**n)
    variances = [int(squares(A, [j], [i for i in range(n) if i != j])) for j in range(n)]
    torch.testing.assert_close(found.value, dense.diagonal(), rtol=0, atol=1e-13)
    wanted = (torch.tensor(variances, dtype=torch.float64) / (2**n - 1)).sqrt()
    torch.testing.assert_close(found.stderr, wanted, rtol=1e-12, atol=1e-13)
