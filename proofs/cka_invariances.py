"""general and identity: CKA is unchanged by orthogonal maps, scaling and shifts of either representation, and by no others

Claim: With X -> a X Q + 1 b', Q orthogonal and a > 0, the kernel of centred rows becomes a^2 times what it was. Both forms of
    h(K, L), biased and debiased, are linear in each of the kernels, so that h(K, L) / sqrt(h(K, K) h(L, L)) is what it was.
    A map that stretches one axis changes it.
Function: funcscope.representation.similarity.cka
Size: Q Q' = I for every n and d, by one step; rotations and mirrors of two dimensions, any a and b, with n = 3 rows, all
    symbols; h linear for n = 4, all entries symbols.
Assumptions: exact arithmetic; h(K, K) and h(L, L) above 0.
Not covered: that CKA is 1 for no other maps.
"""

import sympy as sp
import torch

import funcscope as fs
from funcscope.representation import cka


def test_the_kernel_sees_an_orthogonal_map_by_Q_Q_transposed_only():  # noqa: N802
    n, d = sp.symbols("n d", integer=True, positive=True)
    a, X, Q = sp.Symbol("a", positive=True), sp.MatrixSymbol("X", n, d), sp.MatrixSymbol("Q", d, d)
    mapped = (a * X * Q) * (a * X * Q).T
    assert (mapped - a**2 * X * (Q * Q.T) * X.T).doit() == sp.ZeroMatrix(n, n)
    assert (mapped.doit().subs(Q * Q.T, sp.Identity(d)).doit() - a**2 * X * X.T).doit() == sp.ZeroMatrix(n, n)


def test_kernels_of_centred_rows_are_scaled_by_rotations_mirrors_scaling_and_shifts():
    n, a, (c, s) = 3, sp.Symbol("a", positive=True), sp.symbols("c s", real=True)  # of an angle: c^2 + s^2 = 1
    X = sp.Matrix(n, 2, lambda i, j: sp.Symbol(f"x{i}{j}", real=True))
    shift = sp.ones(n, 1) * sp.Matrix([sp.symbols("b0 b1", real=True)])
    H = sp.eye(n) - sp.ones(n, n) / n
    kernel = H * X * X.T * H
    for Q in (sp.Matrix([[c, -s], [s, c]]), sp.Matrix([[c, s], [s, -c]])):
        moved = a * X * Q + shift
        apart = (H * moved * moved.T * H - a**2 * kernel).applyfunc(lambda x: sp.rem(sp.expand(x), c**2 + s**2 - 1, s))
        assert apart.applyfunc(sp.expand) == sp.zeros(n, n)
    stretched = X * sp.diag(2, 1)
    apart = H * stretched * stretched.T * H - a**2 * kernel
    assert apart.applyfunc(sp.expand) != sp.zeros(n, n)  # negative control
    assert sp.solve([sp.expand(each) for each in apart[0, :2]], a) == []


def test_both_forms_of_h_are_linear_in_a_kernel():
    n, a = 4, sp.Symbol("a", positive=True)
    K, L = (sp.Matrix(n, n, lambda i, j, c=c: sp.Symbol(f"{c}{min(i, j)}{max(i, j)}")) for c in "kl")

    def debiased(K, L):
        diagonals = sum(K[i, i] * L[i, i] for i in range(n))
        both = (K * L).trace() + K.trace() * L.trace() / sp.Integer((n - 1) * (n - 2))
        return both - sp.Rational(n, n - 2) * diagonals

    for h in (debiased, lambda K, L: (K * L).trace()):
        assert sp.expand(h(a**2 * K, L) - a**2 * h(K, L)) == 0
        assert sp.simplify(h(a**2 * K, L) ** 2 / h(a**2 * K, a**2 * K) - h(K, L) ** 2 / h(K, K)) == 0
        assert sp.expand(h(a**2 * K, L) - a * h(K, L)) != 0  # negative control


# Bridge: the shipped function in float64.


def test_shipped_cka_has_these_invariances_and_no_others():
    x = fs.normal(fs.key(0), torch.zeros(12, 3, dtype=torch.float64))
    y = x.square() + fs.normal(fs.key(1), x)
    Q = torch.linalg.qr(fs.normal(fs.key(2), torch.zeros(3, 3, dtype=torch.float64))).Q
    for debiased in (False, True):
        at = float(cka(x, y, key=fs.key(3), num=19, debiased=debiased).similarity.value)
        moved = float(cka(0.3 * x @ Q - 5, 2 * y @ Q.T, key=fs.key(3), num=19, debiased=debiased).similarity.value)
        stretched = cka(x * torch.tensor([9.0, 1.0, 1.0]), y, key=fs.key(3), num=19, debiased=debiased).similarity.value
        assert abs(at - moved) < 1e-12
        assert abs(at - float(stretched)) > 1e-2
