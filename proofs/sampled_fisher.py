"""exhaustive and identity: T times the squared mean gradient, with labels from the model, is the Fisher's diagonal

Claim: Let gbar be the gradient of the mean loss over T scored tokens with labels y_t ~ p_t from the model. Then
    E[T gbar^2] = (1/T) sum_t E[s_t^2], the diagonal of the token Fisher. Labels drawn from any other q_t add
    (2/T) sum_{t<u} m_t m_u, m_t = J_t'(q_t - p_t), to (1/T) sum_t E[s_t^2] under q_t: it may be 0, or T times too large
    where tokens are equal. gbar^2 / T is too small by T^2. Batches combine as sum_b T_b^2 gbar_b^2 / sum_b T_b. For the
    mean with weights w_t the estimate is (sum_t w_t^{1/2} s_t)^2 / sum_t w_t.
Function: funcscope.curvature.fisher.fisher_diagonal_mc
Size: all V^T labels for V = 2, 3 classes and T = 1 to 4 tokens of unlike rational p and J, with two parameters; batches
    of (1, 3), (2, 2) and (1, 1, 2) tokens. Tokens meet two at a time (the cross term of a pair is m_t m_u, with p, q
    and J symbols), so that no step depends on T.
Assumptions: fixed inputs; independent labels, each drawn from the distribution that it is scored by (labels of another
    position: a negative control).
Not covered: the variance of the estimate; dropout; sequences that the model itself continues.
"""

from dataclasses import replace
from itertools import accumulate, product
from math import prod

import pytest
import sympy as sp
import torch
from torch import nn
from torch.func import grad, jacrev

from funcscope.core.criterion import causal_lm
from funcscope.core.keys import key
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.curvature.fisher import exact_fisher, fisher_diagonal_mc

COUNTS = {2: ((1, 1), (1, 3), (2, 1), (4, 1)), 3: ((1, 2, 3), (1, 1, 2), (2, 2, 1), (1, 4, 1))}
SLOPES = (((1, -2), (3, 1), (0, 2)), ((2, 1), (-1, 1), (1, 3)), ((0, 1), (1, 1), (2, -1)), ((3, 0), (1, -2), (1, 1)))
CLASSES = pytest.mark.parametrize("n", [2, 3])


def tokens(n, T):
    """(p, J) of T tokens with n classes and two parameters."""
    return [(sp.Matrix(c) / sum(c), sp.Matrix(J[:n])) for c, J in zip(COUNTS[n][:T], SLOPES, strict=False)]


def total(matrices):
    first, *others = matrices
    return sum(others, first)


def score(y, p, J):
    """grad log p_y."""
    return J.T * (sp.eye(len(p)).col(y) - p)


def scores(sample, labels):
    return [score(y, *token) for y, token in zip(labels, sample, strict=True)]


def square(x):
    return x.multiply_elementwise(x)


def mean_square(sample, labels):
    """gbar^2 where these are the labels."""
    return square(total(scores(sample, labels)) / len(sample))


def expected(statistic, sample, drawn=None):
    """The mean of statistic(sample, labels) over all labels, y_t ~ drawn_t: the model's p_t where none are given."""
    drawn = drawn or [p for p, _ in sample]
    every = product(*(range(len(q)) for q in drawn))
    return total(prod(q[y] for q, y in zip(drawn, ys, strict=True)) * statistic(sample, ys) for ys in every)


def diagonal(sample):
    """(1/T) sum_t E[s_t^2], the diagonal of the token Fisher, token by token."""
    return total(p[y] * square(score(y, p, J)) for p, J in sample for y in range(len(p))) / len(sample)


@CLASSES
@pytest.mark.parametrize("T", [1, 2, 3, 4])
def test_mean_over_all_labels_of_the_model_is_the_diagonal(n, T):
    mean, wanted = expected(mean_square, tokens(n, T)), diagonal(tokens(n, T))
    assert T * mean == wanted
    assert (mean / T == wanted) == (T == 1)  # negative control: gbar^2 / T is too small by T^2
    assert min(wanted) > 0


@CLASSES
def test_cross_term_of_two_tokens_is_the_product_of_their_biases(n):
    def chances(name):
        p = sp.symbols(f"{name}_0:{n - 1}", positive=True)
        return sp.Matrix([*p, 1 - sum(p)])

    pair = [(chances(f"p{t}"), sp.Matrix(sp.symbols(f"J{t}_0:{n}"))) for t in (0, 1)]
    drawn = [chances("q0"), chances("q1")]
    biases = [J.T * (q - p) for q, (p, J) in zip(drawn, pair, strict=True)]
    free, model = (sp.expand(expected(lambda *x: prod(scores(*x)), pair, q)[0]) for q in (drawn, None))
    assert model == 0 != free  # negative control: of other labels
    assert free == sp.expand(prod(biases)[0])


