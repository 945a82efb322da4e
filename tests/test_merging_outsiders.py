"""mergekit and fusion_bench as oracles: what they keep and merge, and where they differ (bench/install_peers.sh).

Both come without their dependencies."""

import pytest
import torch
from problems import seeded
from torch.testing import assert_close

import funcscope as fs
from funcscope.weights import merge_rules as rules
from funcscope.weights.magnitude_cuts import global_cut, largest

pytestmark = [pytest.mark.outsider, pytest.mark.filterwarnings("ignore")]


def entries(k, num=40):
    return fs.normal(fs.fold_in(fs.key(11), k), torch.zeros(num))


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 1.0])
def test_trimming_of_one_tensor_is_that_of_mergekit(density):
    sparsify = pytest.importorskip("mergekit.sparsify")
    for k in range(5):
        theirs = sparsify.magnitude(entries(k), density)
        assert torch.equal(torch.where(largest(entries(k), density), entries(k), 0.0), theirs)


def test_ties_is_that_of_mergekit_where_no_election_is_even():
    """Its merge, from its own sparsification: the sum of weighted deltas elects, weights of those that agree divide."""
    sparsify = pytest.importorskip("mergekit.sparsify")
    base, weights = entries(9), torch.tensor([1.0, 2.0, 0.5])
    models = [base + entries(k) for k in range(3)]
    deltas = torch.stack([sparsify.magnitude(x - base, 0.25) for x in models]) * weights[:, None]
    elected = (deltas.sum(0) >= 0).float() * 2 - 1
    agree = deltas.sign() == elected
    divisor = (weights[:, None] * agree).sum(0)
    theirs = base + 0.7 * (deltas * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    assert_close(rules.ties(base, models, density=0.25, scale=0.7, weights=weights.tolist()), theirs)
    even = [torch.tensor([2.0]), torch.tensor([-2.0])]
    assert rules.ties(torch.zeros(1), even, density=1.0) == 0  # there: + is elected, and the mean is 2


def test_its_random_sparsification_keeps_the_length_and_not_the_mean():
    sparsify = pytest.importorskip("mergekit.sparsify")
    x = entries(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = sparsify.bernoulli(x, 0.5, sparsify.RescaleNorm.l1)
    assert_close(theirs.abs().sum(), x.abs().sum())
    ours = rules.dare(torch.zeros_like(x), [x], drop=0.5, key=fs.key(0), name="w")
    assert_close(ours[ours != 0], 2 * x[ours != 0])  # survivors over 1 - p, as in the paper


def fused(name):
    """A module of fusion_bench, from its package."""
    return pytest.importorskip(f"fusion_bench.method.{name}")


def models(num=3):
    return entries(9), [entries(9) + entries(k) for k in range(num)]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_ties_is_that_of_fusion_bench_which_keeps_one_entry_more(share):
    """Its threshold, taken over from AdaMerging's code, is the smallest of d - int(d K) magnitudes, and is kept itself."""
    peer = fused("ties_merging.ties_merging_utils")
    base, leaves = models()
    taus = torch.stack([x - base for x in leaves])
    kept = int(taus.shape[1] * share) + 1
    for k, row in enumerate(peer.topk_values_mask(taus, K=share)[0]):
        assert int((row != 0).sum()) == kept
        assert torch.equal(row, torch.where(largest(taus[k], kept / taus.shape[1]), taus[k], 0.0))
    theirs = base + 0.7 * peer.ties_merging(taus, reset_thresh=share, merge_func="mean")
    assert_close(rules.ties(base, leaves, density=kept / taus.shape[1], scale=0.7), theirs)
    as_in_the_paper = rules.ties(base, leaves, density=share, scale=0.7)
    assert not torch.allclose(as_in_the_paper, theirs)


def test_ties_over_a_whole_model_is_that_of_fusion_bench_leaf_by_leaf():
    peer = fused("ties_merging.ties_merging_utils")
    base, leaves = models()
    taus = torch.stack([x - base for x in leaves])
    theirs = base + peer.ties_merging(taus, reset_thresh=0.2, merge_func="mean")  # keeps 9 of 40
    cuts = [global_cut(lambda x=x: (x - base).split(25), 9 / 40) for x in leaves]
    first = rules.ties(base[:25], [x[:25] for x in leaves], cuts=cuts)
    behind = [cut.behind((x - base)[:25]) for cut, x in zip(cuts, leaves, strict=True)]
    second = rules.ties(base[25:], [x[25:] for x in leaves], cuts=behind)
    assert_close(torch.cat([first, second]), theirs)


def test_signs_that_are_even_are_elected_by_all_others_in_fusion_bench():
    peer = fused("ties_merging.ties_merging_utils")
    taus = torch.tensor([[2.0, 1.0, 3.0], [-2.0, 1.0, 0.5]])
    signs = peer.resolve_sign(taus)
    assert peer.disjoint_merge(taus, "mean", signs).tolist() == [2.0, 1.0, 1.75]
    assert rules.ties(torch.zeros(3), [*taus], density=1.0).tolist() == [0.0, 1.0, 1.75]


@pytest.mark.parametrize("scale", [0.3, -1.0])
def test_task_arithmetic_is_that_of_fusion_bench(scale):
    peer = fused("task_arithmetic")
    base, *tuned = (seeded(k, lambda: torch.nn.Linear(6, 4)) for k in range(4))
    named = {"_pretrained_": base} | {f"m{k}": each for k, each in enumerate(tuned)}
    merged = peer.TaskArithmeticAlgorithm(scaling_factor=scale, inplace=False).run(named)
    for name, leaf in merged.state_dict().items():
        ours = rules.task_arithmetic(base.state_dict()[name], [each.state_dict()[name] for each in tuned], scale)
        assert_close(ours, leaf)


@pytest.mark.parametrize("drop", [0.2, 0.9])
def test_survivors_of_a_random_drop_are_those_of_fusion_bench_scaled_up_alike(drop):
    """Masks are drawn by other generators: values of survivors are the same, and their number up to chance."""
    peer = fused("dare.utils")
    tau, num = entries(3, 20_000), 20_000
    param = torch.nn.Parameter(tau.clone())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer.param_random_drop_(param, drop, rescale=True)
    ours = rules.dare(torch.zeros_like(tau), [tau], drop=drop, key=fs.key(0), name="w")
    chance = 4 * (drop * (1 - drop) / num) ** 0.5
    for thinned in (param.detach(), ours):
        left = thinned != 0
        assert_close(thinned[left], tau[left] / (1 - drop))
        assert float(left.double().mean()) == pytest.approx(1 - drop, abs=chance)


@pytest.mark.parametrize("norm", [False, True])
def test_fisher_merging_is_that_of_fusion_bench_with_a_floor_in_our_units(norm):
    """Its floor is a number, ours a share of the mean; its `normalize` weighs a model by 1 over its Fisher's length."""
    peer = fused("fisher_merging.fisher_merging")
    leaves, fishers = [entries(k) for k in range(3)], [entries(20 + k).square() for k in range(3)]
    fishers = [(fisher > 0.5) * fisher for fisher in fishers]  # some of no use to anybody
    coefficients = [1.0, 2.0, 0.5]
    theirs = peer.merging_with_fisher_weights(
        {"w": leaves}, [{"w": fisher} for fisher in fishers], torch.tensor(coefficients), norm, 1e-6
    )["w"]
    lengths = [1 / (float(fisher.norm()) + 1e-6) if norm else 1.0 for fisher in fishers]
    weights = [w * length for w, length in zip(coefficients, lengths, strict=True)]
    assert_close(rules.fisher(leaves, fishers, weights, means=[1.0] * 3, floor=1e-6), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shrink", [0.0, 0.5, 0.9])
def test_regmean_is_that_of_fusion_bench(shrink):
    peer = fused("regmean.regmean")
    inputs = [entries(k, 60).view(12, 5).double() for k in range(3)]
    grams, leaves = [x.T @ x for x in inputs], [entries(30 + k, 15).view(3, 5).double() for k in range(3)]
    theirs = peer.merging_with_regmean_weights({"a.weight": leaves}, [{"a": gram} for gram in grams], shrink)
    ours = rules.regmean([leaf.T for leaf in leaves], grams, shrink=shrink)
    assert_close(ours.T, theirs["a.weight"])


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_spherical_interpolation_is_that_of_fusion_bench_of_tensors_that_are_not_parallel(t):
    peer = fused("slerp.slerp_utils")
    assert_close(rules.slerp(entries(1), entries(2), t), peer.slerp(t, entries(1), entries(2)), rtol=1e-5, atol=1e-6)
