"""The spectrum of gradients' second moments from Grams, against dense matrices of gradients that were multiplied out."""

import math

import pytest
import torch
from problems import CATALOGUE, loss_of, problem, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.layout import Layout, Leaf, View
from funcscope.curvature import gram_errors, gram_statistics
from funcscope.curvature.gram import Grams
from funcscope.curvature.gram_errors import free_errors, trace_stderr
from funcscope.curvature.gram_statistics import Data, eigenvalues, left_out
from funcscope.fisher import fisher_spectrum, gradient_gram, gram_spectrum
from funcscope.linalg.ranks import matrix_ranks

KEY = fs.key(0)


def gradients(num, size, scale=1.0, seed=0):
    return seeded(seed, lambda: torch.randn(num, size, dtype=torch.float64)) * scale


def spectrum(rows, **options):
    return gram_spectrum(rows @ rows.T, key=KEY, **{"folds": 0, **options})


def blocks_of(loss, by):
    """Coordinates of every block, from its views."""
    places = loss.layout.unravel(torch.arange(loss.layout.num, dtype=torch.float64), cast=False)
    views = loss.layout.blocks((lambda _: "all") if by == "none" else by)
    return {
        name: torch.cat([places[v.leaf].movedim(v.dim, 0)[v.slice].flatten() for v in members]).long()
        for name, members in views.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("name", "by"), [("mlp", "tensor"), ("mlp", "none"), ("gpt2", "layer"), ("gpt2", "module")])
def test_every_number_is_that_of_the_matrix_of_gradients(name, by, centered):
    """Oracle: dense; rows by `vmap` of `grad`, singular values and P x P products of them."""
    loss = loss_of(name)
    rows = fs.per_sample_gradients(loss, loss.net.theta)
    rows = rows - rows.mean(0) if centered else rows
    rows /= (len(rows) - centered) ** 0.5
    found = fisher_spectrum(loss, loss.net.theta, key=KEY, by=by, centered=centered, folds=0)
    parts = {block: rows[:, at] for block, at in blocks_of(loss, by).items()}
    assert found.blocks == list(parts)
    for i, part in enumerate(parts.values()):
        values = torch.linalg.svdvals(part).square()
        least = min(len(values), found.eigenvalues.shape[1])
        assert_close(found.eigenvalues[i, :least], values[:least], rtol=1e-10, atol=1e-11)
        assert_close(found.trace[i], part.square().sum())
        assert_close(found.spectral_gap[i], values[0] - values[1], rtol=1e-9, atol=1e-12)
        there = values[values > 1e-10 * values[0]]
        assert_close(found.condition_number[i], there[0] / there[-1], rtol=1e-6, atol=0)
        assert int(found.numerical_rank[i]) == len(there) <= int(found.rank_bound[i])
        ranks = matrix_ranks(part)
        for rank, value in ranks._asdict().items():
            assert_close(float(getattr(found, rank)[i]), value, rtol=1e-5, atol=0)
    squares = torch.stack([torch.stack([(a.T @ b).square().sum() for b in parts.values()]) for a in parts.values()])
    own = squares.diagonal().sqrt()
    assert_close(found.coupling, squares / own / own[:, None])
    assert_close(found.off_block_mass, 1 - float(squares.diagonal().sum() / squares.sum()))
    values = torch.linalg.svdvals(rows).square()
    assert_close(found.global_eigenvalues, values[: len(found.global_eigenvalues)], rtol=1e-10, atol=1e-11)
    assert_close(float(found.global_trace.value), float(values.sum()))
    assert found.global_rank_bound == min(len(rows) - centered, loss.layout.num)