@pytest.mark.parametrize("T", [2, 3, 4])
def test_labels_of_the_data_make_it_0_or_too_large_by_the_number_of_tokens(T):
    even, tilted = ((sp.Matrix([a, 4 - a]) / 4, sp.Matrix([[1, 0], [0, 1]])) for a in (2, 1))
    assert square(score(0, *even)) == square(score(1, *even)) == diagonal([even])  # the empirical Fisher is the Fisher
    assert T * mean_square([even] * T, [0] * T) == T * diagonal([even])
    assert mean_square([even] * 2 * T, [0, 1] * T).is_zero_matrix  # a stationary point
    data = [sp.Matrix([3, 1]) / 4] * T  # where the model is wrong the factor is (3 + 4 T) / 3: 5 for T = 3
    assert T * expected(mean_square, [tilted] * T, data) == sp.Rational(3 + 4 * T, 3) * diagonal([tilted])


@CLASSES
@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 2)])
def test_batches_combine_by_the_squares_of_their_tokens(n, sizes):
    parts = [slice(stop - T, stop) for T, stop in zip(sizes, accumulate(sizes), strict=True)]

    def combined(power):
        def statistic(sample, labels):
            return total(T**power * mean_square(sample[b], labels[b]) for T, b in zip(sizes, parts, strict=True))

        return expected(statistic, tokens(n, 4))

    wanted = diagonal(tokens(n, 4))
    assert combined(2) / 4 == wanted
    assert (combined(1) / len(sizes) == wanted) == (len(set(sizes)) == 1)  # negative controls: a plain mean,
    assert combined(0) / 4 != wanted  # squares of the batches' means over the number of tokens


@CLASSES
def test_unequal_weights_enter_by_their_roots_and_labels_of_another_position_are_biased(n):
    sample, w = tokens(n, 3), (1, 0, 4)
    wanted = total(a * diagonal([x]) for a, x in zip(w, sample, strict=True)) / sum(w)
    for f, right in ((sp.sqrt, True), (sp.Integer, False)):  # negative control: the gradient of the weighted mean

        def weighted(sample, labels, f=f):
            return square(total(f(a) * s for a, s in zip(w, scores(sample, labels), strict=True))) / sum(w)

        assert (expected(weighted, sample) == wanted) == right
    turned = [p for p, _ in sample[1:] + sample[:1]]
    assert 3 * expected(mean_square, sample, turned) != diagonal(sample)  # negative control


# Bridge: the shipped estimate by a z-test on its own standard errors, against the sum over all labels.


@pytest.mark.slow
def test_shipped_estimate_is_the_diagonal_up_to_its_own_standard_errors():
    net = functional(nn.Sequential(nn.Embedding(3, 1), nn.Tanh(), nn.Linear(1, 3, bias=False)).double())
    loss = objective(net, [torch.tensor([[0, 2, 1, 1], [1, 1, 0, 2]]), torch.tensor([[2, 2, 0]])], causal_lm)
    weighted = [(ids, labels._replace(weight=labels.weight * (1 + ids))) for ids, labels in loss.batches]
    loss, theta = replace(loss, batches=tuple(weighted)), torch.tensor([-2, 0.5, 1, -1.5, 0.5, 2]).double()
    inputs = torch.cat([ids[:, :-1].flatten() for ids, _ in loss.batches])  # scored tokens, one after the other

    def logits(x):
        return net.apply(loss.params(x), inputs)

    p, J, w = logits(theta).softmax(1)[..., None], jacrev(logits)(theta), 1 + inputs.double()
    exact = w @ (p * (J - (p * J).sum(1, keepdim=True)) ** 2).sum(1) / w.sum()
    dense = torch.stack([exact_fisher(loss, theta)(column) for column in torch.eye(6).double()])
    torch.testing.assert_close(dense.diagonal(), exact, rtol=1e-12, atol=1e-15)
    found = fisher_diagonal_mc(loss, theta, key=key(0), num=400)
    assert found.num == 400
    assert ((found.value - exact).abs() < 4 * found.stderr).all()
    assert (found.stderr < 0.1 * exact).all()  # negative controls
    assert all(
        ((a * found.value - exact).abs() > 4 * found.stderr).all() for a in (len(w), 1 / len(w), 1 / len(w) ** 2)
    )
    assert ((w.sum() * grad(loss)(theta) ** 2 - exact).abs() > 4 * found.stderr).any()  # labels of the data
