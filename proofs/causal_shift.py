"""exhaustive and identity: only the shifted cross-entropy needs a model of the language

Claim: Scored against the next token, the expected cross-entropy of a predictor of next tokens has its only minimum at
    the source's conditional distribution, and a predictor that copies its input is strictly worse. Scored against the
    token itself, copying with error e costs -log(1 - e) for every source, which tends to 0, the least value there is;
    the true conditional costs more.
Function: funcscope.core.criterion.causal_lm
Size: vocabulary 2; all sequences of lengths 2 to 5 of one Markov source with rational probabilities; every predictor
    with probabilities in (0, 1) that sees the prefix; errors e of 1/3, 1/8 and 1/100. The cost of copying: every
    Markov source.
Assumptions: the source does not itself repeat its last token with probability 1 - e in every state.
Not covered: larger vocabularies, longer sequences, other sources; what training finds.
"""

from fractions import Fraction
from itertools import pairwise, product
from math import lcm, log, prod

import pytest
import sympy as sp
import torch

from funcscope.core.criterion import causal_lm, masked_lm

START = (Fraction(1, 3), Fraction(2, 3))
STEP = ((Fraction(1, 4), Fraction(3, 4)), (Fraction(2, 3), Fraction(1, 3)))
ERRORS = (Fraction(1, 3), Fraction(1, 8), Fraction(1, 100))
LENGTHS = (2, 3, 4, 5)


def sequences(length):
    return list(product((0, 1), repeat=length))


def probability(x, start=START, step=STEP):
    return start[x[0]] * prod(step[a][b] for a, b in pairwise(x))


def truth(prefix):
    return STEP[prefix[-1]]


def copying(error):
    return lambda prefix: tuple(1 - error if token == prefix[-1] else error for token in (0, 1))


def likelihood(model, x, shift):
    """Probability that the model's outputs give to the tokens that they are scored against."""
    return prod(model(x[: t + 1])[x[t + shift]] for t in range(len(x) - shift))


def expected_loss(model, length, shift):
    total = sum(float(probability(x)) * log(likelihood(model, x, shift)) for x in sequences(length))
    return -total / (length - shift)


def better(model, other, length, shift, step=STEP):
    """Whether the model's expected loss is the smaller: exact, as exp(-loss) to the power of a common denominator."""
    weights = {x: probability(x, step=step) for x in sequences(length)}
    scale = lcm(*(weight.denominator for weight in weights.values()))
    ratios = {x: likelihood(model, x, shift) / likelihood(other, x, shift) for x in weights}
    powers = [(ratios[x], int(scale * weight)) for x, weight in weights.items()]
    return prod(r.numerator**n for r, n in powers) > prod(r.denominator**n for r, n in powers)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
def test_shifted_loss_has_its_only_minimum_at_the_true_conditional(length):
    prefixes = [prefix for t in range(1, length) for prefix in sequences(t)]
    ahead = {prefix: sp.Symbol("q" + "".join(map(str, prefix)), positive=True) for prefix in prefixes}
    assert sum(map(probability, sequences(length))) == 1
    loss = -sum(
        sp.Rational(probability(x)) * sp.log(ahead[x[:t]] if x[t] else 1 - ahead[x[:t]])
        for x in sequences(length)
        for t in range(1, length)
    )
    for prefix, q in ahead.items():  # the slope in q holds no other q, and changes its sign once, from - to +
        weight, p = sp.Rational(probability(prefix)), sp.Rational(truth(prefix)[1])
        slope = sp.diff(loss, q)
        assert weight > 0
        assert sp.cancel(slope - weight * (q - p) / (q * (1 - q))) == 0
        assert sp.cancel(slope - weight * (q - prefix[-1]) / (q * (1 - q))) != 0  # negative control: not at copying


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("length", LENGTHS)
def test_copying_is_worse_when_shifted_and_better_when_not(length, error):
    assert better(truth, copying(error), length, shift=1)
    assert better(copying(error), truth, length, shift=0)  # negative control: unshifted, the order turns round


def test_copying_is_optimal_where_the_source_repeats_itself():  # negative control: the assumption is needed
    error = Fraction(1, 8)
    sticky = ((1 - error, error), (error, 1 - error))
    assert better(copying(error), truth, 4, shift=1, step=sticky)
    assert not better(lambda prefix: sticky[prefix[-1]], copying(error), 4, shift=1, step=sticky)


@pytest.mark.parametrize("length", LENGTHS)
def test_unshifted_loss_of_copying_knows_no_source_and_tends_to_0(length):
    s, a, b, e = sp.symbols("s a b e", positive=True)
    start, step = (1 - s, s), ((1 - a, a), (b, 1 - b))
    copy = copying(e)
    loss = sum(
        -probability(x, start, step) * sp.log(copy(x[: t + 1])[x[t]]) for x in sequences(length) for t in range(length)
    )
    assert sp.expand(loss / length + sp.log(1 - e)) == 0
    assert sp.limit(-sp.log(1 - e), e, 0) == 0
    assert sp.expand(loss / length + sp.log(1 - 2 * e)) != 0  # negative control


# Bridges: the shipped criterion on all sequences at once, a model's logits being the logarithms of its probabilities.


def logits(model, ids):
    rows = [[[log(p) for p in model(tuple(x[: t + 1]))] for t in range(len(x))] for x in ids.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def shipped_loss(criterion, batch, model, ids):
    _, targets = criterion.prepare(batch)
    loss, weight = criterion.token_loss(logits(model, ids), targets)
    chance = torch.tensor([float(probability(x.tolist())) for x in ids], dtype=torch.float64)
    return float(chance @ (loss * weight).sum(1) / (chance @ weight.double().sum(1)))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("length", LENGTHS)
def test_shipped_causal_lm_is_the_enumerated_shifted_loss(length, error):
    ids = torch.tensor(sequences(length))
    models = (truth, copying(error))
    shifted = [shipped_loss(causal_lm, ids, model, ids) for model in models]
    assert shifted == pytest.approx([expected_loss(model, length, shift=1) for model in models], rel=1e-13)
    assert shifted[0] < shifted[1]
    own = {"input_ids": ids, "labels": ids}  # negative control: `masked_lm` pairs each output with its own token
    unshifted = [shipped_loss(masked_lm, own, model, ids) for model in models]
    assert unshifted == pytest.approx([expected_loss(truth, length, shift=0), -log(1 - error)], rel=1e-13)
    assert unshifted[0] > unshifted[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("filler", [0, 1])
def test_shipped_weights_are_0_at_the_last_position_and_at_padding(side, filler):
    whole = torch.tensor(sequences(3))
    pad = torch.full((len(whole), 2), filler)
    mask = torch.cat([torch.ones_like(whole), 0 * pad], dim=1)
    ids = torch.cat([whole, pad], dim=1)
    if side == "left":
        ids, mask = torch.cat([pad, whole], dim=1), mask.flip(1)
    _, targets = causal_lm.prepare({"input_ids": ids, "attention_mask": mask})
    first = 2 if side == "left" else 0
    wanted = torch.zeros(5)
    wanted[first : first + 2] = 1
    assert torch.equal(targets.weight, wanted.expand(len(ids), 5))
    loss, weight = causal_lm.token_loss(logits(truth, ids), targets)
    alone, _ = causal_lm.token_loss(logits(truth, whole), causal_lm.prepare(whole)[1])
    assert torch.equal((loss * weight)[:, first : first + 2], alone[:, :2])
    _, bare = causal_lm.prepare(ids)  # negative control: without the mask, padding is text
    assert bare.weight.sum() == 4 * len(ids)
