"""Partial information decompositions. Oracles: published values, closed forms, a grid, scipy's SLSQP, the library dit."""

import math
from itertools import product

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcscope.core.keys import fold_in, key, normal, uniform
from funcscope.information import pid, pid_broja, pid_min_mi, pid_williams_beer, probe_pid
from funcscope.information.broja import least_informative
from funcscope.information.pid import ATOMS, informations

LN2 = math.log(2)
PARTS = ("redundancy", "unique_x", "unique_y", "synergy")
GATES = {
    "xor": lambda a, b: a ^ b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "x": lambda a, b: a,
    "y": lambda a, b: b,
    "copy": lambda a, b: 2 * a + b,
    "sum": lambda a, b: a + b,
}
AND = 0.311278  # 3/4 log2 4/3, of dit's documentation

# bits: redundancy, unique x, unique y, synergy; dit's documentation and Griffith, Koch (2014)
BITS = {
    ("xor", "williams_beer"): (0, 0, 0, 1),
    ("xor", "broja"): (0, 0, 0, 1),
    ("and", "williams_beer"): (AND, 0, 0, 0.5),
    ("and", "broja"): (AND, 0, 0, 0.5),
    ("or", "broja"): (AND, 0, 0, 0.5),
    ("x", "williams_beer"): (0, 1, 0, 0),
    ("x", "broja"): (0, 1, 0, 0),
    ("y", "broja"): (0, 0, 1, 0),
    ("copy", "williams_beer"): (1, 0, 0, 1),
    ("copy", "broja"): (0, 1, 1, 0),
    ("sum", "williams_beer"): (0.5, 0, 0, 1),
    ("sum", "broja"): (0.5, 0, 0, 1),
}


def gate(name, weights=(0.25, 0.25, 0.25, 0.25)):
    """p[x, y, z] of two bits and what a gate makes of them."""
    p = torch.zeros(2, 2, 4, dtype=torch.float64)
    for (a, b), w in zip(product((0, 1), repeat=2), weights, strict=True):
        p[a, b, GATES[name](a, b)] += w
    return p


def redundant():
    """x = y = z."""
    p = torch.zeros(2, 2, 2, dtype=torch.float64)
    p[0, 0, 0] = p[1, 1, 1] = 0.5
    return p


def random_table(seed, shape=(2, 3, 2), sparse=0.0):
    u = uniform(key(seed), torch.zeros(2, *shape, dtype=torch.float64))
    p = -(u[0] + 1e-9).log() * (u[1] >= sparse)
    return p / p.sum() if float(p.sum()) > 0 else torch.full_like(p, 1 / p.numel())


def by(method, p):
    if method == "min_mi":
        return pid_min_mi(*informations(p.numpy()))
    return {"williams_beer": pid_williams_beer, "broja": pid_broja}[method](p)


@pytest.mark.parametrize(("name", "method"), BITS)
def test_gates_have_their_published_parts(name, method):
    made = by(method, gate(name))
    assert [getattr(made, part) / LN2 for part in PARTS] == pytest.approx(BITS[name, method], abs=1e-6)
    assert made.total == pytest.approx(sum(getattr(made, part) for part in PARTS), abs=1e-12)


@pytest.mark.parametrize("method", ["min_mi", "williams_beer", "broja"])
def test_two_copies_of_the_target_are_redundant(method):
    made = by(method, redundant())
    assert [getattr(made, part) / LN2 for part in PARTS] == pytest.approx((1, 0, 0, 0), abs=1e-8)


@pytest.mark.slow
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.4]), st.sampled_from([(2, 2, 2), (3, 2, 4), (1, 3, 2)]))
def test_parts_are_not_negative_and_ordered_by_method(seed, sparse, shape):
    """Redundancy between 0 and the smaller information; that of BROJA is the least of those that hang on pairs alone."""
    p = random_table(seed, shape, sparse)
    made = {method: by(method, p) for method in ("min_mi", "williams_beer", "broja")}
    for method, each in made.items():
        assert all(getattr(each, part) > -2e-6 for part in PARTS), method
        assert each.redundancy <= min(each.information_x, each.information_y) + 1e-9
        turned = by(method, p.permute(1, 0, 2))
        assert turned.unique_x == pytest.approx(each.unique_y, abs=2e-6)
        assert turned.synergy == pytest.approx(each.synergy, abs=2e-6)
    assert made["broja"].redundancy <= made["williams_beer"].redundancy + 1e-8
    assert made["williams_beer"].redundancy <= made["min_mi"].redundancy + 1e-9