@pytest.mark.slow
def test_tokens_are_samples_of_their_own_and_their_matrix_is_the_empirical_fisher_per_token():
    """Oracle: the operator that never makes a gradient, by its largest eigenvalue."""
    loss = loss_of("gpt2")
    for unit in ("token", "sequence"):
        found = fisher_spectrum(loss, loss.net.theta, key=KEY, by="none", unit=unit, folds=0)
        matvec = fs.empirical_fisher(loss, loss.net.theta, unit=unit)
        largest = fs.eigenpairs(matvec, loss.net.theta, key=KEY, num=1, which="largest", tol=1e-8).values
        assert_close(found.global_eigenvalues[:1], largest, rtol=1e-7, atol=0)
    assert (found.unit, found.num_samples, found.num_groups) == ("sequence", 5, 5)


def test_tokens_of_a_sequence_are_left_out_together():
    loss = loss_of("gpt2")
    found = fisher_spectrum(loss, loss.net.theta, key=KEY, unit="token", by="none", folds=4)
    scored = sum(int((labels.weight != 0).sum()) for _, labels in loss.batches)
    assert (found.num_samples, found.num_groups) == (scored, 5)
    rows = torch.cat([gradients(20, 6)] * 3)  # three copies are no news
    groups = torch.arange(20).repeat(3)
    one, three = spectrum(rows[:20], folds=50), spectrum(rows, folds=50, groups=groups)
    assert_close(three.errors["trace"], one.errors["trace"])
    assert_close(three.coupling_debiased, one.coupling_debiased)
    assert_close(three.participation_ratio_debiased, one.participation_ratio_debiased)
    apart = spectrum(rows, folds=50)
    assert float(apart.errors["trace"][0]) < 0.8 * float(one.errors["trace"][0])  # negative control


def test_views_make_blocks_and_overlapping_ones_are_refused():
    loss = loss_of("mlp")
    heads = {
        "upper": [View("0.weight", 0, slice(0, 3)), View("0.bias", 0, slice(0, 3))],
        "lower": [View("0.weight", 0, slice(3, 6)), View("0.bias", 0, slice(3, 6))],
        "columns": [View("2.weight", 1, slice(0, 2))],
    }
    found = fisher_spectrum(loss, loss.net.theta, key=KEY, by=heads, folds=0)
    rows = fs.per_sample_gradients(loss, loss.net.theta)
    by_name = {leaf.name: rows[:, leaf.slice].view(-1, *leaf.shape) for leaf in loss.layout.leaves}
    upper = torch.cat([by_name["0.weight"][:, :3].flatten(1), by_name["0.bias"][:, :3]], 1)
    columns = by_name["2.weight"][:, :, :2].flatten(1)
    assert_close(found.trace[0], upper.square().sum() / len(rows))
    assert_close(
        found.eigenvalues[2, :6], torch.linalg.svdvals(columns).square()[:6] / len(rows), rtol=1e-9, atol=1e-12
    )
    assert found.num_parameters == [15, 15, 6]
    assert bool(found.eigenvalues[2, 6:].isnan().all())  # a block of six parameters has six eigenvalues
    heads["again"] = [View("2.weight", 0, slice(0, 1))]
    with pytest.raises(ValueError, match=r"block 'again' has entries of `2.weight` that an earlier view has"):
        fisher_spectrum(loss, loss.net.theta, key=KEY, by=heads)


# Few samples: errors, bias, debiased numbers


@pytest.mark.parametrize("centered", [False, True])
def test_without_a_fold_it_is_the_spectrum_of_the_other_rows_and_errors_are_the_jackknifes(centered):
    rows = torch.stack([gradients(7, 5), gradients(7, 4, seed=1)[:, [0, 1, 2, 3, 0]]])
    grams = Grams(rows @ rows.mT, "sample", 0, [], ["a", "b"])
    found = gram_spectrum(grams, key=KEY, centered=centered, num_parameters=[5, 5])
    largest, ranks = [], []
    for i in range(7):
        rest = rows[:, torch.arange(7) != i]
        dense = rest - rest.mean(1, keepdim=True) if centered else rest
        values = torch.linalg.svdvals(torch.cat([*dense], 1)).square() / (6 - centered)
        largest.append(values[0])
        ranks.append(torch.tensor(matrix_ranks(torch.cat([*dense], 1)).participation_ratio))
    for name, values in (("largest_eigenvalue", largest), ("participation_ratio", ranks)):
        values = torch.stack(values)
        stderr = (6 / 7 * (values - values.mean()).square().sum()).sqrt()
        assert_close(float(found.errors[name][-1]), float(stderr), rtol=1e-6, atol=0)
    bias = 6 * (torch.stack(largest).mean() - found.numbers["largest_eigenvalue"][-1])
    assert found.global_largest_eigenvalue_bias == pytest.approx(float(bias))


