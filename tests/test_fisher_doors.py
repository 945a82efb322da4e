"""Bad data and arguments of Fisher's functions: each ends in one clear line, or in a number that is right."""

import inspect
import math
import types
from dataclasses import replace

import pytest
import torch
from problems import loss_of, seeded
from torch import nn

import funcscope as fs
from funcscope.core.layout import View
from funcscope.curvature import ekfac_factors, gradient_norms, gram, gram_matvec, kfac_factors, natural_gradient
from funcscope.curvature.scored_sequences import sizes
from funcscope.documented import FisherSpectral, SpectralConfig
from funcscope.fisher import fisher_spectrum, head_part, head_views, mask_overlap, obd_saliency, pruning_mask
from funcscope.linalg import Kronecker
from funcscope.linalg.low_rank import SecondMoment

KEY, EYE = fs.key(0), torch.eye(2).double()
MODEL = seeded(0, lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))).double()
X, Y = seeded(1, lambda: (torch.randn(5, 4).double(), torch.randint(0, 3, (5,))))
NET = fs.functional(MODEL)
NUM, THETA, LAYOUT = NET.layout.num, NET.theta, NET.layout


def scored(x=X, y=Y, criterion=fs.classification):
    return fs.objective(NET, [(x, y)], criterion)


LOSS = scored()
((INPUTS, LABELS),) = LOSS.batches
UNSCORED = {
    "labels": replace(LOSS, batches=((INPUTS, LABELS._replace(weight=0 * LABELS.weight)),)),
    "criterion": scored(criterion=fs.custom(lambda out, y: (out[:, 0].square(), 0 * out[:, 0].detach()))),
}
WAYS = {
    "kfac_factors": lambda loss, theta=THETA: kfac_factors(loss, theta, labels="data"),
    "ekfac_factors": lambda loss, theta=THETA: ekfac_factors(loss, theta, labels="data"),
    "gram": lambda loss, theta=THETA: gram(loss, theta),
    "gradient_norms": lambda loss, theta=THETA: gradient_norms(loss, theta),
    "gram_matvec": lambda loss, theta=THETA: gram_matvec(loss, theta)(torch.ones(5).double()),
    "fisher_spectrum": lambda loss, theta=THETA: fisher_spectrum(loss, theta, key=KEY, folds=0),
}
every = pytest.mark.parametrize("way", WAYS)


@every
@pytest.mark.parametrize("kind", UNSCORED)
def test_data_of_which_nothing_is_scored_are_refused(way, kind):
    with pytest.raises(ValueError, match=r"no position is scored: .* every weight is 0"):
        WAYS[way](UNSCORED[kind])


def test_tokens_of_which_none_is_scored_are_refused_and_a_batch_without_any_is_not():
    with pytest.raises(ValueError, match="no position is scored"):
        gram(UNSCORED["labels"], THETA, unit="token")
    more = fs.objective(NET, [(X, Y), (X, torch.full((5,), -100))], fs.classification)
    torch.testing.assert_close(gram(more, THETA, unit="token").total, gram(LOSS, THETA).total)
    torch.testing.assert_close(
        kfac_factors(more, THETA, labels="data").matvec(THETA), kfac_factors(LOSS, THETA, labels="data").matvec(THETA)
    )


def test_a_gradient_of_zero_at_scored_positions_is_a_number():
    flat = scored(criterion=fs.custom(lambda out, y: 0 * out[:, 0]))
    assert not gram(flat, THETA).total.any()
    assert float(kfac_factors(flat, THETA, labels="data").trace) == 0


@every
def test_a_gradient_that_is_not_finite_has_its_sample_and_parameter(way):
    x = X.clone()
    x[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"the gradient of sample 2 in `\d\.(weight|bias)` is not finite"):
        WAYS[way](scored(x))
    theta = THETA.clone()
    theta[3] = math.nan
    with pytest.raises(ValueError, match=r"the gradient of sample 0 in `\d\.(weight|bias)` is not finite"):
        WAYS[way](LOSS, theta)


def test_sequences_that_see_each_other_have_no_product_with_their_gram():
    model = seeded(0, lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))).double()
    loss = fs.objective(fs.functional(model), [(X, Y)], fs.classification)
    with pytest.raises(ValueError, match="see each other"):
        gram_matvec(loss, loss.net.theta)


@every
def test_wrong_points_are_refused(way):
    with pytest.raises(ValueError, match="`theta` must be a flat vector of shape"):
        WAYS[way](LOSS, THETA[1:])


