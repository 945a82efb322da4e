"""mergekit as an oracle: what its sparsification keeps, and where its merges differ (`pip install --no-deps mergekit`)."""

import pytest
import torch
from torch.testing import assert_close

import funcscope as fs
from funcscope.weights import merge_rules as rules
from funcscope.weights.magnitude_cuts import largest

pytestmark = pytest.mark.outsider


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