def test_folds_are_of_whole_groups_and_as_large_as_can_be():
    groups = torch.tensor([0, 1, 1, 2, 3, 4, 4, 5, 6])
    rest = left_out(groups, KEY, 3)
    out = [set(groups[~there].tolist()) for there in rest]
    assert sorted(len(each) for each in out) == [2, 2, 3]
    assert set.union(*out) == set(range(7))
    for there, each in zip(rest, out, strict=True):
        assert not any(int(g) in each for g in groups[there])
    assert [set(groups[~there].tolist()) for there in left_out(groups, KEY, 7)] == [{i} for i in range(7)]
    assert len(left_out(groups, KEY, 0)) == 0


def test_errors_are_those_of_the_theory_where_there_is_one():
    """Closed form: sd / sqrt(n) of the mean |g|^2, and of (g'v)^2 along the top eigenvector, to first order in 1/n."""
    rows = gradients(100, 3) * torch.tensor([3.0, 1.0, 0.5])
    lengths = rows.square().sum(1)
    top = (rows @ torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]).square()
    for folds, rel in ((100, 0.05), (25, 0.3)):
        found = spectrum(rows, folds=folds)
        assert float(found.global_trace.stderr) == pytest.approx(float(lengths.std()) / 100**0.5)
        assert float(found.global_largest_eigenvalue.value) == pytest.approx(float(top.mean()))
        assert float(found.global_largest_eigenvalue.stderr) == pytest.approx(float(top.std()) / 100**0.5, rel=rel)
        assert abs(found.global_largest_eigenvalue_bias) < 0.3 * float(found.global_largest_eigenvalue.stderr)
    assert spectrum(rows, folds=20) == spectrum(rows, folds=20)
    assert spectrum(rows, folds=20) != gram_spectrum(rows @ rows.T, key=fs.key(1), folds=20)


def two_blocks(rows, groups=None, centered=False):
    parts = torch.stack([rows[:, :4] @ rows[:, :4].T, rows[:, 4:] @ rows[:, 4:].T])
    groups = torch.arange(len(rows)) if groups is None else groups
    return Data(parts, groups, torch.tensor([4, rows.shape[1] - 4, rows.shape[1]]), centered, 1e-12)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_the_error_of_a_trace_is_that_of_sums_over_groups_by_loops(centered, copies):
    """Oracle: the jackknife, from which the part by pairs is taken off, of groups of equal size."""
    rows = 0.5 + gradients(6 * copies, 9)
    groups = torch.arange(6).repeat_interleave(copies)
    found = trace_stderr(two_blocks(rows, groups, centered))
    if not centered:
        sums = rows.square().sum(1).reshape(6, copies).mean(1)
        assert float(found[-1]) == pytest.approx(float(sums.std()) / 6**0.5)
        return
    n = len(rows)
    halves = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            halves[groups[i], groups[j]] += (rows[i] - rows[j]).square().sum() / 2
    own = halves.diagonal() / 10  # to the pairs with five other groups, both ways
    pairs = halves + own[:, None] + own
    pairs = pairs - torch.diag(pairs.diagonal())
    assert float(pairs.sum() / (n * (n - 1))) == pytest.approx(float(rows.var(0).sum()))
    assert float(found[-1]) == pytest.approx(float(gram_errors.pair_stderr(pairs)) * 30 / (n * (n - 1)))