def test_one_sample_and_identical_samples_are_right():
    one, same = scored(X[:1], Y[:1]), scored(X[:1].repeat(5, 1), Y[:1].repeat(5))
    square = gram(one, THETA).total
    torch.testing.assert_close(gram(same, THETA).total, square.expand(5, 5))
    torch.testing.assert_close(gram_matvec(same, THETA)(torch.ones(5).double()), 5 * square.expand(5, 1)[:, 0])
    for way in (kfac_factors, ekfac_factors):
        a, b = (way(loss, THETA, labels="data") for loss in (one, same))
        torch.testing.assert_close(a.matvec(THETA), b.matvec(THETA))
        torch.testing.assert_close(a.trace, square[0, 0])


def test_vectors_of_another_dtype_come_back_in_their_own():
    for way in (kfac_factors, ekfac_factors):
        kfac = way(LOSS, THETA, labels="data")
        for act in (kfac.matvec, lambda v, kfac=kfac: kfac.solve(v, 0.1), lambda v, kfac=kfac: kfac.quadratic(v)):
            torch.testing.assert_close(act(THETA.float()).double(), act(THETA), rtol=1e-5, atol=1e-5)
        assert kfac.matvec(THETA.float()).dtype == torch.float32


KFAC = kfac_factors(LOSS, THETA, labels="data")
MASK = torch.arange(NUM) < 20
KRON = Kronecker(SecondMoment(EYE), SecondMoment(torch.eye(3).double()), 1.0)
loose = inspect.unwrap


def blocks(*views, way=gram):
    return loose(way)(LOSS, THETA, by={"a": list(views)})


def heads(**config):
    return head_views(LAYOUT, types.SimpleNamespace(**config))


def overlap(first, second=MASK, layout=LAYOUT, **options):
    return loose(mask_overlap)(first, second, layout, **options)


def pruned(score=THETA, layout=LAYOUT, sparsity=0.5, **options):
    return loose(pruning_mask)(score, layout, sparsity=sparsity, **options)


def documented(*args, **options):
    return FisherSpectral().compute_fisher_spectrum(MODEL, *args, **options)


