"""Eigenvalues of spectra that are prescribed in advance, both ends, with true residuals and an orthogonal basis."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, eigsh
from torch.testing import assert_close

from funcscope.core.keys import fold_in, key, normal
from funcscope.linalg import krylov
from funcscope.linalg.eigen import eigenpairs
from funcscope.linalg.krylov import Basis, Krylov
from funcscope.linalg.matvec import NonFinite, Products
from funcscope.linalg.space import Whole

WHICH = ("magnitude", "largest", "smallest", "both")


def prescribed(values, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """Q diag(values) Q' with a random orthogonal Q."""
    n = len(values)
    Q, _ = torch.linalg.qr(normal(key(seed), torch.zeros(n, n, dtype=torch.float64)))
    A = (Q * torch.as_tensor(values, dtype=torch.float64)) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def picked(values: torch.Tensor, num: int, which: str) -> torch.Tensor:
    """Oracle: the wanted ones of all eigenvalues, descending."""
    down = values.sort(descending=True).values
    if which == "both":
        return torch.cat([down[:num], down[-num:]])
    if which == "magnitude":
        return down[down.abs().argsort(descending=True)[:num]].sort(descending=True).values
    return down[:num] if which == "largest" else down[-num:]


def network(n: int = 2000) -> torch.Tensor:
    """A bulk at 0 with both tails, some outliers above, a few below."""
    bulk = 0.02 * normal(key(5), torch.zeros(n, dtype=torch.float64)) ** 3
    bulk[:15] = torch.linspace(1, 9, 15, dtype=torch.float64) ** 1.7
    bulk[15:20] = -torch.linspace(0.6, 2.1, 5, dtype=torch.float64)
    return bulk


def solve(A: torch.Tensor, **how):
    return eigenpairs(lambda v: A @ v, A[0], **{"key": key(1), **how})


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", [1, 3])
def test_wanted_values_vectors_and_residuals_are_those_of_the_dense_matrix(which, dtype, block):
    A = prescribed(torch.cat([torch.linspace(-5, 1, 60), torch.tensor([8.0, -9.0, 6.0])]), dtype=dtype)
    dense = torch.as_tensor(np.linalg.eigh(A.double().numpy())[0])
    found = solve(A, num=4, which=which, tol=1e-5, vectors=True, block=block, check=True)
    assert found.converged.all()
    assert found.values.dtype == torch.float64
    assert_close(found.values, picked(dense, 4, which), atol=1e-5 * 9, rtol=0)
    Y = found.vectors.double()
    assert_close(Y @ Y.T, torch.eye(len(Y), dtype=torch.float64), atol=50 * torch.finfo(dtype).eps, rtol=0)
    true = (Y @ A.double() - found.values[:, None] * Y).norm(dim=1)
    assert_close(found.residuals, true, atol=9 * 50 * torch.finfo(dtype).eps, rtol=1e-3)