@pytest.mark.parametrize("centered", [False, True])
def test_errors_without_bias_are_near_the_jackknifes_of_many_samples(centered):
    rows = gradients(60, 9) @ gradients(9, 9, seed=1)
    data = two_blocks(rows, centered=centered)
    found = free_errors(data)
    assert found.resolved.all()
    rest = [data.statistics(torch.arange(60) != i) for i in range(60)]
    for name, error in (("coupling", found.coupling), ("off_block_mass", found.off_block_mass)):
        values = torch.stack([each.coupling[f"{name}_debiased"] for each in rest], -1)
        wanted = (59 / 60 * (values - values.mean(-1, keepdim=True)).square().sum(-1)).sqrt()
        assert_close(error, wanted, rtol=1e-9, atol=1e-9)
    if not centered:
        values = torch.stack([each.numbers["participation_ratio_debiased"] for each in rest], -1)
        wanted = (59 / 60 * (values - values.mean(-1, keepdim=True)).square().sum(-1)).sqrt()
        assert_close(found.participation_ratio, wanted, rtol=0.2, atol=0)


def test_the_participation_ratio_without_bias_has_its_error_and_a_covariance_has_none():
    rows = gradients(30, 6)
    made = gram_spectrum(Grams(two_blocks(rows).values, "sample", 0, [], ["a", "b"]), key=KEY, folds=0)
    wanted = free_errors(two_blocks(rows)).participation_ratio
    assert_close(made.participation_ratio_debiased_stderr, wanted[:-1])
    there = made.frame().set_index(["quantity", "block"]).loc[("participation_ratio_debiased", "a")]
    assert float(there["stderr"]) == pytest.approx(float(wanted[0]))
    centred = spectrum(rows, centered=True)
    assert centred.participation_ratio_debiased is None
    assert centred.global_participation_ratio_debiased is None
    assert "participation_ratio_debiased" not in str(centred)
    assert not any("participation_ratio_debiased" in name for name in centred.asdict())


def test_numbers_without_bias_say_where_they_are_not_resolved():
    mixed = torch.cat([torch.eye(5, 4).double(), 10 + gradients(5, 4)], 1)  # orthogonal ones have no square in common
    parts = two_blocks(mixed).values
    few = gram_spectrum(Grams(parts, "sample", 0, [], ["noise", "signal"]), key=KEY, num_parameters=[4, 4])
    assert few.squares_resolved.tolist() == [False, True, True]
    assert few.participation_ratio_debiased.isnan().tolist() == [True, False]
    assert few.coupling_debiased.isnan().tolist() == [[True, True], [True, False]]
    assert few.unresolved == []
    assert any(note.endswith("by these samples: noise.") for note in few.notes)
    weak = two_blocks(gradients(5, 8, seed=1)).values  # squares of 1.2 of their errors, above 0
    none = gram_spectrum(Grams(weak, "sample", 0, [], ["a", "b"]), key=KEY, num_parameters=[4, 4])
    assert none.coupling_debiased.isnan().all()
    assert math.isnan(float(none.off_block_mass_debiased.value))
    assert none.unresolved == ["off_block_mass_debiased", "global_participation_ratio_debiased"]
    assert "not resolved" in str(none)
    assert spectrum(gradients(60, 3), num_parameters=[3]).unresolved == []


