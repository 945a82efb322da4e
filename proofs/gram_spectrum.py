"""general and identity and exhaustive: what a Gram matrix of gradients says of their second moment, and few samples add

Claim: Let the rows of G be n gradients, K = G G' and F = G'G/n. Where K u = l u, v = G'u has F v = (l/n) v and
    |v|^2 = l |u|^2, and P - n (n - P) more eigenvalues are 0: K/n and F share the non-zero ones with their multiplicities.
    For deviations from the mean gradient m, of matrix (n-1) C, F = (n-1)/n C + m m': centred is uncentred minus rank one,
    and (I - J) K (I - J), J = 11'/n, is its Gram. For blocks a and b, ||F_ab||^2 = tr(K_a K_b)/n^2, whose mean over
    samples is ||E F_ab||^2 + (E |g_a|^2 |g_b|^2 - ||E F_ab||^2)/n: the coupling of few samples. sum_{i != j} K_a[i,j]
    K_b[i,j] / (n(n-1)) has the mean ||E F_ab||^2; of the covariance, (tr(A B) + 1'A1 1'B1 / ((n-1)(n-2)) - 2 1'AB1 /
    (n-2)) / (n(n-3)) has, A and B the Grams of the blocks with zeros on their diagonals.
Function: funcscope.fisher.spectrum.gram_spectrum
Size: eigenvectors for all n and P; the characteristic polynomials, all entries symbols, for n, P up to 3; the rank one
    term for n = 2, 3, 4 and two parameters, as an entry (j, k) sees the columns j and k alone; the squares for n = 2, 3, 4
    and a column in each block, as they are sums over such pairs; means over all 3^n samples of n = 2, 3 and, centred, all
    2^n and 3^4 of n = 4, 5, in blocks of one and two parameters.
Assumptions: samples are independent and equally distributed; exact arithmetic.
Not covered: the bias of the ratio that the debiased coupling is, and of eigenvalues and ranks; standard errors.
"""

from itertools import product
from math import prod

import pytest
import sympy as sp
import torch
from torch import nn

from funcscope.core.keys import key
from funcscope.core.layout import Layout
from funcscope.curvature import gram_errors
from funcscope.fisher.precomputed import gradient_gram
from funcscope.fisher.spectrum import gram_spectrum

SAMPLES = pytest.mark.parametrize("n", [2, 3, 4])
POPULATION = (((1, 2, -1), sp.Rational(1, 2)), ((-2, 1, 3), sp.Rational(1, 3)), ((3, -1, 1), sp.Rational(1, 6)))
PAIR = (((2, 2, -1), sp.Rational(2, 3)), ((-2, 1, 3), sp.Rational(1, 3)))


def rows(n, P):
    return sp.Matrix(n, P, sp.symbols(f"g0:{n * P}", real=True))


def squares(A):
    return sum(x**2 for x in A)


def centring(n):
    return sp.eye(n) - sp.ones(n) / n


def blocks(G):
    """Rows of the first parameter, and of the others."""
    return G[:, :1], G[:, 1:]


def grams(G):
    return [part * part.T for part in blocks(G)]


def apart(A):
    """Without the diagonal."""
    return A - sp.diag(*A.diagonal())


def expected(statistic, population, n):
    """The mean of statistic(G) over all samples of n gradients."""
    every = product(population, repeat=n)
    return sum(prod(p for _, p in sample) * statistic(sp.Matrix([g for g, _ in sample])) for sample in every)


def second_moment(population):
    return sum((p * sp.Matrix([g]).T * sp.Matrix([g]) for g, p in population), sp.zeros(3))


def covariance(population):
    mean = sum((p * sp.Matrix([g]) for g, p in population), sp.zeros(1, 3))
    return second_moment(population) - mean.T * mean


def off(F):
    """||F_ab||^2."""
    return squares(F[:1, 1:])


def naive(G):
    A, B = grams(G)
    return (A * B).trace() / len(A.diagonal()) ** 2


def debiased(G):
    A, B = map(apart, grams(G))
    n = A.shape[0]
    return (A * B).trace() / (n * (n - 1))


def debiased_centred(G):
    A, B = map(apart, grams(G))
    n = A.shape[0]
    ones = sp.ones(n, 1)
    (both,), (a,), (b,) = ones.T * A * B * ones, ones.T * A * ones, ones.T * B * ones
    return ((A * B).trace() + a * b / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))


def test_eigenvectors_of_the_gram_matrix_are_carried_to_those_of_the_second_moment_at_every_size():
    n, P = sp.symbols("n P", integer=True, positive=True)
    G, u = sp.MatrixSymbol("G", n, P), sp.MatrixSymbol("u", n, 1)
    K, v = G * G.T, G.T * u
    assert ((G.T * G) * v).doit() == (G.T * (K * u)).doit()  # = l G'u where K u = l u
    assert (v.T * v).doit() == (u.T * (K * u)).doit()  # = l |u|^2: not 0 where l is not
    assert ((G.T * G) * v).doit() != v.doit()  # negative control


