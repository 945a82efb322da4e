"""general and identity: the Hessian of the softmax cross-entropy in the logits is diag(p) - p p', whatever the label

Claim: For l(z) = -log softmax(z)[y] with p = softmax(z) and e_y the y-th unit vector: grad l = p - e_y, and Hess l =
    diag(p) - p p', the same for every label y. It is symmetric and v'(diag(p) - p p')v = sum_{i<j} p_i p_j (v_i - v_j)^2
    >= 0, so it is positive semidefinite, and its kernel is the line of the all-ones vector: rank V - 1, with
    p_1 ... p_V the determinant of its first V - 1 rows and columns.
Function: funcscope.core.criterion.causal_lm, funcscope.core.criterion.classification
Size: gradient, Hessian and quadratic form: every number V of classes, as an entry (i, j) sees the other classes only
    through the sum of their exponentials; all of it once more with every logit a symbol, and the determinant, at
    V = 2, 3, 4.
Assumptions: finite logits, so that every p_i > 0; where the softmax rounds to p_i = 0 the kernel is larger.
Not covered: other losses (of squared probabilities the Hessian depends on the label: a negative control); the rounding
    of p.
"""

from fractions import Fraction
from itertools import combinations
from math import log

import pytest
import sympy as sp
import torch

from funcscope.core.criterion import Labels, causal_lm, classification

SIZES = (2, 3, 4)
CRITERIA = pytest.mark.parametrize("criterion", [causal_lm, classification], ids=repr)


def logits(n):
    return sp.symbols(f"z0:{n}", real=True)


def rational(expression, z):
    """The expression as a rational function of the exponentials of the logits, in lowest terms."""
    e = {sp.exp(x): sp.Symbol(f"e_{x}", positive=True) for x in z}
    return sp.cancel(sp.sympify(expression).subs(e))


def loss(z, label, others=0):
    """-log softmax(z)[y] from the logit of the label y; `others` is the sum of the exponentials of further classes."""
    return sp.log(sum(map(sp.exp, z)) + others) - label


def softmax(z, others=0):
    return sp.Matrix([sp.exp(x) / (sum(map(sp.exp, z)) + others) for x in z])


def claimed(p):
    return sp.diag(*p) - p * p.T


def unit(y, n):
    return sp.Matrix([int(i == y) for i in range(n)])


def zero(matrix, z):
    return all(rational(x, z) == 0 for x in matrix)


def test_gradient_and_hessian_for_every_number_of_classes():
    z, others = logits(2), sp.Symbol("R", nonnegative=True)  # two classes i, j; the others never see z_i or z_j
    p = softmax(z, others)
    for y, label in enumerate((*z, sp.Symbol("z_y", real=True))):  # the label is i, j, or one of the others
        chosen = loss(z, label, others)
        grad = sp.Matrix([sp.diff(chosen, x) for x in z])
        assert zero(grad - p + unit(y, 2), z)
        assert zero(sp.hessian(chosen, z) - claimed(p), z)
        assert not zero(sp.hessian(chosen, z) - sp.diag(*p), z)  # negative control


@pytest.mark.parametrize("n", SIZES)
def test_gradient_and_hessian_with_every_logit_a_symbol(n):
    z = logits(n)
    p = softmax(z)
    for y in range(n):
        grad, hessian = sp.Matrix([sp.diff(loss(z, z[y]), x) for x in z]), sp.hessian(loss(z, z[y]), z)
        assert zero(grad - p + unit(y, n), z)
        assert zero(hessian - claimed(p), z)
        assert not zero(grad - p + unit((y + 1) % n, n), z)  # negative controls: the gradient knows the label,
        assert not zero(hessian - sp.diag(*p) + unit(y, n) * p.T, z)
        assert not zero(hessian - sp.diag(*p) - p * p.T, z)
    of_squares = [sp.hessian(sum((a - b) ** 2 for a, b in zip(p, unit(y, n), strict=True)), z) for y in (0, 1)]
    assert not zero(of_squares[0] - of_squares[1], z)  # and so does the Hessian of another loss