@pytest.mark.slow
@pytest.mark.parametrize("num", [5, 10, 20])
@pytest.mark.parametrize("tails", ["normal", "t5"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_errors_of_traces_are_what_repetitions_have(num, tails, tokens):
    """Over 1500 sets of samples, or of sequences whose tokens share half of their gradients; a bootstrap has .6 to .9."""

    def draws(seed, *shape):
        x = gradients(math.prod(shape), 12, seed=seed).reshape(*shape, 12)
        squares = gradients(5 * math.prod(shape), 12, seed=seed + 1).reshape(5, *shape, 12).square().mean(0)
        return x / squares.sqrt() if tails == "t5" else x

    every = 0.3 + draws(7, 1500, num, 1) + (draws(8, 1500, num, tokens) if tokens > 1 else 0)
    groups = torch.arange(num).repeat_interleave(tokens)
    for centered in (False, True):
        values, errors = [], []
        for rows in every.flatten(1, 2):
            data = Data((rows @ rows.T)[None], groups, torch.tensor([12, 12]), centered, 1e-12)
            values.append((rows.var(0) if centered else rows.square().mean(0)).sum())
            errors.append(trace_stderr(data)[0])
        ratio = float(torch.stack(errors).square().mean().sqrt() / torch.stack(values).std())
        assert 0.9 < ratio < 1.15


@pytest.mark.slow
@pytest.mark.parametrize("num", [5, 10, 20])
def test_errors_of_spectra_and_of_numbers_without_bias_are_of_the_size_that_repetitions_have(num):
    """Eigenvalues that lie apart; a bootstrap of 5 samples has .74 to 1.5 times the error of ranks."""
    scale = torch.tensor([6.0, 3.0, 2.0] + [0.5] * 17)
    names = ("largest_eigenvalue", "effective_rank", "spectral_rank", "participation_ratio")
    values, errors, free = [], [], []
    for i in range(200):
        rows = (0.3 + gradients(num, 20, seed=i)) * scale
        found = gram_spectrum(Grams(two_blocks(rows).values, "sample", 0, [], ["a", "b"]), key=KEY)
        values.append(torch.stack([found.numbers[name][-1] for name in names]))
        errors.append(torch.stack([found.errors[name][-1] for name in names]))
        free.append((float(found.off_block_mass_debiased.value), float(found.off_block_mass_debiased.stderr)))
    ratios = torch.stack(errors).square().mean(0).sqrt() / torch.stack(values).std(0)
    assert bool(((ratios > 0.75) & (ratios < 1.4)).all()), ratios
    mass = torch.tensor(free)
    mass = mass[~mass[:, 0].isnan()]
    if num > 5:
        assert 0.75 < float(mass[:, 1].square().mean().sqrt() / mass[:, 0].std()) < 1.6


def test_the_top_eigenvalue_of_few_samples_is_biased_up_and_its_bias_says_how_much():
    rows = gradients(20, 200)  # all eigenvalues of the truth are 1
    found = spectrum(rows, folds=30)
    bias = float(found.largest_eigenvalue) - 1
    assert bias > 10
    assert 0.5 * bias < float(found.largest_eigenvalue_bias) < bias


@pytest.mark.parametrize(("num", "naive"), [(8, 0.95), (32, 0.83), (128, 0.54)])
def test_coupling_of_independent_blocks_is_that_of_few_samples_until_it_is_debiased(num, naive):
    rows = torch.stack([gradients(num, 150, seed=1), gradients(num, 150, seed=2)])
    layout = Layout.of(nn.ParameterDict({name: torch.zeros(150) for name in "ab"}))
    grams = gradient_gram(torch.cat([*rows], 1), layout, by="tensor")
    found = gram_spectrum(grams, key=KEY, folds=40)
    assert float(found.coupling[0, 1]) == pytest.approx(naive, abs=0.06)  # the documented measure
    error = float(found.coupling_debiased_stderr[0, 1])
    if num > 8:
        assert abs(float(found.coupling_debiased[0, 1])) < max(0.05, 3 * error)
    assert float(found.coupling.diagonal().min()) == pytest.approx(1)


@pytest.mark.parametrize("centered", [False, True])
def test_debiased_squares_have_the_true_ones_as_their_mean(centered):
    """z-test of ||F_ab||^2 over many small samples of a known distribution; the naive form is far from it."""
    mix = gradients(4, 5, seed=3)
    offset = torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    truth = mix.T @ mix + (0 if centered else torch.outer(offset, offset))
    wanted = torch.stack(
        [
            torch.stack([truth[a, b].square().sum() for b in (slice(0, 2), slice(2, 5))])
            for a in (slice(0, 2), slice(2, 5))
        ]
    )
    draws, naive = [], []
    for i in range(700):
        rows = gradients(6, 4, seed=100 + i) @ mix + offset
        parts = torch.stack([rows[:, :2] @ rows[:, :2].T, rows[:, 2:] @ rows[:, 2:].T])
        given = gram_statistics.centred(parts) if centered else parts
        draws.append(gram_statistics._moments(given, torch.eye(6, dtype=torch.bool), centered))
        naive.append(torch.einsum("aij,bij->ab", parts, parts) / 36)
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - wanted).abs() < 4 * error).all())
    assert bool(((torch.stack(naive).mean(0) - wanted).abs() > 4 * error).any())  # negative control