CASES = {
    "a negative damping": (lambda: KFAC.solve(THETA, -1.0), "`damping` must be a finite number of at least 0, got -1.0"),
    "a damping of nan": (lambda: KFAC.quadratic(THETA, damping=math.nan), "`damping` must be a finite"),
    "a negative relative damping": (lambda: KFAC.absolute(-1.0), "`damping` must be a finite"),
    "a determinant with less": (lambda: KFAC.logdet(-1.0), "`damping` must be a finite"),
    "a power of nan": (lambda: KFAC.power(THETA, math.nan, 1.0), "`p` must be a finite number, got nan"),
    "a form of no power": (lambda: KFAC.quadratic(THETA, power=math.inf), "`power` must be a finite number"),
    "no damping of a singular F": (lambda: KFAC.solve(THETA, 0.0), "above 0 for a negative power"),
    "a damping of nan for a diagonal": (
        lambda: natural_gradient(KFAC.diagonal(), THETA, damping=math.nan), "finite, at least 0",
    ),
    "a negative shift of a product": (lambda: KRON.power(torch.ones(3, 2).double(), -1.0, -1.0), "`damping` must be"),
    "a product's negative pi": (lambda: KRON.pi_shifts(-1.0), "`damping` must be"),
    "a matrix of another shape": (lambda: KRON.pi_power(EYE, 1.0, 0.0), r"shape \(3, 2\), got \(2, 2\)"),
    "an inverse of a singular product": (
        lambda: Kronecker(SecondMoment(EYE), SecondMoment(0 * EYE), 1.0).power(EYE, -1.0, 0.0), "singular product",
    ),
    "no row at once": (lambda: ekfac_factors(LOSS, THETA, labels="data", chunk_size=0), "`chunk_size` must be"),
    "no block": (lambda: gram(LOSS, THETA, by={}), "at least one each, and 'by' has none"),
    "a block without views": (lambda: blocks(), "at least one each, and 'a' has none"),
    "a view of another model": (lambda: blocks(View("1.weight", 0, slice(2))), "`net.layout.names`"),
    "a dimension that is not there": (lambda: blocks(View("0.weight", 2, slice(2))), r"its shape is \(6, 4\)"),
    "a dimension from the end": (lambda: blocks(View("0.weight", -1, slice(2))), "cuts dimension -1"),
    "rows that are not there": (lambda: blocks(View("0.weight", 0, slice(9, 12)), way=gradient_norms), "has no entry"),
    "a mask of integers": (lambda: overlap(MASK.long()), "`first` must be a mask .* of torch.bool, got .* of torch.int64"),
    "a mask of numbers": (lambda: overlap(MASK, MASK.float()), "`second` must be a mask .*, got .* of torch.float32"),
    "a mask of a few": (lambda: overlap(MASK[1:]), "`first` must be a mask of 51 parameters"),
    "a net for a layout": (lambda: overlap(MASK, MASK, NET), "`layout` must be a Layout, got a Functional"),
    "masks by views of nothing": (lambda: overlap(MASK, by={"a": [View("x", 0, slice(2))]}), "`net.layout.names`"),
    "a net for a layout of scores": (lambda: pruned(layout=NET), "`net.layout`"),
    "a sparsity of nan": (lambda: pruned(sparsity=math.nan), "`sparsity` must be a finite number in"),
    "scores of integers": (lambda: pruned(THETA.long()), "`score` must hold floating-point"),
    "a negative Fisher": (lambda: obd_saliency(-THETA.abs(), THETA), "no entry that is negative or nan"),
    "a Fisher of nan": (lambda: obd_saliency(THETA * math.nan, THETA), "no entry that is negative or nan"),
    "a Fisher of another length": (lambda: loose(obd_saliency)(THETA[1:].abs(), THETA), "`fisher` must be a flat vector"),
    "true heads": (lambda: heads(num_attention_heads=True), "`num_attention_heads` of at least 1, got True"),
    "negative heads of keys": (
        lambda: heads(num_attention_heads=4, num_key_value_heads=-2), "`num_key_value_heads` of at least 1, got -2",
    ),
    "a module for its heads": (lambda: loose(head_views)(MODEL, None), "`functional\\(model\\)`"),
    "a number for a block": (lambda: loose(head_part)(3), "take `head_views`"),
    "heads of an MLP": (lambda: gram(LOSS, THETA, by="head"), "take 'layer', or views by name"),
    "no batch": (lambda: documented(), "give a `batch`"),
    "labels that are ignored": (lambda: documented((X, torch.full((5,), -100))), "no position is scored"),
    "an empty batch": (lambda: documented((X[:0], Y[:0])), "hold no sequence"),
    "all gradients but one": (
        lambda: documented(n_samples=-1, precomputed_gradients=torch.ones(3, NUM)), "`n_samples` must be an integer",
    ),
    "no eigenvalue": (lambda: SpectralConfig(top_k_eigenvalues=0), "`top_k_eigenvalues` must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_requests_get_one_clear_line(case):
    with pytest.raises((ValueError, TypeError), match=CASES[case][1]) as raised:
        CASES[case][0]()
    assert "\n" not in str(raised.value)


def test_what_the_refused_lack_is_enough():
    """The control: the same requests without what is wrong pass."""
    assert KFAC.solve(THETA, 1.0).isfinite().all()
    assert KRON.power(torch.ones(3, 2).double(), -1.0, 1.0).tolist() == [[0.5, 0.5]] * 3
    assert gram(LOSS, THETA, by={"a": [View("0.weight", 0, slice(4, 12))]}).total.any()  # ends past the last row
    assert overlap(MASK).total_jaccard == 1
    assert documented((X, Y), n_samples=99)["metadata"]["n_samples_used"] == 5  # as many as there are


@pytest.mark.parametrize(
    "name", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt_neox", "t5", "bert"))]
)
def test_blocks_by_head_are_heads_and_what_is_left_of_every_layer(name):
    loss = loss_of(name)
    theta = loss.net.theta
    one = gram(loss, theta, by="head")
    named = head_views(loss.layout, loss.net._skeleton.config)
    assert one.blocks[: len(named)] == list(named)
    # every coordinate once: blocks add up to the whole, and those of a layer to the layer
    layers = gram(loss, theta, by="layer")
    torch.testing.assert_close(one.total, layers.total)
    assert sum(sizes(loss.layout, "head")) == loss.layout.num
    if name == "gpt2":
        inside = [block for block in one.blocks if block.startswith("transformer.h.0")]
        assert len(inside) == 2 * 4 + 1
        torch.testing.assert_close(sum(one.block(block) for block in inside), layers.block("transformer.h.0"))