def conditional_entropy(q):
    return float(scipy.special.entr(q).sum() - scipy.special.entr(q.sum(2)).sum())


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.3]))
def test_coupling_is_the_best_of_a_grid(seed, sparse):
    """Two bits: a coupling is one number for each z, and the conditional entropy is concave in them."""
    p = random_table(seed, (2, 2, 2), sparse).numpy()
    found = least_informative(p)
    for axis in (0, 1):
        np.testing.assert_allclose(found.q.sum(axis), p.sum(axis), atol=1e-12)
    assert (found.q >= 0).all()
    best, at = conditional_entropy(found.q), found.q
    direction = np.array([[1.0, -1.0], [-1.0, 1.0]])
    for z, sign, size in product((0, 1), (-1, 1), (1e-3, 1e-2, 0.05, 0.2)):
        moved = at.copy()
        moved[:, :, z] += sign * size * direction
        if (moved >= 0).all():
            assert conditional_entropy(moved) <= best + found.gap + 1e-12
    grid = np.linspace(0, 1, 201)
    low, high = (bounds(p, z) for z in (0, 1))
    for i, j in product(range(0, 201, 20), repeat=2):
        moved = p.copy()
        for z, (a, b), t in ((0, low, grid[i]), (1, high, grid[j])):
            moved[:, :, z] += (a + t * (b - a)) * direction
        assert conditional_entropy(np.maximum(moved, 0)) <= best + found.gap + 1e-9


def bounds(p, z):
    """How far a slice can go along (+ -, - +)."""
    return -min(p[0, 0, z], p[1, 1, z]), min(p[0, 1, z], p[1, 0, z])


@pytest.mark.parametrize("seed", range(4))
def test_coupling_is_that_of_another_solver_and_the_gap_bounds_it(seed):
    p = random_table(seed, (3, 3, 2)).numpy()
    found = least_informative(p)
    margins = np.array([(np.indices(p.shape)[a] == i) & (np.indices(p.shape)[2] == k) for a in (0, 1)
                        for i in range(3) for k in range(2)]).reshape(12, -1).astype(float)  # fmt: skip
    start = p.sum(1)[:, None] * p.sum(0)[None] / p.sum((0, 1))

    def negative(q):
        q = np.maximum(q, 0).reshape(p.shape)
        return -conditional_entropy(q)

    kept = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # the last two follow
    other = scipy.optimize.minimize(
        negative, start.ravel(), method="SLSQP", bounds=[(1e-12, 1)] * p.size, options={"ftol": 1e-14, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda q: (margins @ q - margins @ p.ravel())[kept]},
    )  # fmt: skip
    assert conditional_entropy(found.q) == pytest.approx(-other.fun, abs=1e-6)
    assert found.gap < 1e-6
    rough = least_informative(p, most=2)
    assert conditional_entropy(found.q) - conditional_entropy(rough.q) <= rough.gap + 1e-9
    assert rough.gap > found.gap


def test_documented_residual_tests_nothing():
    """Mistake 23: |I12 - (R + U1 + U2 + S)| / I12 < 0.1 holds for numbers that are no informations at all."""
    for redundancy, i_x, i_y, i_xy in ((0.2, 0.3, 0.5, 0.6), (7.0, -1.0, 3.0, 0.1), (-5.0, 1e3, 2.0, 1.0)):
        u1, u2, s = i_x - redundancy, i_y - redundancy, i_xy - i_x - i_y + redundancy
        assert abs(i_xy - (redundancy + u1 + u2 + s)) < 1e-9
    made = pid_min_mi(0.3, 0.5, 0.4)
    assert made.synergy == pytest.approx(-0.1)
    assert "under-fits" in " ".join(made.notes)
    assert "redundancy is below 0" in " ".join(pid_min_mi(-0.1, 0.5, 0.6).notes)
    assert not any("residual" in name for name in made.asdict())
    assert "under-fits" not in " ".join(pid_min_mi(0.3, 0.5, 0.6).notes)