def test_a_debiased_participation_ratio_is_that_of_the_truth():
    values = [float(spectrum(gradients(40, 100, seed=i)).participation_ratio_debiased) for i in range(20)]
    plain = float(spectrum(gradients(40, 100)).participation_ratio)
    assert sum(values) / 20 == pytest.approx(100, rel=0.1)
    assert plain == pytest.approx(100 / (1 + 100 / 40), rel=0.15)  # D / (1 + D/N), definitions.md


# E16: what the documented code did with few parameters, subsamples, and the solver


def test_more_samples_than_a_quarter_of_the_parameters_still_have_eigenvalues():
    """The document's fallback for N > P/4 is the diagonal of F, and its Gram has the regulariser added."""
    rows = gradients(30, 8) @ gradients(8, 8, seed=1)
    found = spectrum(rows, num_parameters=[8])
    dense = rows.T @ rows / 30
    exact = torch.linalg.eigvalsh(dense).flip(0)
    assert_close(found.global_eigenvalues[:8], exact)
    assert float(dense.diagonal().max()) < 0.9 * float(exact[0])
    assert (found.global_rank_bound, found.global_numerical_rank) == (8, 8)
    assert found.global_condition_number == pytest.approx(float(exact[0] / exact[-1]))
    assert bool(found.eigenvalues[0, 8:].isnan().all())


def test_eigenvalues_that_are_rounding_are_in_no_rank():
    rows = gradients(60, 3)
    noise = gradients(60, 60, (1e-5 / 60) ** 0.5, seed=1)
    noisy = rows @ rows.T + noise @ noise.T  # eigenvalues of about 1e-7 times the largest, as rounding to float32 makes
    found = gram_spectrum(noisy, key=KEY, folds=0, num_parameters=[3], rounding=1e-6)
    assert float(found.effective_rank) == pytest.approx(matrix_ranks(rows).effective_rank, rel=1e-3)
    assert (found.global_numerical_rank, found.global_condition_number < 10) == (3, True)
    unaware = gram_spectrum(noisy, key=KEY, folds=0)
    assert float(unaware.effective_rank) > 1.05 * float(found.effective_rank)  # negative control
    assert unaware.global_condition_number > 1e4


def test_a_refused_matrix_is_moved_only_then_and_the_result_says_so(monkeypatch):
    rows, real, calls = gradients(6, 9), torch.linalg.eigvalsh, []

    def refuses(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix)

    plain = spectrum(rows, num_parameters=[9])
    assert plain.jittered == []
    gram = rows @ rows.T / 6
    monkeypatch.setattr(torch.linalg, "eigvalsh", refuses)
    values, moved = eigenvalues(gram[None])
    assert moved == [0]
    assert_close(values, plain.eigenvalues[:, :6], rtol=1e-12, atol=1e-12)  # taken off again
    assert not torch.equal(calls[1], calls[0])
    calls.clear()
    found = spectrum(rows)
    assert set(found.jittered) <= {"all"}
    calls.clear()
    monkeypatch.setattr(gram_statistics, "eigenvalues", lambda m, _: (real(m).flip(-1), [0]))
    assert "solved with a multiple of I, taken off again: all." in spectrum(rows).notes


@pytest.mark.parametrize("centered", [False, True])
def test_top_k_counts_what_is_shown_and_changes_no_other_number(centered):
    rows = gradients(5, 40)
    few, many = spectrum(rows, top_k=2, centered=centered), spectrum(rows, top_k=50, centered=centered)
    assert (few.eigenvalues.shape, many.eigenvalues.shape) == ((1, 2), (1, 5))
    for name in few.numbers:
        assert_close(few.numbers[name], many.numbers[name], equal_nan=True)
    with pytest.raises(ValueError, match="`top_k` must be an integer of at least 1, got 0"):
        spectrum(rows, top_k=0)


