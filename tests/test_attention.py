"""Attention scores. Oracles: loops over queries and keys, heads built by hand, uniform attention, the documented formulas."""

import math
import resource
import subprocess
import sys

import pytest
import torch
from problems import infinitesimal_jackknife, loss_of, tokens
from test_architectures import inputs_of, labelled, model_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.mechanistic import SCORES, TextAttention, attention_on_text, attention_patterns, pattern_scores

QUICK = (("gpt2", "left"), ("gemma2", "packed"), ("bert", "right"))
CASES = [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
    for line in ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "bert")
    for kind in ("right", "left", "no mask", "packed")
    if (case := (line, kind)) != ("bert", "packed")
]
WINDOWS = {"mistral": (4, 4), "gemma2": (4, None), "qwen2": (4, None), "qwen3": (4, None)}
EXTREME = {"entropy": 0.0, "distance": 0.0}


def of_query(q, row, ids, sees, start):
    """By score, of the queries that have one. row: what the query pays to each key; sees: the keys; start: its sequence's."""
    if len(sees) < 2:
        return {}
    made = {
        "entropy": -sum(row[k] * math.log(row[k]) for k in sees if row[k] > 0) / math.log(len(sees)),
        "distance": sum(row[k] * abs(q - k) for k in sees),
        "self_attention": row[q],
    }
    same = [k for k in sees if k < q and ids[k] == ids[q]]
    after = [k for k in sees if start < k < q and ids[k - 1] == ids[q]]
    for name, keys in (("duplicate", same), ("induction", after)):
        if keys:
            made[name] = sum(row[k] for k in keys)
    if start in sees:
        made["sink"] = row[start]
    if q > start:
        made["previous"] = row[q - 1]
    return made