def samples(num, seed=0):
    """Rows of two bits in groups of four."""
    bits = (uniform(key(seed), torch.zeros(2, num)) < 0.5).long()
    return bits[0], bits[1], torch.arange(num) // 4


def test_sources_of_other_rows_have_nothing_to_decompose():
    """Mistake 23: token t of one batch beside token t of another: the second source tells nothing of the first's labels."""
    x, y, groups = samples(400)
    z = x ^ y
    paired = pid(x, y, z, key=key(1), groups=groups, method="min_mi", num=20)
    unrelated = pid(x, y.roll(37), z, key=key(1), groups=groups, method="min_mi", num=20)
    assert paired.total > 0.68
    assert unrelated.total < 0.02
    with pytest.raises(ValueError, match="all are of the same rows"):
        pid(x, y[:-1], z, key=key(1))


def test_parts_have_no_cut_off_of_their_own():
    """Mistake 23: "redundancy > 0.4" in nats is beyond 1 bit's reach for rare labels and always there for many."""
    bit, many = torch.arange(400) % 20 == 0, torch.arange(400) % 20
    of_bit = pid(bit.long(), bit.long(), bit.long(), key=key(0), method="min_mi", num=2)
    of_many = pid(many, many, many, key=key(0), method="min_mi", num=2)
    assert of_bit.redundancy == of_bit.total < 0.4 < of_many.redundancy  # both are wholly redundant


@pytest.mark.parametrize("method", ["min_mi", "williams_beer", "broja"])
def test_samples_have_the_parts_of_their_table(method):
    x, y, groups = samples(160)
    z = x & y
    made = pid(x + 3, 7 * y, 5 - z, key=key(0), groups=groups, method=method, num=10)
    table = torch.zeros(2, 2, 2, dtype=torch.float64)
    for a, b, c in zip(x, y, z, strict=True):
        table[a, b, 1 - c] += 1 / 160
    exact = by(method, table)
    for name in ATOMS:
        assert getattr(made, name) == pytest.approx(getattr(exact, name), abs=1e-8)
    assert (made.num_groups, made.num, made.terms) == (40, 10, "none")
    again = pid(x + 3, 7 * y, 5 - z, key=key(0), groups=groups, method=method, num=10)
    assert again == made