# Bad input


def test_one_sample_has_a_spectrum_without_errors_and_no_covariance():
    found = spectrum(torch.tensor([[3.0, 4.0]]).double(), folds=10, num_parameters=[2])
    assert (found.global_eigenvalues.tolist(), float(found.second_eigenvalue)) == ([25.0], 0.0)
    assert math.isnan(float(found.global_trace.stderr))
    assert "one sample: there is no error over samples." in found.notes
    with pytest.raises(ValueError, match="a covariance needs two samples at least, got 1"):
        spectrum(torch.ones(1, 2).double(), centered=True)


def test_identical_samples_have_one_eigenvalue_and_a_covariance_of_zero():
    rows = gradients(1, 30).expand(6, 30)
    found = spectrum(rows, num_parameters=[30])
    assert (found.global_numerical_rank, float(found.spectral_rank)) == (1, pytest.approx(1))
    flat = spectrum(rows, centered=True, num_parameters=[30])
    assert flat.global_numerical_rank == 0
    assert math.isnan(flat.global_condition_number)
    assert any("all gradients are equal, up to rounding" in note for note in flat.notes)


def test_sequences_without_a_label_are_no_samples():
    model, batches, criterion = problem("gpt2")
    ids = batches[0]["input_ids"]
    labels = ids.masked_fill(batches[0]["attention_mask"] == 0, -100)
    labels[1] = -100
    loss = fs.objective(fs.functional(model), [{**batches[0], "labels": labels}], criterion)
    found = fisher_spectrum(loss, loss.net.theta, key=KEY, by="none", folds=0)
    rows = fs.per_sample_gradients(loss, loss.net.theta)[[0, 2]]
    assert (found.num_samples, found.num_unscored) == (2, 1)
    assert_close(float(found.global_trace.value), float(rows.square().sum() / 2))
    assert "1 sequence without a scored position left out." in found.notes
    with pytest.raises(ValueError, match="no position is scored"):
        fs.objective(loss.net, [{**batches[0], "labels": torch.full_like(ids, -100)}], criterion)
    bare = {**batches[0], "labels": torch.cat([torch.full_like(ids[:1], -100), labels[:1], labels[2:]])}
    with pytest.raises(ValueError, match="no position of the first `n_samples` sequences is scored"):
        fisher_spectrum(fs.objective(loss.net, [bare], criterion), loss.net.theta, key=KEY, n_samples=1)


def test_a_gradient_that_is_not_finite_is_named():
    loss = loss_of("mlp")
    rows = fs.per_sample_gradients(loss, loss.net.theta)
    rows[3, loss.layout.by_name["2.weight"].slice.start] = math.nan
    with pytest.raises(ValueError, match=r"the gradient of sample 3 in `2.weight` is not finite"):
        gradient_gram(rows, loss.layout)
    with pytest.raises(ValueError, match="is not finite"):
        fisher_spectrum(loss, torch.full_like(loss.net.theta, math.nan), key=KEY)
    with pytest.raises(ValueError, match="not finite at samples 0 and 1"):
        gram_spectrum(torch.tensor([[1.0, math.inf], [math.inf, 1.0]]), key=KEY)