def sight(line, batch, layer):
    """By sequence and query: the keys that it sees, and where its sequence begins; None for padding."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    place = batch.get("position_ids", torch.arange(ids.shape[1]).expand_as(ids))
    window = WINDOWS.get(line, (None, None))[layer]
    for i in range(len(ids)):
        real = [k for k in range(ids.shape[1]) if mask[i, k]]
        begins = [
            k for k in real if k == real[0] or ("attention_mask" not in batch and place[i, k] != place[i, k - 1] + 1)
        ]
        rows = []
        for q in range(ids.shape[1]):
            start = max((k for k in begins if k <= q), default=None)
            causal = [k for k in real if start is not None and start <= k <= q and (window is None or q - k < window)]
            rows.append((real if line == "bert" else causal, start) if q in real else None)
        yield rows


def by_hand(line, batches, patterns):
    """Per score, layer and head: sums of each sequence of the head and of uniform attention, and numbers of queries."""
    sums, even = {}, {}
    at = 0
    for batch, pattern in zip(batches, patterns, strict=True):
        for layer in range(2):
            for i, rows in enumerate(sight(line, batch, layer)):
                ids = batch["input_ids"][i].tolist()
                for q, row in enumerate(rows):
                    if row is None:
                        continue
                    flat = [1 / len(row[0]) if k in row[0] else 0.0 for k in range(len(ids))]
                    for name, value in of_query(q, flat, ids, *row).items():
                        even.setdefault((name, layer), {}).setdefault(at + i, []).append(value)
                    for head in range(2):
                        for name, value in of_query(q, pattern[layer, i, head, q].tolist(), ids, *row).items():
                            sums.setdefault((name, layer, head), {}).setdefault(at + i, []).append(value)
        at += len(batch["input_ids"])
    return sums, even


def estimate(values, of=lambda x: 1.0):
    """A ratio of sums over sequences and its error, from lists of queries by sequence."""
    a = torch.tensor([sum(each) for each in values.values()], dtype=torch.float64)
    b = torch.tensor([sum(map(of, each)) for each in values.values()], dtype=torch.float64)
    return float(a.sum() / b.sum()), infinitesimal_jackknife(a, b) if len(a) > 1 else math.nan


@pytest.mark.parametrize(("line", "kind"), CASES)
def test_scores_are_those_of_loops_over_queries_and_keys(line, kind):
    model = model_of(line, torch.float64)
    whole = inputs_of(line)[kind]
    part = {name: x[:, :6] for name, x in whole.items()}
    batches = [whole, {**part, "input_ids": part["input_ids"] % 5}]
    net = fs.functional(model)
    given = [labelled(line, batch) if line == "bert" else batch for batch in batches]
    loss = fs.objective(net, given, fs.masked_lm if line == "bert" else fs.causal_lm)
    patterns = [fs.trace(net, net.params, inputs, ["pattern"])["pattern"] for inputs, _ in loss.batches]
    made = attention_patterns(loss, net.params)
    sums, even = by_hand(line, given, patterns)
    for (name, layer, head), values in sums.items():
        i, (value, stderr) = SCORES.index(name), estimate(values)
        assert_close((float(made.values[i, layer, head]), float(made.errors[i, layer, head])), (value, stderr),
                     rtol=1e-5, atol=1e-7, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
        flat = even[name, layer]
        assert_close((float(made.uniform[i, layer]), float(made.uniform_stderr[i, layer])), estimate(flat),
                     rtol=1e-6, atol=1e-7, equal_nan=True)  # fmt: skip
        assert float(made.num_queries[i, layer]) == sum(map(len, values.values()))
        share = (value - float(made.uniform[i, layer])) / (EXTREME.get(name, 1.0) - float(made.uniform[i, layer]))
        assert_close(float(made.head_specialisation[layer, head, i]), share, rtol=1e-5, atol=1e-6)
        above = {s: [a - b for a, b in zip(values[s], flat[s], strict=True)] for s in values}
        rest = {s: [EXTREME.get(name, 1.0) - b for b in flat[s]] for s in values}
        a, b = (torch.tensor([sum(x) for x in each.values()], dtype=torch.float64) for each in (above, rest))
        if len(a) > 1:
            error = float(made.head_specialisation_stderr[layer, head, i])
            assert_close(error, infinitesimal_jackknife(a, b), rtol=1e-4, atol=1e-7)
    missing = {(name, layer) for name in SCORES for layer in range(2)} - even.keys()
    assert all(made.values[SCORES.index(name), layer].isnan().all() for name, layer in missing)
    assert bool(made.notes) == bool(missing)


# heads that are built by hand

TEXT = torch.tensor([[0, 1, 2, 3, 4, 1, 2, 3, 4], [0, 5, 5, 6, 5, 6, 6, 0, 5]])
CAUSAL = torch.ones(2, 9, 9, dtype=torch.bool).tril()
UNIFORM = (CAUSAL.double() / CAUSAL.sum(-1, keepdim=True))[:, None]


def perfect(name):
    """Heads that do one thing wherever they can, and look at the first token, or at themselves, elsewhere."""
    pattern = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    for i, ids in enumerate(TEXT.tolist()):
        for q in range(9):
            keys = {
                "self_attention": [q],
                "sink": [0],
                "previous": [q - 1] if q else [],
                "duplicate": [k for k in range(q) if ids[k] == ids[q]],
                "induction": [k for k in range(1, q) if ids[k - 1] == ids[q]],
            }[name]
            pattern[i, 0, q, keys[-1] if keys else 0] = 1
    return pattern


def of(pattern, tokens=TEXT, visible=CAUSAL):
    made = pattern_scores(pattern, tokens, visible)
    return dict(zip(SCORES, made.sums.sum((1, 2)) / made.num.sum(1) / pattern.shape[1], strict=True))


@pytest.mark.parametrize("name", ["self_attention", "sink", "previous", "duplicate", "induction"])
def test_a_head_that_does_one_thing_scores_1_in_it_and_less_in_the_rest(name):
    made = of(perfect(name))
    assert float(made[name]) == 1.0
    assert float(made["entropy"]) == 0.0
    assert all(float(made[other]) < 1 for other in SCORES if other not in (name, "distance"))


def test_uniform_attention_has_an_entropy_of_1_and_what_is_said_to_be_uniform():
    made = of(UNIFORM)
    assert_close(float(made["entropy"]), 1.0, rtol=1e-15, atol=0)
    rows = [(1 / (q + 1)) for q in range(1, 9)]
    assert_close(float(made["self_attention"]), sum(rows) / 8)
    assert_close(float(made["distance"]), sum(q / 2 for q in range(1, 9)) / 8)
    net = fs.functional(model_of("gpt2", torch.float64))
    params = {name: value * ("c_attn" not in name) for name, value in net.params.items()}
    even = attention_patterns(fs.objective(net, [{"input_ids": TEXT}], fs.causal_lm), params)
    assert_close(even.values, even.uniform[..., None].expand(-1, -1, 2), rtol=1e-12, atol=0)
    assert_close(even.head_specialisation, torch.zeros(2, 2, 7).double(), rtol=0, atol=1e-12)
    assert even.errors[:2].isfinite().all()


# what a document says these are (mistakes 3, 4, 5, 30, 31)


def test_the_documented_detector_finds_nothing_on_repeated_text():
    ids = torch.arange(1, 65).tolist() * 2

    def matches(min_distance):
        last, num = {ids[0]: 0}, 0
        for at in range(1, len(ids)):
            last[ids[at]] = at  # before the token before is looked up, whose last place is always at - 1
            num += last[ids[at - 1]] <= at - 1 - min_distance
        return num

    assert matches(1) == 0
    assert matches(0) == 127  # each matches itself
    visible = torch.ones(1, 128, 128, dtype=torch.bool).tril()
    assert float(pattern_scores(visible[None].double(), torch.tensor([ids]), visible).num[-1, 0]) == 64


def test_the_documented_score_is_a_ratio_in_which_uniform_attention_is_an_induction_head():
    ids = torch.arange(1, 65).repeat(2)
    q, k = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    visible = (k <= q)[None]
    uniform = (visible.double() / visible.sum(-1, keepdim=True))[:, None]
    match = (k[1:, 1:] < q[1:, 1:]) & (ids[:-1][None] == ids[:-1][:, None])  # t_{k-1} = t_{q-1}
    copy = match & (ids[1:][None] == ids[1:][:, None])
    ratio = (uniform[0, 0, 1:, 1:] * copy).sum() / (uniform[0, 0, 1:, 1:] * match).sum()
    assert ratio > 0.1  # its threshold for an induction head
    made = of(uniform, ids[None], visible)
    assert_close(float(made["induction"]), sum(1 / (q + 1) for q in range(64, 128)) / 64, rtol=1e-12, atol=0)
    assert made["induction"] < 0.011


def test_documented_pairs_are_those_of_duplicate_tokens():
    pattern, ids = perfect("induction")[:1, 0], TEXT[0].tolist()
    pairs = [(q, k) for q in range(1, 9) for k in range(1, q) if ids[k - 1] == ids[q - 1] and ids[k] == ids[q]]
    mask = [(q, k) for q in range(5, 9) for k in range(q) if ids[k] == ids[q - 1]]  # queries that have seen their token
    assert sum(float(pattern[0, q, k]) for q, k in [*pairs, *mask]) == 0
    duplicate = perfect("duplicate")[0, 0]
    assert all(float(duplicate[q, k]) == 1 for q, k in pairs)


def test_documented_entropies_and_masses_shrink_with_the_text():
    entropy = torch.special.entr(UNIFORM).sum(-1)
    assert float((entropy / math.log(9)).mean()) < 0.75  # all rows by log T
    assert float(torch.special.entr(UNIFORM).mean()) < 0.2  # over pairs
    masses = torch.stack([perfect("previous")[0, 0].diagonal(-1).sum(), perfect("self_attention")[0, 0].trace()]) / 45
    assert bool((masses < 0.25).all())  # of heads that do nothing else, over pairs
    assert float(of(perfect("previous"))["previous"]) == 1.0


def test_the_documented_label_of_a_head_without_any_is_content():
    """The largest of probabilities and of an absolute correlation over 100 pairs, which is .08 for no relation at all."""
    draws = fs.normal(fs.key(0), torch.zeros(2, 400, 100, dtype=torch.float64))
    ranks = draws.argsort(-1).argsort(-1).double()
    centred = ranks - ranks.mean(-1, keepdim=True)
    rho = (centred[0] * centred[1]).sum(-1) / (centred[0].square().sum(-1) * centred[1].square().sum(-1)).sqrt()
    content = float(rho.abs().mean())
    assert_close(content, 0.08, rtol=0.1, atol=0)
    long = torch.ones(1, 64, 64, dtype=torch.bool).tril()
    flat = (long / long.sum(-1, keepdim=True))[:, None].double()
    made = of(flat, torch.arange(64)[None] % 20, long)
    labels = {"content": content, **{name: float(made[name]) for name in ("previous", "duplicate", "induction")}}
    assert max(labels, key=labels.get) in ("content", "duplicate")
    # head_specialisation of uniform attention is 0 throughout: above


# what does not change the scores


def test_chunks_blocks_and_kernels_change_nothing(monkeypatch):
    loss = loss_of("gpt2")
    whole = attention_patterns(loss, loss.net.params)
    monkeypatch.setattr("funcscope.mechanistic.passes.MOST_ENTRIES", 60)
    for kernel in ("eager", "keep"):
        other = loss_of("gpt2", attention=kernel)
        parts = attention_patterns(other.split(2), other.net.params)
        for name in ("values", "errors", "uniform", "head_specialisation", "num_queries"):
            assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-9, equal_nan=True)


def test_padding_changes_nothing():
    model = model_of("llama", torch.float64)
    net, ids = fs.functional(model), tokens(3, 1, 6)["input_ids"]
    alone = attention_patterns(fs.objective(net, [{"input_ids": ids}], fs.causal_lm), net.params)
    for left in (False, True):
        pad = torch.zeros(1, 3, dtype=torch.long)
        longer = torch.cat([pad, ids] if left else [ids, pad], 1)
        batch = {"input_ids": longer, "attention_mask": (longer != 0).long()}
        made = attention_patterns(fs.objective(net, [batch], fs.causal_lm), net.params)
        assert_close(made.values, alone.values, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("line", ["gpt2", "mistral"])
def test_padding_is_known_in_masks_that_are_made_and_a_row_of_it_is_no_sequence(line):
    net, batch = fs.functional(model_of(line, torch.float32)), tokens(7, 3, 9, pad=4, left=True)
    batch["attention_mask"][0] = 0
    loss = fs.objective(net, [batch], fs.causal_lm)
    assert torch.equal(fs.trace(net, net.params, loss.batches[0][0], []).mask, batch["attention_mask"].bool())
    rest = fs.objective(net, [{name: x[1:] for name, x in batch.items()}], fs.causal_lm)
    made, alone = (attention_patterns(each, net.params) for each in (loss, rest))
    assert made.num_sequences == alone.num_sequences == 2
    for name in ("values", "errors", "uniform_stderr", "head_specialisation_stderr"):
        assert_close(getattr(made, name), getattr(alone, name), rtol=1e-4, atol=1e-6, equal_nan=True)


def test_token_ids_alone_are_a_batch():
    net, batch = fs.functional(model_of("gpt2", torch.float32)), tokens(4, 3, 8)
    bare, named = (
        fs.objective(net, [x], fs.causal_lm) for x in (batch["input_ids"], {"input_ids": batch["input_ids"]})
    )
    assert attention_patterns(bare, net.params) == attention_patterns(named, net.params)


def test_what_has_no_patterns_is_said():
    loss = loss_of("mlp")
    with pytest.raises(ValueError, match="the parts of this model are not described"):
        attention_patterns(loss, loss.net.params)
    net = fs.functional(model_of("gpt2", torch.float32))
    short = fs.objective(net, [{"input_ids": torch.tensor([[1]]), "labels": torch.tensor([[1]])}], fs.masked_lm)
    with pytest.raises(ValueError, match="no token sees another one"):
        attention_patterns(short, net.params)
    one = attention_patterns(fs.objective(net, [{"input_ids": torch.tensor([[1, 2, 3]])}], fs.causal_lm), net.params)
    assert "one sequence: there is no error over sequences." in one.notes
    assert any("duplicate, induction" in note for note in one.notes)
    assert one.entropy.isfinite().all()
    assert one.entropy_stderr.isnan().all()


def test_half_precision_is_scored_in_float32():
    wide, half = (loss_of("gpt2", dtype) for dtype in (torch.float64, torch.bfloat16))
    one, other = (attention_patterns(each, each.net.params) for each in (wide, half))
    assert_close(other.values, one.values, rtol=0.05, atol=0.02, equal_nan=True)
    assert other.values.dtype == torch.float64


PEAK = """
import resource, sys, torch, transformers, funcscope as fs
from funcscope.mechanistic import attention_patterns
config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=64, n_positions=4096)
net = fs.functional(transformers.GPT2LMHeadModel(config), attention="keep")
ids = torch.randint(0, 64, (1, 4096), generator=torch.Generator().manual_seed(0))
loss = fs.objective(net, [{"input_ids": ids}], fs.causal_lm)
with torch.no_grad():
    net.apply(net.params, loss.batches[0][0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.argv[1] == "all":
        attention_patterns(loss, net.params)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_4096_tokens_take_less_than_200_mebibytes_above_the_model():
    run = subprocess.run([sys.executable, "-c", PEAK, "all"], capture_output=True, text=True, check=True)
    assert resource.getpagesize()
    assert float(run.stdout) < 200  # all patterns would be 512


# on one text


@pytest.mark.parametrize("kind", ["right", "left"])
def test_patterns_on_a_text_are_those_that_the_model_returns_without_padding(kind):
    model, batch = model_of("gpt2", torch.float64), inputs_of("gpt2")[kind]
    net = fs.functional(model)
    loss = fs.objective(net, [batch], fs.causal_lm)
    outputs = model(**batch, output_attentions=True).attentions
    for i in range(len(batch["input_ids"])):
        at = batch["attention_mask"][i].nonzero().flatten()
        made = attention_on_text(loss, net.params, sequence=i)
        expected = torch.stack([layer[i][:, at][..., at] for layer in outputs])
        assert_close(made.patterns.double(), expected, atol=1e-6, rtol=1e-5)
        assert made.tokens == [str(each) for each in batch["input_ids"][i, at].tolist()]
        short = attention_on_text(loss, net.params, lambda ids: ["x"] * len(ids), sequence=i, num=3)
        assert_close(short.patterns, made.patterns[:, :, :3, :3])
        assert short.tokens == ["x"] * 3
    with pytest.raises(ValueError, match="`sequence` must be one of"):
        attention_on_text(loss, net.params, sequence=99)


def test_the_head_that_is_shown_first_attends_to_what_followed_the_token():
    pattern = torch.zeros(2, 2, 4, 4)
    pattern[0, 0] = torch.eye(4)
    pattern[1, 0, 2, 1] = 1.0  # tokens a b a c: the last a looks at b
    assert TextAttention(pattern, ["a", "b", "a", "c"]).follower == (1, 0)
    assert TextAttention(pattern, ["a", "b", "d", "c"]).follower == (0, 0)