@pytest.mark.parametrize("n", SIZES)
def test_quadratic_form_is_a_sum_over_pairs_and_vanishes_for_equal_entries_only(n):
    p = sp.Matrix(sp.symbols(f"p0:{n - 1}", positive=True))
    p = p.col_join(sp.Matrix([1 - sum(p)]))
    v = sp.Matrix(sp.symbols(f"v0:{n}", real=True))
    pairs = sum(p[i] * p[j] * (v[i] - v[j]) ** 2 for i, j in combinations(range(n), 2))
    assert sp.expand((v.T * claimed(p) * v)[0] - pairs) == 0  # 0 where all v_i = v_j, and only there if all p_i > 0
    assert sp.expand(claimed(p) * sp.ones(n, 1)).is_zero_matrix
    assert sp.expand(claimed(p)[:-1, :-1].det() - sp.prod(p)) == 0
    assert sp.expand((v.T * sp.diag(*p) * v)[0] - pairs) != 0  # negative controls
    assert not sp.expand((claimed(p) + p * p.T / 2) * sp.ones(n, 1)).is_zero_matrix


def test_coefficients_of_the_quadratic_form_for_every_number_of_classes():
    p, rest = sp.symbols("p_i p_j", positive=True), sp.Symbol("r", nonnegative=True)  # r: all other probabilities
    whole = {rest: 1 - sum(p)}
    assert sp.expand(claimed(sp.Matrix(p))[0, 0] - (p[0] * (p[1] + rest)).subs(whole)) == 0  # of v_i^2: p_i sum_k p_k
    assert 2 * claimed(sp.Matrix(p))[0, 1] == -2 * p[0] * p[1]  # of v_i v_j, which one pair alone has
    assert sp.expand(claimed(sp.Matrix(p))[0, 0] - (p[0] * rest).subs(whole)) != 0  # negative control


# Bridges: the shipped products, a unit vector at a time, against exact rationals and against the derivative of the loss.


def columns(criterion, out, targets):
    """The matrix of the products of `output_hessian`, out's dimensions in one."""
    basis = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    return torch.stack([criterion.output_hessian(out, targets, v).flatten() for v in basis], dim=1)


@CRITERIA
@pytest.mark.parametrize("counts", [(1, 1), (1, 5, 2), (3, 1, 1, 2), (10**6, 1, 10**3)])
def test_shipped_product_is_the_claim_in_exact_rationals(criterion, counts):
    p = [Fraction(c, sum(counts)) for c in counts]
    exact = [[float(a * ((i == j) - b)) for j, b in enumerate(p)] for i, a in enumerate(p)]
    out = torch.tensor([[log(c) for c in counts]], dtype=torch.float64)
    for y in range(len(p)):
        found = columns(criterion, out, Labels(torch.tensor([y]), torch.ones(1)))
        torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-15)


def ragged():
    """Logits of 3 classes, scored by both criteria: a causal batch with padding and a label -100, and four rows."""
    ids = torch.tensor([[0, 2, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    batch["labels"] = torch.tensor([[0, 2, -100, 1], [1, 1, 0, 0]])
    out = 3 * torch.cos(torch.arange(24.0, dtype=torch.float64) ** 2).view(2, 4, 3)
    weighted = Labels(torch.tensor([2, 0, 1, 1]), torch.tensor([1.0, 0.0, 0.25, 3.0]))
    return {causal_lm: (out, causal_lm.prepare(batch)[1]), classification: (out[0], weighted)}


@CRITERIA
def test_shipped_product_is_the_second_derivative_of_the_weighted_loss(criterion):
    out, targets = ragged()[criterion]

    def total(flat):
        scored, weight = criterion.token_loss(flat.view(out.shape), targets)
        return (scored * weight).sum()

    dense = torch.func.jacfwd(torch.func.grad(total))(out.flatten())
    found = columns(criterion, out, targets)
    torch.testing.assert_close(found, dense, rtol=1e-13, atol=1e-15)
    assert 0 < targets.weight.bool().sum() < targets.weight.numel()
    assert not found.view(*out.shape, -1)[targets.weight == 0].any()  # exactly 0 where nothing is scored
    slope = targets.weight[..., None] * (out.softmax(-1) - torch.nn.functional.one_hot(targets.index, 3))
    torch.testing.assert_close(torch.func.grad(total)(out.flatten()), slope.flatten(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(found.sum(0), torch.zeros_like(found[0]), rtol=0, atol=1e-15)  # the kernel of ones
    assert torch.linalg.eigvalsh(found).min() > -1e-15
    other = Labels((targets.index + 1) % 3, targets.weight)
    assert torch.equal(columns(criterion, out, other), found)
    bare = columns(criterion, out, Labels(targets.index, torch.ones_like(targets.weight)))
    assert (bare - dense).abs().max() > 0.01  # negative control: weights are part of the claim