def test_errors_are_the_spread_over_groups_of_fresh_samples():
    """Rows of a group are copies: an error over rows would be half of it."""
    made, parts = [], []
    for seed in range(30):
        x, y, _ = samples(60, seed)
        noise = uniform(fold_in(key(seed), 1), torch.zeros(60)) < 0.2
        columns = [each.repeat_interleave(4) for each in (x, y, (x & y) ^ noise)]
        made.append(pid(*columns, key=key(seed), groups=torch.arange(240) // 4, method="min_mi", num=40))
        parts.append(made[-1].total)
    spread = float(torch.tensor(parts).std())
    stderr = sum(each.total_stderr for each in made) / 30
    assert stderr / spread == pytest.approx(1, abs=0.4)  # three errors of a spread of 30


def test_miller_and_madow_take_off_the_bias_of_independent_samples():
    plain, corrected = [], []
    for seed in range(40):
        u = uniform(key(seed), torch.zeros(3, 200))
        x, y, z = ((each * 3).long() for each in u)
        for values, correction in ((plain, "none"), (corrected, "miller_madow")):
            values.append(pid(x, y, z, key=key(0), method="min_mi", correction=correction, num=2).total)
    bias, stderr = sum(plain) / 40, float(torch.tensor(corrected).std()) / 40**0.5
    assert bias == pytest.approx((27 - 9 - 3 + 1) / 400, rel=0.25)
    assert abs(sum(corrected) / 40) < 4 * stderr + 0.1 * bias
    pair, cells = (3 * x + y).unique(), (9 * x + 3 * y + z).unique()
    assert plain[-1] - corrected[-1] == pytest.approx((len(cells) - len(pair) - 3 + 1) / 400, rel=1e-9)
    with pytest.raises(ValueError, match="no sums of entropies"):
        pid(x, y, z, key=key(0), correction="miller_madow")


def test_probes_find_what_is_unique_and_what_is_shared():
    base = normal(key(0), torch.zeros(600, 2, dtype=torch.float64))
    labels = (base[:, 0] > 0).long() + 2 * (base[:, 1] > 0).long()
    groups = torch.arange(600) // 6
    alone = probe_pid(base[:, :1], base[:, 1:], labels, key=key(1), groups=groups, num=30)
    assert 1.0 < alone.total < 2 * LN2
    assert alone.synergy > 0.5
    shared = probe_pid(base, base, labels, key=key(1), groups=groups, num=30)
    assert shared.redundancy == pytest.approx(alone.total, abs=0.05)
    assert abs(shared.synergy) < 0.05
    assert 0 < alone.redundancy_stderr < 0.1
    one = probe_pid(base, base, torch.zeros(600, dtype=torch.long), key=key(1), groups=groups, num=2)
    assert math.isnan(one.redundancy)
    assert "one class" in one.notes[0]


def test_doors():
    p = gate("and")
    with pytest.raises(ValueError, match="three dimensions"):
        pid_broja(p[0])
    with pytest.raises(ValueError, match="add up to 1"):
        pid_williams_beer(2 * p)
    with pytest.raises(ValueError, match="add up to 1"):
        pid_williams_beer(-p)
    with pytest.raises(ValueError, match="`i_x` must be a finite number"):
        pid_min_mi(math.inf, 0.0, 0.0)
    many = torch.arange(200)
    with pytest.raises(ValueError, match="10,000 cells"):
        pid(many, many, many, key=key(0))


@pytest.mark.outsider
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*GATES, "random"])
def test_parts_are_those_of_dit(name, seed):
    dit = pytest.importorskip("dit")
    from dit.pid import PID_BROJA, PID_MMI, PID_WB

    if name == "random":
        p = random_table(seed, (2, 3, 2))
    else:
        p = gate(name, [0.25] * 4 if seed == 0 else random_table(seed, (2, 2, 1)).flatten().tolist())
    cells = [each for each in np.ndindex(*p.shape) if p[each] > 0]
    theirs = dit.Distribution(["".join(map(str, each)) for each in cells], [float(p[each]) for each in cells])
    for decomposition, method in ((PID_WB, "williams_beer"), (PID_MMI, "min_mi"), (PID_BROJA, "broja")):
        found, made = decomposition(theirs), by(method, p)
        values = [found.get_pi(node) for node in (((0,), (1,)), ((0,),), ((1,),), ((0, 1),))]
        ours = [getattr(made, part) / LN2 for part in PARTS]
        if method == "broja" and name == "random":  # their solver may stop before the least information, by 0.01 bits
            assert ours[3] >= values[3] - 1e-6
            assert ours[3] == pytest.approx(values[3], abs=0.02)
        else:
            assert ours == pytest.approx(values, abs=2e-4 if method == "broja" else 1e-7), method


def test_probes_that_miss_a_label_and_single_groups_are_said():
    x = normal(key(0), torch.zeros(20, 2))
    found = probe_pid(x, x.flip(0), torch.arange(20) // 2, key=key(1), groups=torch.arange(20) // 2, num=5)
    assert any("absent from the training folds" in note for note in found.notes)
    assert any("take the fitted probes as they are" in note for note in found.notes)
    bits = torch.arange(12) % 2
    alone = pid(bits, bits, bits, key=key(0), groups=torch.zeros(12, dtype=torch.long), num=5)
    assert math.isnan(alone.synergy_stderr)
    assert any("One group alone" in note for note in alone.notes)


def test_what_is_no_label_no_number_or_of_other_rows_is_named():
    bits, x = torch.arange(12) % 2, normal(key(0), torch.zeros(12, 2))
    with pytest.raises(ValueError, match="`y` must hold one whole number per row"):
        pid.__wrapped__(bits, x[:, 0], bits, key=key(0))
    with pytest.raises(ValueError, match="`i_x` must be a finite number"):
        pid_min_mi(math.inf, 1.0, 2.0)
    with pytest.raises(ValueError, match="`y` must have a row for each of the 12 of `x`, got 11"):
        probe_pid(x, x[1:], bits, key=key(0))


def test_what_is_below_zero_makes_the_other_unique_part_too_large_and_that_is_said():
    found = pid_min_mi(-0.025, 0.074, 0.08)
    assert found.unique_y > found.information_y
    assert any("unique part of the other is too large" in note for note in found.notes)
    assert not any("redundancy" in note for note in pid_min_mi(0.02, 0.07, 0.08).notes)
