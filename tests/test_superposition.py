"""Superposition and sparsity. Oracles: dense n x n matrices, closed forms, numpy, the toy model of superposition."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_circuits import net_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.keys import fold_in, uniform
from funcscope.representation import (
    class_sums,
    effective_features,
    feature_dimensionality,
    feature_matrices,
    feature_overlap,
    gini,
    gini_reference,
    hoyer,
    hoyer_reference,
    mean_abs_coordinate,
    sparsity,
    superposition,
    welch_bound,
)
from funcscope.representation.selectivity import selectivity
from funcscope.representation.sparsity import sparsity_of, sparsity_sums


def random(n, m, seed=0):
    return fs.normal(fs.key(seed), torch.zeros(n, m, dtype=torch.float64))


def off_diagonal(w):
    unit = w / w.norm(dim=1, keepdim=True)
    return (unit @ unit.T).abs()[~torch.eye(len(w), dtype=torch.bool)]


@settings(deadline=None, max_examples=20)
@given(n=st.integers(2, 12), m=st.integers(1, 6), seed=st.integers(0, 10**6), chunk=st.integers(1, 12))
def test_overlaps_and_dimensionalities_are_those_of_dense_matrices(n, m, seed, chunk):
    w = random(n, m, seed)
    found, cosines = feature_overlap(w, chunk=chunk), off_diagonal(w)
    assert_close(torch.tensor(found[:3]), torch.stack([cosines.mean(), cosines.square().mean(), cosines.max()]).float())
    unit = w / w.norm(dim=1, keepdim=True)
    each = w.square().sum(1) / (unit @ w.T).square().sum(1)
    assert_close(feature_dimensionality(w), each)
    assert_close(feature_dimensionality(1e-120 * w), each)
    assert each.sum() <= min(n, m) + 1e-9
    assert found.largest >= welch_bound(n, m) - 1e-12
    squares = w.square().sum(1)
    assert math.isclose(effective_features(w), float(squares.sum() ** 2 / squares.square().sum()))


def test_random_directions_have_the_overlap_that_is_said_of_them():
    m = 100
    found = feature_overlap(random(1500, m))
    pairs = 1500 * 1499 / 2
    assert abs(found.mean_square * m - 1) < 5 * 2**0.5 / pairs**0.5  # pairs of independent directions are independent
    exact = mean_abs_coordinate(m)
    assert abs(found.mean / exact - 1) < 5 * 0.76 / pairs**0.5
    assert abs(exact / math.sqrt(2 / (math.pi * m)) - 1) < 1 / m
    assert abs(exact / math.sqrt(2 / (math.pi * m)) - 1) > 1e-3  # asymptotic only


def test_welch_is_reached_by_simplices_and_bounds_the_largest_not_the_mean():
    for m in (2, 3, 7):
        simplex = torch.eye(m + 1, dtype=torch.float64) - 1 / (m + 1)
        basis = torch.linalg.svd(simplex).Vh[:m]
        found = feature_overlap(simplex @ basis.T)
        assert math.isclose(found.largest, welch_bound(m + 1, m), rel_tol=1e-12)
        assert math.isclose(found.largest, 1 / m, rel_tol=1e-12)
    orthogonal_and_copy = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 3]]
    found = feature_overlap(orthogonal_and_copy)
    assert found.mean < welch_bound(5, 4) < found.largest  # of the mean it would be no bound


def test_mistake_10_the_documented_test_rejects_the_random_directions_that_it_is_to_find():
    d = 100
    mean = feature_overlap(random(1500, d)).mean
    assert not abs(mean * d**0.5 - 1) < 0.2  # documented: follows_sqrt_scaling
    found = superposition({"random": random(1500, d)})
    assert abs(float(found.mean_overlap / found.random_overlap) - 1) < 0.01
    welch = float(found.welch)
    assert mean / welch < 1  # the documented ratio of mean and bound, below 1 for what Welch's bound holds for
    assert float(found.largest_overlap) / welch > 1


def test_mistake_9_an_orthogonal_matrix_is_in_no_strong_superposition():
    q = torch.linalg.qr(random(8, 8)).Q
    found = superposition({"orthogonal": q})
    documented = found.square_ratio < 3  # m E cos^2 < 3
    assert documented
    assert_close(found.square_ratio, torch.zeros(1, dtype=torch.float64))
    assert_close(found.dimensionality, torch.full((1,), 8.0, dtype=torch.float64))  # every feature has a dimension
    assert_close(found.feature_dimensionality, torch.ones(1, 8, dtype=torch.float64))
    assert_close(found.index, torch.ones(1, dtype=torch.float64))
    # the documented rule of regimes looks at |phi_half - m / n| < 0.1 first: "none" for n near m, whatever the features are
    same = superposition({"same": torch.ones(8, 8, dtype=torch.float64)})
    assert abs(float(same.phi_half) - 8 / 8) < 0.1
    assert_close(same.dimensionality, torch.ones(1, dtype=torch.float64))  # eight features in one dimension


def test_mistake_8_a_low_rank_is_no_superposition():
    low, full = random(200, 3) @ random(3, 20, 1), random(200, 20, 2)

    def documented(x):  # D over the effective rank of at most 50 singular values
        s = torch.linalg.svdvals(x)[:50]
        return x.shape[1] / float(torch.special.entr(s / s.sum()).sum().exp())

    assert documented(low) > 6 > 1.2 > documented(full)
    found = superposition({"few": low[:3], "low": low, "full": full})
    assert found.rank.tolist() == [3, 3, 20]
    assert_close(found.num_features / found.rank, torch.tensor([1.0, 200 / 3, 10.0]), rtol=1e-6, atol=0)
    assert (found.dimensionality <= found.rank + 1e-9).all()  # three features in rank 3 are not superposed


def test_mistake_7_a_projection_must_not_be_rescaled():
    dims, k = 256, 128
    q = torch.linalg.qr(random(dims, k)).Q
    x = random(500, dims, 1)

    def lost(back):
        return float((x - back).square().sum() / x.square().sum())

    scaled = (2 / k) ** 0.5 * q
    assert lost(x @ scaled @ scaled.T) > 0.97  # documented: "reconstruction quality"
    held = float(feature_dimensionality(scaled.T).sum()) / dims  # does not depend on the scale
    assert math.isclose(held, k / dims, rel_tol=1e-9)
    assert abs(lost(x @ q @ q.T) - (1 - held)) < 0.01


def test_mistake_11_probes_of_random_labels_find_something_in_nothing():
    x, labels = random(60, 40), (uniform(fs.key(5), torch.zeros(20, 60)) > 0.5).long()
    train, test = slice(0, 40), slice(40, 60)
    accuracies = []
    for row in labels:
        fit = torch.linalg.lstsq(x[train], 2.0 * row[train, None].double() - 1).solution[:, 0]
        accuracies.append(float(((x[test] @ fit > 0).long() == row[test]).double().mean()))
    documented = sum(max(each, 0.5) for each in accuracies) / 20
    assert max(accuracies) > 0.6  # the largest of test evaluations
    assert documented > 0.52
    p = [float(selectivity({"x": x}, row, key=fs.key(i)).p_value) for i, row in enumerate(labels)]
    assert 0.35 < sum(p) / 20 < 0.7  # of nothing: uniform on 1/20 ... 1


def test_repeated_rows_count_as_effective_features_and_not_in_the_dimensionality():
    found = superposition({"same": torch.ones(30, 4, dtype=torch.float64)})
    assert_close(found.index, torch.full((1,), 7.5, dtype=torch.float64))
    assert found.rank.tolist() == [1]
    assert_close(found.dimensionality, torch.ones(1, dtype=torch.float64))


def test_tight_frames_reach_the_rank_and_others_do_not():
    angles = torch.arange(5, dtype=torch.float64) * math.pi / 5
    frame = torch.stack([angles.cos(), angles.sin()], 1)  # five lines of the plane
    both = torch.block_diag(
        frame, torch.full((3, 1), 0.3, dtype=torch.float64)
    )  # and three copies of a third direction
    assert_close(feature_dimensionality(both).sum(), torch.tensor(3.0, dtype=torch.float64))
    assert_close(feature_dimensionality(both)[:5], torch.full((5,), 0.4, dtype=torch.float64))
    assert feature_dimensionality(random(8, 3)).sum() < 2.99


def test_norm_scales_decide_phi_and_features_per_dimension():
    w = torch.diag(torch.tensor([1.0, 1.0, 0.6, 0.4, 3.0], dtype=torch.float64))
    own, toy = superposition({"w": w}), superposition({"w": 10 * w}, norm_scale=1.0)
    assert own.norm_scale.tolist() == [1.0]
    assert own.phi_half.tolist() == [0.8]
    assert own.phi_one.tolist() == [0.2]
    assert_close(own.features_per_dim, torch.tensor([(1 + 1 + 0.36 + 0.16 + 9) / 5], dtype=torch.float64))
    assert toy.phi_one.tolist() == [1.0]
    again = superposition({"w": 10 * w})
    assert again.phi_half.tolist() == [0.8]  # by the median norm the unit of the weights is nothing


def test_rows_of_zeros_have_no_direction_and_no_dimension():
    w = torch.cat([random(4, 3), torch.zeros(2, 3, dtype=torch.float64)])
    found = superposition({"w": w})
    assert found.num_features.tolist() == [4]
    assert_close(found.mean_overlap, off_diagonal(w[:4]).mean()[None])
    assert found.feature_dimensionality[0, 4:].tolist() == [0, 0]
    nothing = superposition({"w": torch.zeros(3, 2)})
    assert nothing.dimensionality.tolist() == [0]
    assert nothing.mean_overlap.isnan().all()


def test_superposition_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"weights\['w'\].* finite"):
        superposition({"w": torch.full((2, 2), math.nan)})
    with pytest.raises(ValueError, match="matrix by name"):
        superposition({})
    with pytest.raises(ValueError, match="`norm_scale`"):
        superposition({"w": torch.ones(2, 2)}, norm_scale=0.0)


@pytest.mark.parametrize("line", ["gpt2", "llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_matrices_of_a_transformer_are_those_of_its_sites(line):
    net = net_of(line)
    found = feature_matrices(net, net.params)
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]])}
    seen = fs.trace(net, net.params, inputs, ["mlp_post", "mlp_out", "tok_embed", "logits"])
    for layer in range(2):
        w = found[f"mlp_out.{layer}"]
        one, other = seen[f"mlp_post.{layer}"][0, :2]
        first, second = seen[f"mlp_out.{layer}"][0, :2]
        assert_close((one - other) @ w, first - second, rtol=1e-5, atol=1e-7)  # without the bias
    assert_close(found["embedding"][[1, 2, 3, 4]], seen["tok_embed"][0])
    if line == "gpt2":
        assert "unembedding" not in found  # tied
    elif line == "llama":
        final = fs.trace(net, net.params, inputs, ["final"])["final"]
        assert_close(final @ found["unembedding"].T, seen["logits"], rtol=1e-5, atol=1e-7)


@cache
def toy_model(density, n=20, m=5, steps=1000):
    """W (n, m) of the toy model: x in [0, 1] with probability `density`, else 0; loss |x - relu(W W' x + b)|^2."""
    w = (0.3 * fs.normal(fs.key(0), torch.zeros(n, m))).requires_grad_()
    b = torch.zeros(n, requires_grad=True)
    optimiser = torch.optim.Adam([w, b], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x, there = (torch.rand(256, n, generator=generator) for _ in range(2))
        x = x * (there < density)
        loss = (torch.relu(x @ w @ w.T + b) - x).square().sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        optimiser.step()
    return w.detach()


def test_features_of_the_toy_model_lie_at_their_plateaus():
    half = superposition({"toy": toy_model(0.3)}, norm_scale=1.0)
    each = half.feature_dimensionality[0].sort().values
    assert each[:10].max() < 0.02  # not represented
    assert (each[10:] - 0.5).abs().max() < 0.03  # in antipodal pairs: Elhage et al.'s plateau at 1/2
    assert abs(float(half.dimensionality) - 5) < 0.02
    assert abs(float(half.features_per_dim) - 2) < 0.15
    assert half.phi_half.tolist() == [0.5]


@pytest.mark.slow
def test_sparser_features_are_all_there_and_share_equally():
    found = superposition({"toy": toy_model(0.05, steps=3000)}, norm_scale=1.0)
    assert (found.feature_dimensionality - 5 / 20).abs().max() < 0.03
    assert found.phi_half.tolist() == [1.0]
    assert abs(float(found.dimensionality) - 5) < 0.05
    assert float(found.index) > 3.5


# Sparsity


@settings(deadline=None, max_examples=25)
@given(num=st.integers(2, 30), seed=st.integers(0, 10**6))
def test_gini_is_the_mean_difference_of_pairs_and_hoyer_a_ratio_of_norms(num, seed):
    x = random(1, num, seed)[0]
    size = np.abs(x.numpy())
    pairs = np.abs(size[:, None] - size).sum() / (2 * num**2 * size.mean())
    assert math.isclose(float(gini(x)), pairs, rel_tol=1e-9)
    assert math.isclose(float(gini(-3 * x)), pairs, rel_tol=1e-9)
    ratio = (num**0.5 - np.linalg.norm(x.numpy(), 1) / np.linalg.norm(x.numpy())) / (num**0.5 - 1)
    assert math.isclose(float(hoyer(x)), ratio, rel_tol=1e-9, abs_tol=1e-12)
    assert -1e-12 <= float(hoyer(x)) <= 1 + 1e-12


def test_gaussian_vectors_have_the_references():
    for num in (5, 50, 1000):
        x = fs.normal(fold_in(fs.key(0), num), torch.zeros(1500, num, dtype=torch.float64))
        stderr = float(hoyer(x).std()) / 1500**0.5
        assert abs(float(hoyer(x).mean()) - hoyer_reference(num)) < 4 * stderr
        assert abs(float(gini(x).mean()) - gini_reference(num)) < 4 * float(gini(x).std()) / 1500**0.5 + 0.1 / num
    assert abs(float(gini(x).mean()) - (math.sqrt(2) - 1)) < 2e-3
    assert gini_reference(1000) > 0.3  # "above 0.3 is concentrated" calls noise so


def test_sparsity_is_a_mean_over_real_tokens_with_errors_over_sequences():
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    x = fs.normal(fs.key(0), torch.zeros(3, 3, 6, dtype=torch.float64))
    x[0, 0] = 0.0
    x[2, 0, 1:] = 0.0
    x[~mask] = math.nan
    found = sparsity({"a": x}, mask)
    rows = [x[i][mask[i]] for i in range(3)]
    some = [row[(row != 0).any(1)] for row in rows]
    sums, counts = torch.stack([gini(row).sum() for row in some]), torch.tensor([2.0, 1.0, 2.0]).double()
    assert_close(found.gini[0], sums.sum() / 5)
    rest = sums - found.gini[0] * counts
    assert_close(found.gini_stderr[0], (1.5 * rest.square().sum()).sqrt() / 5)
    assert_close(found.hoyer[0], torch.cat([hoyer(row) for row in some]).mean())
    assert found.num_zero.tolist() == [1]
    active = [(row.abs() > 1e-2 * row.square().mean(1, keepdim=True).sqrt()).double().mean(1) for row in rows]
    assert_close(found.active[0], torch.cat(active).mean())
    assert found.num_tokens == 6
    split = sparsity_of({"a": sparsity_sums(x[:1], mask[:1]).merge(sparsity_sums(x[1:], mask[1:]))})
    assert_close(split.gini_stderr, found.gini_stderr)
    assert_close(split.hoyer, found.hoyer)


def test_sparsity_refuses_no_token_and_one_unit():
    with pytest.raises(ValueError, match="no token"):
        sparsity({"a": torch.ones(1, 2, 3)}, torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least 2"):
        hoyer(torch.ones(3, 1))


# Selectivity


def test_class_means_stream():
    x, labels, groups = random(50, 4), torch.arange(50) % 3, torch.arange(50) // 5
    whole = class_sums(x, labels, 3, groups=groups)
    parts = [class_sums(x[i], labels[i], 3, groups=groups[i]) for i in (slice(0, 20), slice(20, 50))]
    both = parts[0].merge(parts[1])
    assert_close(both.totals, whole.totals)
    assert_close(both.counts, whole.counts)
    dense = torch.stack([x[labels == c].abs().sum(0) for c in range(3)])
    assert_close(whole.totals.sum(0), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_rank_of_many_rows_is_that_of_the_weights_and_not_of_their_rounding(dtype):
    """The number of rows times eps is above 1 for a vocabulary in half precision: by that no singular value counts."""
    many = fs.normal(fs.key(0), torch.zeros(4000, 12, dtype=torch.float64))
    low = many[:, :5] @ fs.normal(fs.key(1), torch.zeros(5, 12, dtype=torch.float64))
    found = superposition({"many": many.to(dtype), "low": low.to(dtype)})
    assert found.rank.tolist() == [12, 5]
    assert (found.dimensionality <= 12 + 1e-9).all()


def test_the_median_of_an_even_number_of_norms_is_between_the_middle_ones():
    found = superposition({"four": torch.diag(torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64))})
    assert (float(found.norm_scale), float(found.phi_one)) == (3.0, 0.5)


def test_dimensions_and_matrices_that_there_are_none_of_are_named():
    for call in (lambda: mean_abs_coordinate(0), lambda: welch_bound(3, 0)):
        with pytest.raises(ValueError, match="`m` must be an integer of at least 1, got 0"):
            call()
    with pytest.raises(ValueError, match=r"must be a matrix of feature vectors, got the shape .0, 3."):
        superposition({"none": torch.zeros(0, 3)})
