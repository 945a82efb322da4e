"""general and identity: rows of a rollout sum to one, causal ones stay causal, and the order of layers matters

Claim: Let A_l have rows that sum to one, 0 <= alpha <= 1 and M_l = alpha A_l + (1 - alpha) I. Then rows of
    R = M_L ... M_1 sum to one; where all A_l are lower triangular, so is R. Entry (q, k) of R is the sum over ways
    q = p_L, ..., p_0 = k of the products of M_l[p_l, p_(l-1)]: later layers stand on the left. M_1 M_2 is the same for causal
    patterns of two tokens and another matrix for three: where the last token looks at the second above, and that at the first
    below, R[3, 1] = alpha^2 and it has 0. Its rows sum to one, too, so that these do not tell.
Function: funcscope.mechanistic.rollout.attention_rollout
Size: rows and triangles for every T and L, by one step (the sums of a product are M 1 = 1); ways and the order for L = 2
    layers of T = 2, 3 tokens, all entries symbols.
Assumptions: exact arithmetic.
Not covered: that information is moved by attention alone; heads that are not alike.
"""

import sympy as sp
import torch

from funcscope.mechanistic import attention_rollout

ALPHA = sp.Symbol("alpha", real=True)


def causal(name, size):
    """Rows that sum to one, the entry on the diagonal being what is left."""
    rows = sp.zeros(size, size)
    for q in range(size):
        for k in range(q):
            rows[q, k] = sp.Symbol(f"{name}{q}{k}", real=True)
        rows[q, q] = 1 - sum(rows[q, k] for k in range(q))
    return rows


def mixed(pattern, alpha=ALPHA):
    return alpha * pattern + (1 - alpha) * sp.eye(pattern.shape[0])


def test_rows_sum_to_one_and_a_product_keeps_that():
    size, a, b = sp.Symbol("T", integer=True, positive=True), sp.Symbol("a"), sp.Symbol("b")
    A, M = sp.MatrixSymbol("A", size, size), sp.MatrixSymbol("M", size, size)
    ones = sp.OneMatrix(size, 1)
    step = (A * (M * ones)).subs(M * ones, ones)  # M has rows that sum to one: the product has A's
    assert step == A * ones
    assert sp.expand(ALPHA * a + (1 - ALPHA) * b).subs({a: 1, b: 1}).simplify() == 1  # of A and I: of the mixture
    assert sp.expand(ALPHA * a).subs(a, 1) != 1  # negative control: without the residual stream's share


def test_entries_are_sums_over_ways_down_and_the_order_matters():
    for size in (2, 3):
        first, second = (mixed(causal(name, size)) for name in "ab")
        rolled = (second * first).applyfunc(sp.expand)
        for q in range(size):
            assert sp.expand(sum(rolled[q, :])) == 1
            for k in range(size):
                ways = sum(second[q, p] * first[p, k] for p in range(size))
                assert sp.expand(rolled[q, k] - ways) == 0
                assert k <= q or rolled[q, k] == 0
        turned = (first * second).applyfunc(sp.expand)
        assert all(sp.expand(sum(turned[q, :])) == 1 for q in range(size))
        apart = (rolled - turned).applyfunc(sp.expand)
        assert apart[0, 0] == 0
        assert (apart == sp.zeros(size, size)) == (size == 2)
    # three tokens: only the last row looks, at the second, above; only the second looks, at the first, below
    values = {sp.Symbol(name, real=True): value for name, value in
              {"a10": 1, "a20": 0, "a21": 0, "b10": 0, "b20": 0, "b21": 1}.items()}  # fmt: skip
    assert sp.expand(apart.subs(values)[2, 0]) == ALPHA**2  # through the second token to the first
    assert turned.subs(values)[2, 0] == 0


# Bridge: the shipped function in float64, against exact rationals.


def test_shipped_rollout_is_the_exact_one():
    size, alpha = 3, sp.Rational(2, 7)
    numbers = {
        sp.Symbol(f"{name}{q}{k}", real=True): sp.Rational(1 + i + q + 2 * k, 11)
        for i, name in enumerate("ab")
        for q in range(size)
        for k in range(q)
    }
    first, second = (causal(name, size).subs(numbers) for name in "ab")
    exact = mixed(second, alpha) * mixed(first, alpha)
    patterns = torch.stack([torch.tensor(m.tolist(), dtype=torch.float64) for m in (first, second)])[:, None, None]
    made = attention_rollout(patterns, alpha=float(alpha))[0]
    assert torch.allclose(made, torch.tensor(exact.tolist(), dtype=torch.float64), rtol=1e-14, atol=1e-15)
    turned = mixed(first, alpha) * mixed(second, alpha)
    assert not torch.allclose(made, torch.tensor(turned.tolist(), dtype=torch.float64), rtol=1e-3)
