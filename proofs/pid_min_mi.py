"""exhaustive and identity: min-MI keeps Williams and Beer's axioms, not the identity axiom; the residual is 0 whatever R is

Claim: With I_1, I_2, I_12 what X, Y and both tell of Z and R any number, U_1 = I_1 - R, U_2 = I_2 - R and
    S = I_12 - I_1 - I_2 + R leave the residual I_12 - (R + U_1 + U_2 + S) = 0: it says nothing of R or of the estimates. For
    R = min(I_1, I_2) one of U_1, U_2 is 0 and S = I_12 - max(I_1, I_2). Over every function Z of two bits, R is symmetric,
    is I_1 where the second source is X again or both (self-redundancy, monotonicity with equality), is at most either
    information, and no part is negative. For Z = (X, Y) with independent uniform bits R = ln 2 while I(X; Y) = 0: the
    identity axiom R = I(X; Y) fails.
Function: funcscope.information.pid.pid_min_mi, funcscope.information.pid.PID
Size: the residual for all numbers; the axioms for all 15 partitions of four inputs, the 16 gates among them, and three
    distributions of the bits, one of them not independent and one with an impossible input; informations as rational
    combinations of logarithms of primes, which are independent, so that equalities are exact.
Assumptions: two sources.
Not covered: three sources and more; other distributions; that min-MI is exact for normal sources (Barrett 2015).
"""

from fractions import Fraction
from itertools import product

import pytest
import sympy as sp

from funcscope.information import pid_min_mi

BITS = list(product((0, 1), repeat=2))
WEIGHTS = {
    "uniform": [Fraction(1, 4)] * 4,
    "dependent": [Fraction(1, 2), Fraction(1, 8), Fraction(1, 8), Fraction(1, 4)],
    "one input never": [Fraction(1, 2), Fraction(1, 3), Fraction(0), Fraction(1, 6)],
}


def partitions():
    """Functions of four inputs, up to the names of values: each value is at most one above those before."""
    return [
        each
        for each in product(range(4), repeat=4)
        if all(v <= max(each[:i], default=-1) + 1 for i, v in enumerate(each))
    ]


def table(values, weights, first, second=None):
    """P(source, z) of a source that is made of the bits."""
    made = {}
    for bits, z, w in zip(BITS, values, weights, strict=True):
        source = first(bits) if second is None else (first(bits), second(bits))
        made[source, z] = made.get((source, z), Fraction(0)) + w
    return {cell: w for cell, w in made.items() if w}


def information(joint):
    """I(source; z): exact, rational multiples of logarithms of primes."""
    total = sp.Integer(0)
    for (s, z), w in joint.items():
        ps = sum(v for (a, _), v in joint.items() if a == s)
        pz = sum(v for (_, b), v in joint.items() if b == z)
        ratio = w / (ps * pz)
        for number, sign in ((ratio.numerator, 1), (ratio.denominator, -1)):
            for prime, power in sp.factorint(number).items():
                total += sp.Rational(w.numerator, w.denominator) * sign * power * sp.log(prime)
    return sp.expand(total)


def smaller(a, b):
    """The minimum; equal ones are equal as they stand."""
    return a if sp.expand(a - b) == 0 or sp.N(a - b, 50) < 0 else b


def not_negative(x):
    return sp.expand(x) == 0 or sp.N(x, 50) > 0


def first(bits):
    return bits[0]


def second(bits):
    return bits[1]


def parts(i_1, i_2, i_12, redundancy=smaller):
    r = redundancy(i_1, i_2)
    return r, i_1 - r, i_2 - r, i_12 - i_1 - i_2 + r


def test_the_residual_is_zero_for_every_redundancy():
    i_1, i_2, i_12, r, u = sp.symbols("i_1 i_2 i_12 r u", real=True)
    four = (r, i_1 - r, i_2 - r, i_12 - i_1 - i_2 + r)
    assert sp.expand(i_12 - sum(four)) == 0
    assert (
        sp.expand(i_12 - (r + u + i_2 - r + four[3])) != 0
    )  # negative control: a unique part that is measured by itself
    for small, large in ((i_1, i_2), (i_2, i_1)):  # whichever is the smaller
        unique_1, unique_2, synergy = (each.subs(r, small) for each in four[1:])
        assert sp.expand(unique_1 * unique_2) == 0
        assert sp.expand(synergy - (i_12 - large)) == 0


def test_the_partitions_hold_all_gates():
    made = partitions()
    assert len(made) == 15

    def canonical(values):
        names = {}
        return tuple(names.setdefault(v, len(names)) for v in values)

    assert {canonical(gate) for gate in product((0, 1), repeat=4)} <= set(made)


@pytest.mark.parametrize("name", WEIGHTS)
def test_axioms_hold_for_every_function_of_two_bits(name):
    weights = WEIGHTS[name]
    for values in partitions():
        i_1, i_2 = (information(table(values, weights, each)) for each in (first, second))
        i_12 = information(table(values, weights, first, second))
        r, u_1, u_2, s = parts(i_1, i_2, i_12)
        assert sp.expand(r - parts(i_2, i_1, i_12)[0]) == 0  # symmetry
        assert sp.expand(smaller(i_1, i_1) - i_1) == 0  # self-redundancy
        assert sp.expand(smaller(i_1, i_12) - i_1) == 0  # monotonicity: a source that holds the other adds no condition
        assert all(map(not_negative, (i_1 - r, i_2 - r, r, u_1, u_2, s)))
        assert sp.expand(u_1 * u_2) == 0
        made = pid_min_mi(*(float(sp.N(x, 30)) for x in (i_1, i_2, i_12)))  # bridge: the shipped function
        exact = [float(sp.N(x, 30)) for x in (r, u_1, u_2, s)]
        assert [made.redundancy, made.unique_x, made.unique_y, made.synergy] == pytest.approx(exact, abs=1e-14)


def test_other_redundancies_break_the_axioms():
    """Negative control: the larger information, and the first, of the gate that is its second bit."""
    weights, values = WEIGHTS["uniform"], (0, 1, 0, 1)
    i_1, i_2 = (information(table(values, weights, each)) for each in (first, second))
    i_12 = information(table(values, weights, first, second))
    assert not all(map(not_negative, parts(i_1, i_2, i_12, lambda a, b: a + b - smaller(a, b))))
    assert sp.expand(parts(i_1, i_2, i_12, lambda a, _: a)[0] - parts(i_2, i_1, i_12, lambda a, _: a)[0]) != 0


def test_the_copy_of_two_bits_breaks_the_identity_axiom():
    weights, values = WEIGHTS["uniform"], (0, 1, 2, 3)
    i_1, i_2 = (information(table(values, weights, each)) for each in (first, second))
    between = information(table([b for _, b in BITS], weights, first))  # I(X; Y)
    assert between == 0
    assert sp.expand(smaller(i_1, i_2) - sp.log(2)) == 0
    made = pid_min_mi(*(float(sp.N(x, 30)) for x in (i_1, i_2, information(table(values, weights, first, second)))))
    assert made.redundancy == pytest.approx(float(sp.log(2)), rel=1e-15)
    same = [Fraction(1, 2), Fraction(0), Fraction(0), Fraction(1, 2)]  # X = Y: there it holds
    i_1 = information(table(values, same, first))
    assert sp.expand(i_1 - information(table([b for _, b in BITS], same, first))) == 0
