"""general: how much two matrices compose under a random rotation, and how far that scatters

Claim: Let U be a uniformly distributed orthogonal D x D matrix, A and B any matrices, P = A'A, Q = BB'. Then
    E ||A U B||^2 = ||A||^2 ||B||^2 / D, and Var ||A U B||^2 = 2 (||P||^2 - (tr P)^2 / D) (||Q||^2 - (tr Q)^2 / D)
    / ((D - 1)(D + 2)). So the root mean square of ||A U B|| / (||A|| ||B||) is 1 / sqrt(D) whatever the two spectra are.
Function: funcscope.mechanistic.circuits.qk_ov_circuits
Size: every D >= 2 and all spectra, by their power sums; once more with every singular value a symbol, at D = 2, by the
    integral over all rotations and reflections.
Assumptions: a column of U is uniform on the sphere, any two columns are exchangeable, and V U W is distributed as U for
    orthogonal V and W, which makes P and Q diagonal. Moments of the sphere are those of a normal vector over those of its
    length, which is independent of its direction.
Not covered: the mean of the root, which is smaller than the root of the mean; null hypotheses other than rotations.
"""

import sympy as sp
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs

D = sp.Symbol("D", positive=True)
LENGTH = {2: D, 4: D * (D + 2)}  # moments of the length of a normal vector
FOURTH, SAME_COLUMN = 3 / LENGTH[4], 1 / LENGTH[4]  # E u_1^4 and E u_1^2 u_2^2 of a column


def test_moments_of_two_columns_for_every_size():
    apart = sp.Symbol("m")  # E U_ij^2 U_kl^2 in other rows and other columns; each row is of length 1
    solved = sp.solve(SAME_COLUMN + (D - 1) * apart - 1 / D, apart)
    assert [sp.simplify(each - (D + 1) / ((D - 1) * D * (D + 2))) for each in solved] == [0]
    assert sp.simplify(FOURTH + (D - 1) * SAME_COLUMN - 1 / D) == 0  # the same in one row


def moments(apart):
    """Mean and variance of sum_ij p_i q_j U_ij^2, by the power sums of p and of q."""
    p1, p2, q1, q2 = sp.symbols("p1 p2 q1 q2", positive=True)
    square = (
        p2 * q2 * FOURTH + (p2 * (q1**2 - q2) + (p1**2 - p2) * q2) * SAME_COLUMN + (p1**2 - p2) * (q1**2 - q2) * apart
    )
    mean = p1 * q1 / D
    claim = 2 * (p2 - p1**2 / D) * (q2 - q1**2 / D) / ((D - 1) * (D + 2))
    return sp.simplify(square - mean**2 - claim)


def test_variance_for_every_size_and_all_spectra():
    assert moments((D + 1) / ((D - 1) * D * (D + 2))) == 0
    assert moments(SAME_COLUMN) != 0  # negative control: entries of one column are not those of two


def test_integral_over_all_rotations_of_the_plane():
    t, (p, r, q, s) = sp.Symbol("t", real=True), sp.symbols("p r q s", positive=True)
    for flip in (1, -1):
        turn = sp.Matrix([[sp.cos(t), -flip * sp.sin(t)], [sp.sin(t), flip * sp.cos(t)]])
        form = sp.expand((sp.diag(p, r) * turn * sp.diag(q, s) * turn.T).trace())
        mean, square = (sp.integrate(sp.expand(form**n), (t, 0, 2 * sp.pi)) / (2 * sp.pi) for n in (1, 2))
        assert sp.simplify(mean - (p + r) * (q + s) / 2) == 0
        claim = 2 * (p**2 + r**2 - (p + r) ** 2 / 2) * (q**2 + s**2 - (q + s) ** 2 / 2) / 4
        assert sp.simplify(square - mean**2 - claim) == 0
        assert sp.simplify(square - mean**2 - 2 * claim) != 0  # negative control


def test_shipped_score_is_the_claim_for_matrices_that_are_dense():
    config = GPT2Config(n_layer=2, n_embd=6, n_head=2, vocab_size=9, n_positions=8)
    net = fs.functional(GPT2LMHeadModel(config).double())
    found = fs.mechanistic.qk_ov_circuits(net, net.params, fold=False)
    later, earlier = (fs.mechanistic.head_weights(net, net.params, i) for i in (1, 0))
    a, b = later.qk()[0], earlier.ov()[1]
    P, Q = a.T @ a, b @ b.T
    size = P.trace() * Q.trace()
    score = (a @ b).square().sum() / size
    var = 2 * (P.square().sum() - P.trace() ** 2 / 6) * (Q.square().sum() - Q.trace() ** 2 / 6) / 40 / size**2
    torch.testing.assert_close(found.k_composition[2, 1], score.sqrt() - 6**-0.5)
    torch.testing.assert_close(found.k_composition_z[2, 1], (score - 1 / 6) / var.sqrt())