@pytest.mark.parametrize(("n", "P"), [(1, 2), (2, 1), (2, 3), (3, 2), (3, 3)])
def test_all_other_eigenvalues_are_zero(n, P):
    G, x = rows(n, P), sp.Symbol("x")
    of_gram, of_moment = ((x * sp.eye(len(A.diagonal())) - A).det() for A in (G * G.T, G.T * G))
    assert sp.expand(x**P * of_gram - x**n * of_moment) == 0
    assert sp.expand(x**P * of_gram - x**n * (x * sp.eye(P) - 2 * G.T * G).det()) != 0  # negative control


@SAMPLES
def test_centred_is_uncentred_minus_rank_one(n):
    G = rows(n, 2)
    mean = (sp.ones(1, n) * G).T / n
    deviations = centring(n) * G
    covariance = deviations.T * deviations / (n - 1)
    assert sp.expand(G.T * G / n - sp.Rational(n - 1, n) * covariance - mean * mean.T) == sp.zeros(2)
    assert sp.expand(G.T * G / n - covariance - mean * mean.T) != sp.zeros(2)  # negative control: without (n - 1) / n
    assert sp.expand(deviations * deviations.T - centring(n) * G * G.T * centring(n)) == sp.zeros(n)
    assert sp.expand(deviations * deviations.T - centring(n) * G * G.T) != sp.zeros(n)  # negative control: on one side


@SAMPLES
def test_squares_of_a_block_are_the_trace_of_a_product_of_grams(n):
    G = rows(n, 2)
    A, B = (G[:, i] * G[:, i].T for i in (0, 1))
    assert sp.expand(squares(G[:, 0].T * G[:, 1]) - (A * B).trace()) == 0
    assert sp.expand(squares(G[:, 0].T * G[:, 1]) - (apart(A) * apart(B)).trace()) != 0  # negative control


@pytest.mark.parametrize("n", [2, 3])
def test_mean_over_all_samples_is_the_true_square_once_the_diagonal_is_out(n):
    truth = off(second_moment(POPULATION))
    lengths = sum(p * g[0] ** 2 * (g[1] ** 2 + g[2] ** 2) for g, p in POPULATION)
    assert expected(debiased, POPULATION, n) == truth > 0
    assert expected(naive, POPULATION, n) == truth + (lengths - truth) / n
    assert lengths > truth  # negative control: the naive one is too large


@pytest.mark.parametrize(("population", "n"), [(PAIR, 4), (PAIR, 5), (POPULATION, 4)])
def test_mean_over_all_samples_of_four_and_more_is_the_square_of_the_covariance(population, n):
    truth = off(covariance(population))
    assert expected(debiased_centred, population, n) == truth > 0

    def half_way(G):  # negative controls: centred by the sample's own mean, with and without the diagonal
        return debiased(centring(n) * G)

    assert expected(half_way, population, n) != truth
    assert expected(lambda G: naive(centring(n) * G), population, n) != truth
    assert expected(debiased, population, n) != truth


# Bridge: the shipped spectrum in float64, against exact rationals.


def shipped(G, **options):
    layout = Layout.of(nn.ParameterDict({"a": torch.zeros(1), "b": torch.zeros(2)}))
    given = gradient_gram(torch.tensor(G.tolist(), dtype=torch.float64), layout, by="tensor")
    return gram_spectrum(given, key=key(0), folds=0, num_parameters=[1, 2], **options)


@pytest.mark.parametrize("centered", [False, True])
def test_shipped_spectrum_has_the_moments_and_the_coupling_of_the_exact_matrix(monkeypatch, centered):
    G = sp.Matrix([g for g, _ in (*POPULATION, *PAIR)]) + sp.diag(1, 2, 3).row_insert(3, sp.ones(2, 3))
    n, used = 5, centring(5) * G if centered else G
    F = used.T * used / (n - centered)
    monkeypatch.setattr(gram_errors, "LEAST", -1e9)  # of five samples the squares are not told from 0
    found = shipped(G, centered=centered)
    for power in (1, 2, 3):
        assert float(found.global_eigenvalues[:3].pow(power).sum()) == pytest.approx(float((F**power).trace()))
    own = squares(F[:1, :1]), squares(F[1:, 1:])
    assert float(found.coupling[0, 1]) == pytest.approx(float(off(F) / sp.sqrt(prod(own))))
    assert found.off_block_mass == pytest.approx(float(2 * off(F) / squares(F)))
    free = debiased_centred if centered else debiased

    def of(first, second):
        both = sp.Matrix.hstack(blocks(G)[first], blocks(G)[second])
        A, B = both[:, : blocks(G)[first].shape[1]], both[:, blocks(G)[first].shape[1] :]
        return free_of(free, A, B)

    wanted = of(0, 1) / sp.sqrt(of(0, 0) * of(1, 1)) if of(0, 0) * of(1, 1) > 0 else sp.nan
    assert float(found.coupling_debiased[0, 1]) == pytest.approx(float(wanted), nan_ok=True)
    assert float(found.coupling_debiased[0, 1]) != pytest.approx(float(found.coupling[0, 1]), rel=0.01)


def free_of(free, A, B):
    """The statistic of two blocks that are given: of one and of all other columns, pair by pair of columns."""
    pairs = product(range(A.shape[1]), range(B.shape[1]))
    return sum(free(sp.Matrix.hstack(A[:, i], B[:, j])) for i, j in pairs)
