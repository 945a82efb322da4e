"""Induction heads, rollout and flow. Oracles: loops, heads built by hand, uniform attention, a linear program."""

import math
import sys

import numpy as np
import pytest
import scipy
import torch
from problems import seeded
from test_architectures import model_of
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs
from funcscope.core.trace import Kernel, Trace
from funcscope.mechanistic import attention_flow, attention_rollout, induction_heads, repeated_tokens
from funcscope.mechanistic.induction import copy_losses, copy_scores

LINES = [
    "gpt2",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "llama", "gemma2", "gpt_neox", "qwen3")),
]
WINDOWS = {"mistral": (4, 4), "gemma2": (4, None), "qwen3": (4, None)}


# the text


def test_the_text_repeats_itself_and_every_sequence_is_its_own():
    ids = repeated_tokens(fs.key(0), 50, 6, 30)
    assert ids.shape == (50, 12)
    assert torch.equal(ids[:, :6], ids[:, 6:])
    assert torch.equal(repeated_tokens(fs.key(0), 9, 6, 30), ids[:9])
    assert not torch.equal(repeated_tokens(fs.key(1), 50, 6, 30), ids)
    assert set(ids.flatten().tolist()) == set(range(30))
    some = repeated_tokens(fs.key(0), 50, 6, torch.tensor([3, 8]), bos=1)
    assert set(some[:, 1:].flatten().tolist()) == {3, 8}
    assert some[:, 0].tolist() == [1] * 50
    counts = repeated_tokens(fs.key(2), 100, 100, 7)[:, :100].flatten().bincount(minlength=7).double()
    assert float(((counts - 1e4 / 7) ** 2 / (1e4 / 7)).sum()) < scipy.stats.chi2.ppf(0.999, 6)


def test_a_text_that_cannot_be_is_said():
    for name, arguments in (("num", (0, 3, 9)), ("period", (2, 0, 9))):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
            repeated_tokens(fs.key(0), *arguments)
    with pytest.raises(ValueError, match="`vocab` has no token"):
        repeated_tokens(fs.key(0), 1, 3, 0)
    with pytest.raises(TypeError, match=r"fs\.key\(0\)"):
        repeated_tokens.__wrapped__(0, 1, 3, 9)


# heads of models


def loops(line, net, key, num, period):
    """(score, layer, head) -> values of sequences; losses on both copies; uniform attention."""
    ids = repeated_tokens(key, num, period, torch.tensor([i for i in range(40) if i not in (0, 1)]), 1)
    seen = fs.trace(net, net.params, {"input_ids": ids}, ["pattern", "logits"])
    made, even = {}, {}
    for layer in range(2):
        window = WINDOWS.get(line, (None, None))[layer] or 99
        for name, back, queries in (
            ("induction", period - 1, range(period + 1, 2 * period + 1)),
            ("duplicate", period, range(period + 1, 2 * period + 1)),
            ("previous", 1, range(1, 2 * period + 1)),
        ):
            seeing = [q for q in queries if back < window]
            even[name, layer] = sum(1 / min(q + 1, window) for q in seeing) / max(len(seeing), 1) or math.nan
            for head in range(2):
                rows = seen["pattern"][layer, :, head]
                made[name, layer, head] = [
                    sum(float(row[q, q - back]) for q in seeing) / len(seeing) if seeing else math.nan for row in rows
                ]
    losses = -seen["logits"].log_softmax(-1)
    of = [[sum(float(losses[i, at - 1, ids[i, at]]) for at in range(a, a + period - 1)) / (period - 1)
           for i in range(num)] for a in (2, period + 2)]  # fmt: skip
    return made, even, of


def mean(values):
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(x.std()) / len(x) ** 0.5