@pytest.mark.parametrize(
    ("matrix", "text"),
    [
        (torch.ones(2, 3), "square and has a sample, got 2 x 3"),
        (torch.zeros(0, 0), "square and has a sample, got 0 x 0"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "has the eigenvalue -0.5: it is none of inner products"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(matrix, text):
    with pytest.raises(ValueError, match=text):
        gram_spectrum(matrix, key=KEY)


def test_other_arguments_that_make_no_sense_are_refused():
    gram = torch.eye(3)
    with pytest.raises(ValueError, match="`groups` must have a number for each of the 3 samples, got 2"):
        gram_spectrum(gram, key=KEY, groups=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="`num_parameters` must have 1 entries"):
        gram_spectrum(gram, key=KEY, num_parameters=[1, 2])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="`eigensolve_device` is 'cuda', and there is none"):
            gram_spectrum(gram, key=KEY, eigensolve_device="cuda")
    loss = loss_of("mlp")
    many = fisher_spectrum(loss, loss.net.theta, key=KEY, n_samples=99, folds=0)
    few = fisher_spectrum(loss, loss.net.theta, key=KEY, n_samples=6, folds=0, by="none")
    assert (many.num_samples, few.num_samples) == (7, 6)
    rows = fs.per_sample_gradients(loss, loss.net.theta)[:6]
    assert_close(float(few.global_trace.value), float(rows.square().sum() / 6))


# Gradients that are there already


def test_gradients_that_are_there_give_the_same_spectrum_as_rows_and_by_name():
    loss = loss_of("mlp")
    rows = fs.per_sample_gradients(loss, loss.net.theta)
    named = [loss.layout.unravel(row) for row in rows]
    wanted = fisher_spectrum(loss, loss.net.theta, key=KEY, folds=0)
    for given in (rows, named):
        grams = gradient_gram(given, loss.layout)
        assert grams.blocks == wanted.blocks
        found = gram_spectrum(grams, key=KEY, folds=0)
        assert_close(found.eigenvalues[:, :7], wanted.eigenvalues[:, :7], rtol=1e-9, atol=1e-11)
        assert_close(found.coupling_debiased, wanted.coupling_debiased, equal_nan=True)


@pytest.mark.parametrize("by_name", [True, False])
def test_gradients_of_another_layout_are_refused_by_name(by_name):
    layout, other = (Layout.of(seeded(0, lambda n=n: nn.Linear(2, n))) for n in (3, 4))
    rows = gradients(2, other.num)
    with pytest.raises(ValueError, match=r"`gradients\[0\]\['weight'\]` must have shape \(3, 2\), got \(4, 2\)" if by_name
                       else r"must have shape \(n, 9\).*got \(2, 12\)"):  # fmt: skip
        gradient_gram([other.unravel(row, cast=False) for row in rows] if by_name else rows, layout)
    with pytest.raises(ValueError, match="`gradients` is empty"):
        gradient_gram([] if by_name else rows[:0], layout)
    strange = [{"weight": torch.zeros(3, 2), "extra": torch.zeros(3)}]
    with pytest.raises(ValueError, match=r"unknown: \['extra'\], missing: \['bias'\]"):
        gradient_gram(strange, layout)


# Blocks of all Hugging Face families


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("gpt_neox", ["gpt_neox.layers.0", "gpt_neox.layers.1"]),
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("t5", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
    ],
)
def test_layers_of_every_family_are_blocks(name, layers):
    layout = Layout.of(seeded(0, CATALOGUE[name][0]))
    blocks = layout.blocks("layer")
    assert [block for block in blocks if block[-1].isdigit()] == layers
    rest = set(blocks) - set(layers)
    assert all(not any(ch.isdigit() for ch in block.rpartition(".")[2]) for block in rest)
    kinds = layout.group_of("module")
    assert {"attention", "mlp", "norm", "embedding"} <= set(kinds.values())
    if name == "llama":  # point 10 of the document
        assert {kinds[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up", "down")} == {"mlp"}


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.0.attention.weight", "model.layers.0"),
        ("transformer.h.3.mlp.weight", "transformer.h.3"),
        ("encoder.layer.12.output.dense.weight", "encoder.layer.12"),
        ("model.decoder.layers.5.fc1.weight", "model.decoder.layers.5"),
        ("decoder.block.5.layer.0.SelfAttention.q.weight", "decoder.block.5"),
    ],
)
def test_the_documented_names_are_in_their_layers(name, block):
    leaf = Leaf(name, (1,), torch.float32, 0, "Linear", None)
    assert Layout((leaf,)).group_of("layer") == {name: block}