@given(n=st.integers(1, 12), block=st.integers(1, 4), which=st.sampled_from(WHICH), seed=st.integers(0, 99))
def test_whole_spectrum_of_every_small_matrix(n, block, which, seed):
    raw = normal(fold_in(key(seed), "A"), torch.zeros(n, n, dtype=torch.float64))
    A = raw + raw.T
    num = max(1, n // 2) if which == "both" else n
    if (which == "both" and 2 * num > n) or block > n:
        return
    found = eigenpairs(lambda v: A @ v, A[0], key=key(seed), num=num, which=which, tol=1e-12, block=block)
    assert_close(found.values, picked(torch.linalg.eigvalsh(A), num, which), atol=1e-10, rtol=0)
    assert found.num_matvecs <= n + len(found.values)  # those that measure
    assert found.converged.all()


@pytest.mark.slow
@given(n=st.integers(6, 30), rank=st.integers(0, 3), copies=st.integers(1, 4), seed=st.integers(0, 99))
def test_laws_of_shift_and_sign_and_low_rank(n, rank, copies, seed):
    values = torch.zeros(n, dtype=torch.float64)
    for i in range(rank):
        values[i * copies : (i + 1) * copies] = 2.0**-i
    A = prescribed(values[:n], seed)
    num, tol = 5, 1e-8
    found = solve(A, num=num, which="largest", tol=tol)
    assert_close(found.values, picked(values, num, "largest"), atol=1e-8, rtol=0)  # closed form, all copies
    shifted = eigenpairs(lambda v: A @ v + 3 * v, A[0], key=key(2), num=num, which="largest", tol=tol)
    assert_close(shifted.values, found.values + 3, atol=1e-7, rtol=0)
    mirrored = eigenpairs(lambda v: -(A @ v), A[0], key=key(3), num=num, which="smallest", tol=tol)
    assert_close(mirrored.values, -found.values.flip(0), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_operator_of_rank_one_has_one_value_and_no_ghosts(dtype):
    g = normal(key(0), torch.zeros(300, dtype=dtype))
    found = eigenpairs(lambda v: g * (g @ v), g, key=key(1), num=5)
    assert_close(float(found.values[0]), float(g @ g), rtol=1e-6, atol=0)
    assert found.values[1:].abs().max() < 1e-6 * found.values[0]  # without orthogonality: five copies
    assert found.num_matvecs <= 7 + 5  # those that measure


def test_a_spectrum_that_is_mostly_negative_shows_it():
    found = solve(prescribed(torch.linspace(-5, 1, 300)), num=2)
    assert_close(found.values, torch.tensor([-5 + 6 / 299, -5], dtype=torch.float64), atol=5e-3, rtol=0)
    both = solve(prescribed(torch.linspace(-5, 1, 300)), num=1, which="both")
    assert_close(both.values, torch.tensor([1, -5], dtype=torch.float64), atol=5e-3, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1.0, -1e-12, 1e9])
def test_multiples_of_the_identity(scale):
    like = torch.zeros(40, dtype=torch.float64)
    found = eigenpairs(lambda v: scale * v, like, key=key(0), num=5)
    assert_close(found.values, torch.full((5,), scale, dtype=torch.float64), rtol=1e-12, atol=0)
    assert found.converged.all()
    assert found.num_matvecs == 6 + 5  # one look beyond the five, and a product of each vector


def test_a_matrix_of_one_entry():
    found = eigenpairs(lambda v: -3 * v, torch.zeros(1), key=key(0), num=1, vectors=True)
    assert found.values.tolist() == [-3]
    assert found.vectors.abs().tolist() == [[1.0]]
    assert found.num_matvecs == 2
    assert eigenpairs(lambda v: -3 * v, torch.zeros(1), key=key(0), num=1, max_matvecs=1).num_matvecs == 1


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_appear_by_blocks_and_where_the_space_closes(block, dtype):
    A = prescribed([4.0] * 4 + [3.0] * 2 + [0.0] * 60, dtype=dtype)
    found = solve(A, num=7, tol=1e-5, block=block)
    assert_close(found.values, torch.tensor([4.0] * 4 + [3] * 2 + [0], dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_block_shows_copies_that_one_vector_does_not():
    spectrum = torch.cat([torch.full((3,), 5.0), torch.linspace(-1, 1, 400)])
    A = prescribed(spectrum)
    one, three = (solve(A, num=3, which="largest", max_matvecs=12 * block, block=block) for block in (1, 3))
    assert one.values[1] < 2
    assert_close(three.values, torch.full((3,), 5.0, dtype=torch.float64), atol=1e-5, rtol=0)


def test_a_small_remainder_by_chance_is_no_closed_space():
    """The first product of a start of which outliers are a small part looks like that of a multiple of the identity."""
    d = torch.ones(400_000)
    d[:200] = torch.linspace(2, 5, 200)
    space = Krylov(Products(lambda v: d * v), d, key=fold_in(key(0), "start"))
    space.expand()
    assert 0 < space.residual < 0.1
    found = eigenpairs(lambda v: d * v, d, key=key(0), num=1, tol=0.01, max_matvecs=60)
    assert abs(float(found.values[0]) - 5) < 0.5
    short = eigenpairs(lambda v: d * v, d, key=key(0), num=1, tol=0.1)
    assert not short.converged.any() or abs(float(short.values[0]) - 5) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("block", [1, 2])
def test_a_restart_finds_the_same_values_in_less_memory(which, block):
    d = network(600)
    how = {"key": key(4), "num": 5, "which": which, "tol": 1e-6, "block": block, "vectors": True}
    whole = eigenpairs(lambda v: d * v, d, max_basis=600, max_matvecs=600, **how)
    small = eigenpairs(lambda v: d * v, d, max_basis=15, max_matvecs=4000, **how)
    assert small.num_matvecs > 15
    assert block > 1 or small.converged.all()  # room for a fresh start
    assert_close(small.values, whole.values, atol=1e-8, rtol=0)
    true = (small.vectors * d - small.values[:, None] * small.vectors).norm(dim=1)
    assert_close(small.residuals, true, atol=1e-11, rtol=1e-5)


def test_a_restarted_basis_keeps_its_limit(monkeypatch):
    seen, append = [], Basis.append
    monkeypatch.setattr(Basis, "append", lambda self, *a: (append(self, *a), seen.append(self.num))[0])
    d = network(600)
    eigenpairs(lambda v: d * v, d, key=key(0), num=3, which="smallest", tol=1e-8, max_basis=11, max_matvecs=300)
    assert 11 <= max(seen) <= 14  # and one for every fresh start


@pytest.mark.slow
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("num", [1, 5, 10])
@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_no_more_products_than_arpack_on_the_spectrum_of_a_network(which, num, tol):
    d = network()
    count, array = [0], d.numpy()

    def product(v):
        count[0] += 1
        return array * v.ravel()

    name = {"magnitude": "LM", "largest": "LA", "smallest": "SA", "both": "BE"}[which]
    start = normal(key(9), d).numpy()
    operator = LinearOperator((len(d), len(d)), product, dtype=np.float64)
    outside = eigsh(operator, k=2 * num if which == "both" else num, which=name, tol=tol, v0=start)[0]
    found = eigenpairs(lambda v: d * v, d, key=key(1), num=num, which=which, tol=tol)
    assert found.converged.float().mean() >= 0.6
    assert (
        (found.values - picked(d, num, which)).abs()[found.converged].le(found.residuals[found.converged] + 1e-12).all()
    )
    near = (found.values[:, None] - d).abs().min(1).values
    assert (near <= found.residuals + 1e-12).all()  # what a residual promises
    if tol < 1e-3 or which in ("magnitude", "largest"):  # at 1e-3 of 42 the lower end is not told apart
        assert_close(found.values, picked(d, num, which), atol=tol * 42, rtol=0)
        assert_close(found.values, torch.tensor(outside.copy()).sort(descending=True).values, atol=tol * 42, rtol=0)
    assert found.num_matvecs <= 1.5 * count[0] + 2 or which in ("smallest", "both")  # it has a tolerance of its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 3])
def test_the_basis_is_orthogonal_to_rounding_on_a_graded_spectrum(dtype, block):
    n, within = 400, 40 * torch.finfo(dtype).eps  # two roots of n: what 400 roundings of one sign by chance add up to
    d = torch.logspace(0, -8, n, dtype=torch.float64).to(dtype)
    space = Krylov(Products(lambda v: d * v), d, key=key(0), block=block)
    for step in range(120 // block):
        space.expand()
        if step == 60 // block:
            values, S, _ = space.ritz()
            space.restart(values[-30:], S[:, -30:])
    Q = space.basis.combined(torch.eye(space.basis.num, dtype=torch.float64)).double()
    assert_close(Q @ Q.T, torch.eye(len(Q), dtype=torch.float64), atol=within, rtol=0)
    projected = (Q * d) @ Q.T
    assert_close(space.T, projected[: space.size, : space.size], atol=within, rtol=0)
    tail = (Q[: space.size] * d) - space.T @ Q[: space.size]  # A Q = T Q and nothing but R beside it
    assert_close(tail, space.R.T @ Q[space.size :], atol=within, rtol=0)
    assert tail[:-block].abs().max() < within


def test_passes_over_slabs_and_panels_are_plain_products(monkeypatch):
    monkeypatch.setattr(krylov, "SLAB", 16)
    monkeypatch.setattr(krylov, "PANEL", 3)
    rows = normal(key(0), torch.zeros(8, 100, dtype=torch.float64))
    basis = Basis(Whole(rows[0]))
    for row in rows:
        basis.append(row, 2.0)
    Q, W = rows / 2, normal(key(1), torch.zeros(2, 100, dtype=torch.float64))
    for first, last in ((0, 8), (2, 3), (2, 7), (6, 8)):
        out = W.clone()
        found, left = basis.remove(out, first, last)
        assert_close(found, Q[first:last] @ W.T)
        assert_close(out, W - (W @ Q[first:last].T) @ Q[first:last])
        assert_close(torch.tensor(left, dtype=torch.float64), out.norm(dim=1))
    M = normal(key(2), torch.zeros(8, 5, dtype=torch.float64))
    assert_close(basis.combined(M[:6]), M[:6].T @ Q[:6])
    basis.rotate(M)
    assert basis.num == 5
    assert_close(torch.stack([basis[i] for i in range(5)]), M.T @ Q)


def test_the_same_key_gives_the_same_bits_and_another_one_another_start():
    d = network(500).float()
    first, again, other = (eigenpairs(lambda v: d * v, d, key=key(k), num=3, vectors=True) for k in (7, 7, 8))
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.values, other.values)
    assert_close(first.values, other.values, atol=1e-3 * 45, rtol=0)


def true_residuals(found, d: torch.Tensor) -> torch.Tensor:
    """Oracle: ||A y - theta y|| / ||y|| of A = diag(d), in float64."""
    Y = found.vectors.double()
    return (d.double() * Y - found.values[:, None] * Y).norm(dim=1) / Y.norm(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_basis", [None, 30])
@pytest.mark.parametrize("spectrum", ["graded", "network", "long"])
def test_no_residual_is_claimed_that_is_below_the_true_one(dtype, max_basis, spectrum):
    graded = torch.logspace(0.3, -9, 300, dtype=torch.float64)
    d = {"graded": graded, "network": network(3000), "long": network(30_000)}[spectrum].to(dtype)
    unit = torch.finfo(dtype).eps * float(d.abs().max())
    for budget in (60, 300) if len(d) > 300 else (60, 300, 1000):
        how = {"key": key(1), "num": 6, "which": "both", "tol": 1e-14, "max_matvecs": budget, "max_basis": max_basis}
        found = eigenpairs(lambda v: d * v, d, vectors=True, **how)
        true = true_residuals(found, d)
        assert found.num_matvecs <= budget
        assert (true <= 1.02 * found.residuals + unit).all()
        assert (found.residuals <= 1.3 * true + 20 * unit).all() or spectrum == "long"  # and none far above


def test_rounding_within_the_products_is_in_the_residuals():
    """Products in a coarser dtype than the vectors': the recurrence shows nothing of their error."""
    d = network(400).float()
    found = eigenpairs(
        lambda v: (d * v).bfloat16().float(), d, key=key(0), num=4, tol=1e-5, max_matvecs=80, vectors=True
    )
    true = true_residuals(found, d)
    assert true.max() > 1e-4 * 42  # negative control: 500 units of float32
    assert (true <= 1.5 * found.residuals).all()
    assert not found.converged.any()


@pytest.mark.parametrize("block", [1, 3])
def test_products_that_measure_are_within_the_budget(block):
    d = torch.linspace(0.1, 1, 30, dtype=torch.float64) ** 8
    for budget in (6, 7, 11, 16, 20, 29, 30, 33, 36, 60):
        found = eigenpairs(lambda v: d * v, d, key=key(0), num=4, max_matvecs=budget, block=block, tol=1e-12)
        assert found.num_matvecs <= budget
        assert (found.residuals >= 3 * torch.finfo(d.dtype).eps).all()
        assert found.converged.all() or budget < 30  # the whole space is within reach


def test_a_budget_that_ends_is_said_in_the_result():
    d = torch.linspace(0, 1, 5000)
    found = eigenpairs(lambda v: d * v, d, key=key(0), num=4, tol=1e-6, max_matvecs=12)
    assert found.num_matvecs == 12
    assert not found.converged.any()
    assert (found.residuals > 1e-6).all()
    assert str(found).count("not ") >= 4


def test_a_product_that_returns_its_argument_leaves_the_basis_alone():
    found = eigenpairs(lambda v: v, torch.zeros(30), key=key(0), num=3, vectors=True, block=2)
    assert_close(found.vectors @ found.vectors.T, torch.eye(3))


def test_a_like_that_wants_gradients_is_no_obstacle():
    like = torch.zeros(9, requires_grad=True)
    assert not eigenpairs(lambda v: 2 * v + 0 * like, like, key=key(0), num=1, vectors=True).vectors.requires_grad


def test_bad_requests_get_one_clear_line():
    like = torch.zeros(6)

    def ask(matvec=lambda v: v, **how):
        return inspect.unwrap(eigenpairs)(matvec, how.pop("like", like), **{"key": key(0), **how})

    for how, message in (
        ({"num": 7}, "`num` = 7 asks for 7 eigenvalues of a matrix that has 6"),
        ({"num": 4, "which": "both"}, "`num` = 4 at each of both ends asks for 8 eigenvalues of a matrix that has 6"),
        ({"num": 0}, "`num` must be an integer of at least 1, got 0"),
        ({"which": "top"}, "`which` must be one of 'magnitude', 'largest', 'smallest', 'both', got 'top'"),
        ({"block": 7}, "`block` must be at most P = 6, got 7"),
        ({"tol": 0.0}, "`tol` must be a finite number above 0"),
        ({"num": 3, "max_matvecs": 2}, "`max_matvecs` must be an integer of at least 3, got 2"),
        ({"num": 2, "max_basis": 3}, "`max_basis` must be an integer of at least 4, got 3"),
        ({"num": 1, "like": torch.zeros(0)}, "`like` must be a flat vector with at least one entry"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(**how)
    with pytest.raises(TypeError, match=r"`like` must be float32 or float64, got torch\.bfloat16"):
        ask(like=like.bfloat16())
    with pytest.raises(TypeError, match="`key` must be a key"):
        ask(key=0)
    with pytest.raises(ValueError, match="not symmetric"):
        ask(lambda v: v.roll(1), check=True)
    calls = []
    with pytest.raises(NonFinite, match="product 3 has 1 entries"):
        ask(lambda v: (calls.append(1), v * torch.arange(6) / (1 if len(calls) < 3 else torch.arange(6)))[1], num=5)


def symmetric(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix with a clustered, gapped, even, semidefinite or indefinite spectrum, and its true eigenvalues."""
    size = 120 + 20 * (index % 7)
    draws, shares = (normal(fold_in(key(index), name), torch.zeros(size, dtype=torch.float64)) for name in ("z", "u"))
    level = torch.tensor([-4.0, -1.0, 0.0, 2.0, 5.0], dtype=torch.float64)[(shares.abs() * 7).long() % 5]
    outliers = 0.05 * draws
    outliers[:8] += torch.linspace(-3, 9, 8, dtype=torch.float64)
    copies = 0.1 * draws
    copies[:3], copies[3:5], copies[5:7] = 5.0, 3.0, -2.0
    spectra = (
        level + 10.0 ** -(1 + index % 6) * draws, outliers, copies, draws, torch.linspace(-2, 5, size), draws.relu(),
        0.02 * draws**3 + outliers.clamp_min(0), torch.where(shares > 0, 1.0, -1.0) + 0.05 * draws,
    )  # fmt: skip
    A = prescribed(spectra[index % len(spectra)], seed=index, dtype=torch.float32)
    return A, torch.linalg.eigvalsh(A.double())


def wrong(index: int) -> bool:
    """Something is called converged that is not within its residual of the true value of its rank."""
    A, true = symmetric(index)
    which, num = WHICH[(index // 8) % 4], 1 + index % 6
    found = eigenpairs(lambda v: A @ v, A[0], key=key(index), num=num, which=which)
    away = (found.values - picked(true, num, which)).abs() > found.residuals
    return bool((away & found.converged).any())


@pytest.mark.slow
def test_converged_values_have_the_right_rank():
    assert not any(wrong(index) for index in range(24))


@pytest.mark.slow
def test_converged_values_have_the_right_rank_over_200_matrices():
    assert sum(wrong(index) for index in range(200)) <= 1


def test_a_value_within_its_residual_of_zero_is_not_resolved():
    d = torch.cat([torch.linspace(1, 11, 20), 1e-3 * normal(key(3), torch.zeros(900))]).double()
    found = solve(d.diag(), num=4, which="both")
    assert found.converged[:4].all()
    assert torch.equal(found.resolved, found.values.abs() > found.residuals)
    assert not found.converged[~found.resolved].any()


def test_an_error_that_products_say_they_have_is_in_the_residuals():
    """Products of a matrix that is not the one that is meant: its values lie within what is reported."""
    A = torch.diag(torch.cat([torch.linspace(1, 20, 59), torch.tensor([30.0])]).double())
    E = normal(key(1), torch.zeros(60, 60).double())
    E = E + E.T
    E *= 0.3 / float(torch.linalg.matrix_norm(E, 2))

    def matvec(v):
        return (A + E) @ v

    without = eigenpairs(matvec, A[0], key=key(0), num=2)
    matvec.error = lambda: 0.3
    off = (without.values - torch.linalg.eigvalsh(A).flip(0)[:2]).abs()
    within = eigenpairs(matvec, A[0], key=key(0), num=2)
    assert bool((off > without.residuals).any())  # negative control
    assert bool((off <= within.residuals).all())
    assert bool(without.converged.all())
    assert not bool(within.converged.any())