@pytest.mark.parametrize("line", LINES)
def test_scores_and_losses_are_those_of_loops(line):
    net = fs.functional(model_of(line, torch.float64))
    for period in (3, 6):
        found = induction_heads(net, net.params, key=fs.key(3), num=5, period=period, chunk=2)
        made, even, (first, second) = loops(line, net, fs.key(3), 5, period)
        for (name, layer, head), values in made.items():
            pair = tuple(float(getattr(found, part)[layer, head]) for part in (name, f"{name}_stderr"))
            assert_close(pair, mean(values), rtol=1e-5, atol=1e-8, equal_nan=True)
        for i, name in enumerate(("induction", "duplicate", "previous")):
            assert_close(found.uniform[i].tolist(), [even[name, layer] for layer in range(2)], equal_nan=True)
        gain = [a - b for a, b in zip(first, second, strict=True)]
        for estimate, values in ((found.gain, gain), (found.loss_first, first), (found.loss_second, second)):
            assert_close((float(estimate.value), float(estimate.stderr)), mean(values), rtol=1e-4, atol=1e-6)
        assert bool(found.notes) == any(math.isnan(x) for values in made.values() for x in values)
        assert (found.period, found.num, found.vocab, found.bos) == (period, 5, 38, 1)


def test_heads_without_queries_are_uniform_to_the_last_digits():
    net = fs.functional(model_of("gpt2", torch.float64))
    params = {name: value * ("c_attn" not in name) for name, value in net.params.items()}
    found = induction_heads(net, params, key=fs.key(0), num=3)
    period = found.period
    assert period == 15  # of 32 positions
    assert_close(found.induction, found.uniform[0, :, None].expand(-1, 2), rtol=1e-6, atol=0)
    exact = sum(1 / (q + 1) for q in range(period + 1, 2 * period + 1)) / period
    assert_close(found.uniform[0], torch.full((2,), exact, dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(exact, math.log(2) / period, rtol=1.1 / period, atol=0)


def seen_of(pattern, real=None):
    """A trace whose queries and keys give these patterns."""
    b, h, t, _ = pattern.shape
    low = torch.finfo(torch.float32).min
    mask = torch.zeros(t, t, dtype=pattern.dtype).masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), low)
    keys = torch.eye(t, dtype=pattern.dtype)[None, :, None].expand(b, t, h, t)
    queries = pattern.log().clamp(min=-1e4).permute(0, 2, 1, 3)
    values = {"q.0": queries, "k.0": keys}
    return Trace(values, torch.ones(b, t, dtype=torch.bool), {0: Kernel(1.0, None, mask.expand(b, 1, t, t))}, 1)


@pytest.mark.parametrize(("name", "back"), [("induction", 4), ("duplicate", 5), ("previous", 1)])
def test_a_head_that_does_one_thing_scores_1(name, back):
    pattern = torch.zeros(1, 1, 11, 11, dtype=torch.float64)
    for q in range(11):
        pattern[0, 0, q, max(q - back, 0)] = 1
    sums, num, _ = copy_scores(seen_of(pattern), 0, 5)
    scores = dict(zip(("induction", "duplicate", "previous"), (sums[:, 0, 0] / num).tolist(), strict=True))
    assert scores[name] == 1
    assert all(value < 0.2 for other, value in scores.items() if other != name)
    assert num.tolist() == [5, 5, 10]


@pytest.mark.parametrize(("vocab", "period", "documented"), [(1000, 50, 0.97), (23, 16, 0.69)])
def test_a_head_that_looks_evenly_at_all_that_followed_has_the_documented_mean(vocab, period, documented):
    ids = repeated_tokens(fs.key(0), 400, period, vocab)
    at = torch.arange(period, 2 * period)
    before = F.pad(ids, (1, 0), value=-1)[:, : 2 * period]  # the token before each key
    seen = (before[:, None] == ids[:, at, None]) & (torch.arange(2 * period) <= at[:, None])
    scores = seen[:, torch.arange(period), at - period + 1] / seen.sum(-1)
    means = scores.mean(1)
    assert abs(means.mean() - documented) < 0.005 + 4 * means.std() / 400**0.5


def test_losses_of_a_model_that_knows_the_copy():
    ids = repeated_tokens(fs.key(0), 3, 5, 9, bos=0)
    logits = torch.zeros(3, 11, 9)
    logits[:, 5:10] = 50.0 * F.one_hot(ids[:, 6:], 9)
    assert_close(
        copy_losses(logits, ids, 5), torch.tensor([[math.log(9)], [0.0]]).double().expand(2, 3), atol=1e-6, rtol=0
    )
    assert_close(copy_losses(logits[:, 1:], ids[:, 1:], 5)[0], torch.full((3,), math.log(9)).double())  # without BOS


def copying(steps):
    """A model of two layers, trained on repeated text."""
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=16, n_positions=17, bos_token_id=0, eos_token_id=0,
                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)  # fmt: skip
    model = seeded(0, lambda: GPT2LMHeadModel(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        period = 4 + step % 5
        ids = repeated_tokens(fs.fold_in(fs.key(5), step), 32, period, torch.arange(1, 16), 0)
        loss = F.cross_entropy(model(ids).logits[:, period + 1 : -1].flatten(0, 1), ids[:, period + 2 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.slow
def test_a_trained_model_has_a_gain_and_heads_above_uniform_attention_an_untrained_one_has_none():
    net = fs.functional(copying(300))
    found = induction_heads(net, net.params, key=fs.key(9), num=64)
    layer, head = found.ranking[0]
    assert float(found.gain.value) > 10 * float(found.gain.stderr)
    assert float(found.induction[layer, head]) > 0.3 > 3 * float(found.uniform[0, layer])
    fresh = fs.functional(seeded(1, lambda: GPT2LMHeadModel(net.config)))
    nothing = induction_heads(fresh, fresh.params, key=fs.key(9), num=64)
    assert abs(float(nothing.gain.value)) < 5 * float(nothing.gain.stderr)
    assert float(nothing.induction.max()) < 0.15


def test_the_ranking_is_by_standard_errors_above_uniform_attention():
    net = fs.functional(model_of("mistral", torch.float64))
    found = induction_heads(net, net.params, key=fs.key(0), num=6, period=3)
    z = [float(found.z[place]) for place in found.ranking]
    assert z == sorted(z, reverse=True)
    assert found.coords["ranked head"] == [f"{layer}.{head}" for layer, head in found.ranking]
    assert_close(found.ranked, torch.stack([found.induction[place] for place in found.ranking]))
    one = induction_heads(net, net.params, key=fs.key(0), num=1, period=3)
    assert one.induction_stderr.isnan().all()
    assert sorted(one.ranking) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_bad_requests_get_one_clear_line():
    net = fs.functional(model_of("gpt2", torch.float32))
    with pytest.raises(ValueError, match="`period` must be at most 15"):
        induction_heads(net, net.params, key=fs.key(0), period=16)
    with pytest.raises(ValueError, match="`period` must be an integer of at least 2"):
        induction_heads(net, net.params, key=fs.key(0), period=1)
    bert = fs.functional(model_of("bert", torch.float32))
    with pytest.raises(ValueError, match="looks both ways"):
        induction_heads(bert, bert.params, key=fs.key(0), num=2)
    plain = fs.functional(seeded(0, lambda: torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="configuration of a Hugging Face model"):
        induction_heads(plain, plain.params, key=fs.key(0))
    falcon = fs.functional(model_of("falcon", torch.float32))
    with pytest.raises(ValueError, match="the parts of this model are not described"):
        induction_heads(falcon, falcon.params, key=fs.key(0), num=2)


# rollout and flow


def patterns(layers=3, heads=2, length=6, rows=2, seed=0):
    scores = fs.normal(fs.key(seed), torch.zeros(layers, rows, heads, length, length, dtype=torch.float64))
    return scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def by_paths(mixed):
    """Row q of the rollout: over all ways down from q, the product of what each layer takes."""
    length = mixed.shape[-1]
    rolled = torch.zeros(length, length, dtype=torch.float64)

    def down(layer, at, share, q):
        if layer < 0:
            rolled[q, at] += share
            return
        for k in range(length):
            if mixed[layer, at, k]:
                down(layer - 1, k, share * float(mixed[layer, at, k]), q)

    for q in range(length):
        down(len(mixed) - 1, q, 1.0, q)
    return rolled


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_rollout_is_the_sum_over_all_ways_down(alpha):
    each = patterns(length=4)
    made = attention_rollout(each, alpha=alpha)
    mixed = alpha * each.mean(2) + (1 - alpha) * torch.eye(4).double()
    for i in range(2):
        assert_close(made[i], by_paths(mixed[:, i]))
    assert_close(made.sum(-1), torch.ones(2, 4).double())
    assert torch.equal(made, made.tril())


def test_padding_has_no_part_in_a_rollout():
    net = fs.functional(model_of("llama", torch.float64))
    ids = torch.tensor([[5, 6, 7, 8]])
    alone = attention_rollout(fs.trace(net, net.params, {"input_ids": ids}, ["pattern"])["pattern"])
    pad = {"input_ids": F.pad(ids, (2, 0)), "attention_mask": F.pad(torch.ones_like(ids), (2, 0))}
    seen = fs.trace(net, net.params, pad, ["pattern"])
    made = attention_rollout(seen["pattern"], mask=seen.mask)
    assert_close(made[:, 2:, 2:], alone, rtol=1e-5, atol=1e-7)
    assert not made[:, :2].any()
    assert not made[:, :, :2].any()


def test_documented_rollouts_are_other_matrices():
    """Softmax of what is softmaxed, the product in the wrong order, no residual stream, and row 0 (mistake 6)."""
    onehot = torch.eye(64).double()[torch.arange(64) // 2][None, None, None]
    assert float(onehot.softmax(-1).max()) < 0.042
    hidden = torch.where(torch.ones(64, 64, dtype=torch.bool).tril(), onehot[0, 0, 0], 0.0)
    assert float(hidden.softmax(-1).triu(1).sum()) > 1  # what no query sees
    each = patterns()
    made = attention_rollout(each)
    mixed = 0.5 * each.mean(2) + 0.5 * torch.eye(6).double()
    turned = mixed[0] @ mixed[1] @ mixed[2]
    assert (turned - made).abs().max() > 0.01
    assert_close(turned.sum(-1), made.sum(-1))  # rows sum to one in any order: they cannot tell
    assert (attention_rollout(each, alpha=1.0) - made).abs().max() > 0.1
    assert made[:, 0].tolist() == [[1.0, 0, 0, 0, 0, 0]] * 2  # of every causal model


def linear_program(mixed, q, k):
    """The maximum flow from token k to position q: the largest inflow that is conserved within the capacities."""
    edges = [((layer, b), (layer + 1, a)) for layer, a, b in mixed.nonzero().tolist()]
    ends, nodes = ((0, k), (len(mixed), q)), {node for edge in edges for node in edge}
    inner = [[(edge[1] == node) - (edge[0] == node) for edge in edges] for node in nodes if node not in ends]
    most = [(0, float(mixed[layer, a, b])) for layer, a, b in mixed.nonzero().tolist()]
    value = [-float(edge[1] == ends[1]) for edge in edges]
    return -scipy.optimize.linprog(value, A_eq=np.array(inner, float), b_eq=np.zeros(len(inner)), bounds=most).fun


def test_flow_is_that_of_a_linear_program_and_at_least_the_rollout():
    each = patterns(layers=3, length=4, rows=1, seed=4)[:, 0]
    made = attention_flow(each)
    mixed = 0.5 * each.mean(1) + 0.5 * torch.eye(4).double()
    for q in range(4):
        for k in range(4):
            assert_close(float(made[q, k]), linear_program(mixed, q, k), rtol=1e-7, atol=1e-9)
    rolled = attention_rollout(each[:, None])[0]
    assert bool((made >= rolled - 1e-12).all())
    assert bool((made <= 1 + 1e-12).all())
    assert (made - rolled).abs().max() > 0.05


def test_flow_leaves_padding_out_and_says_what_it_needs(monkeypatch):
    each, mask = patterns(length=3, rows=1)[:, 0], torch.tensor([True, True, False])
    made = attention_flow(each, mask=mask)
    assert made[2].isnan().all()
    assert made[:, 2].isnan().all()
    assert_close(made[:2, :2], attention_flow(each[..., :2, :2]))
    with pytest.raises(ValueError, match="`alpha` is a share"):
        attention_rollout(each[:, None], alpha=1.5)
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ModuleNotFoundError, match="needs networkx: pip install networkx"):
        attention_flow(each)
