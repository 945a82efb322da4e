"""Sequences longer than a table of positions are refused by name, at the length at which the model itself gives up."""

import pytest
import torch
from problems import tokens
from test_architectures import FAMILIES, LINES, criterion_of, labelled, model_of
from test_speech import whisper

import funcscope as fs
from funcscope.core.positions import position_limits

TABLES = {
    "gpt2": {"": 32}, "gpt_neo": {"": 32}, "opt": {"": 32}, "biogpt": {"": 32}, "gpt_bigcode": {"": 32}, "gptj": {"": 32},
    "codegen": {"": 32}, "bert": {"": 32}, "albert": {"": 32}, "electra": {"": 32}, "distilbert": {"": 32},
    "roberta": {"": 31}, "bart": {"encoder": 32, "decoder": 32}, "marian": {"encoder": 32, "decoder": 32},
    "llama": {}, "bloom": {}, "t5": {}, "mamba": {}, "modernbert": {},
}  # fmt: skip


def batch_of(line, length):
    return labelled(line, {"input_ids": tokens(7, 2, length)["input_ids"].clamp(min=1)})


def loss_of(line, batch, attention="auto"):
    return fs.objective(fs.functional(model_of(line, torch.float32), attention=attention), [batch], criterion_of(line))


@pytest.mark.parametrize("line", TABLES)
def test_limits_are_those_at_which_the_model_gives_up(line):
    model, limits = model_of(line, torch.float32), TABLES[line]
    assert dict(position_limits(model)) == limits
    most = min(limits.values(), default=60)
    for attention in ("auto", "keep"):
        loss = loss_of(line, batch_of(line, most), attention)
        assert bool(loss(loss.net.theta).isfinite())
    if limits:
        with pytest.raises((IndexError, RuntimeError)):
            model(**batch_of(line, most + 1))
        for attention in ("auto", "keep"):
            with pytest.raises(ValueError, match=rf"`input_ids` has {most + 1} tokens, .* {most} positions: cut"):
                loss_of(line, batch_of(line, most + 1), attention)


def test_a_call_is_refused_like_a_loss():
    net = fs.functional(model_of("gpt2", torch.float32))
    ids = batch_of("gpt2", 33)["input_ids"]
    for inputs in (ids, (ids,), {"input_ids": ids}, {"inputs_embeds": torch.zeros(2, 33, 16)}):
        with pytest.raises(ValueError, match=r"has 33 tokens, and GPT2LMHeadModel has 32 positions: cut sequences"):
            net.apply(net.params, inputs)


def test_positions_that_are_given_or_counted_are_taken():
    ids = batch_of("gpt2", 40)["input_ids"]
    again = (torch.arange(40) % 20).expand(2, -1)
    loss = loss_of("gpt2", {"input_ids": ids, "position_ids": again}, "keep")
    assert bool(loss(loss.net.theta).isfinite())
    mask = (torch.arange(40) >= 10).long().expand(2, -1)
    loss = loss_of("opt", {"input_ids": ids, "attention_mask": mask})
    alone = loss_of("opt", {"input_ids": ids[:, 10:]})
    assert float(loss(loss.net.theta)) == pytest.approx(float(alone(alone.net.theta)), rel=1e-5)


@pytest.mark.parametrize("line", ["bart", "marian"])
def test_what_is_to_be_said_is_counted_apart(line):
    batch = batch_of(line, 8)
    with pytest.raises(ValueError, match=r"`labels` has 33 tokens, and the decoder of .* has 32 positions"):
        loss_of(line, {**batch, "labels": batch_of(line, 33)["labels"]})
    with pytest.raises(ValueError, match=r"`decoder_input_ids` has 33 tokens, and the decoder of .* has 32 positions"):
        loss_of(line, {**batch, "decoder_input_ids": batch_of(line, 33)["labels"]})


def test_whispers_decoder_has_positions_of_its_own():
    assert dict(position_limits(whisper())) == {"decoder": 20}
    batch = {"input_features": torch.zeros(1, 8, 100), "labels": torch.ones(1, 21, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"`labels` has 21 tokens, and the decoder of Whisper.* has 20 positions"):
        fs.objective(fs.functional(whisper().eval()), [batch], fs.seq2seq_lm)


AGAIN = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
ALONE = ("bloom", "mpt", "t5", "mamba", "bart")
"""Families that count for themselves, of every kind."""


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("line", LINES)
def test_positions_that_a_model_does_not_read_are_refused(line, masked):
    """Those and no others: the untouched model, with and without them, says which."""
    model, batch = model_of(line, torch.float32), batch_of(line, 9)
    batch |= {"attention_mask": torch.ones(2, 9, dtype=torch.long)} if masked else {}
    packed = {**batch, "position_ids": AGAIN.expand(2, 9)}
    given = {k: v for k, v in batch.items() if k != "labels" or FAMILIES[line.split(",")[0]].attention == "both"}
    with torch.no_grad():
        one, other = (model(**given, **more).logits for more in ({}, {"position_ids": packed["position_ids"]}))
    for attention in ("auto", "keep"):
        if float((one - other).abs().max()) > 1e-4:
            loss_of(line, packed, attention)
        else:
            with pytest.raises(
                ValueError, match=r"`position_ids` are not read by \w+, .* leave them out, and pass one text"
            ):
                loss_of(line, packed, attention)


@pytest.mark.parametrize("line", ALONE)
def test_positions_that_say_what_the_model_counts_pass(line):
    absolute = bool(TABLES.get(line))
    plain, padded = batch_of(line, 9), labelled(line, tokens(7, 2, 9, pad=4, left=line != "mamba"))
    counted = padded["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    for batch, position, same in (
        (plain, torch.arange(9), True),
        (plain, torch.arange(9).expand(2, 9), True),
        (plain, torch.arange(3, 12)[None], not absolute),
        (padded, counted, not absolute),
        (padded, torch.arange(9)[None], True),
        (plain, torch.arange(8)[None], False),
        (plain | {"attention_mask": torch.ones(2, 9)}, torch.arange(8)[None], False),
        (plain, AGAIN, False),
    ):
        given = {**batch, "position_ids": position}
        if not same:
            with pytest.raises(ValueError, match="leave them out"):
                loss_of(line, given)
            continue
        loss, bare = loss_of(line, given), loss_of(line, batch)
        assert float(loss(loss.net.theta)) == float(bare(bare.net.theta))


def test_texts_that_a_mask_keeps_apart_are_at_the_distances_that_they_say():
    """In a mask of all pairs, of a model whose biases grow with the distance."""
    net, ids = fs.functional(model_of("mpt", torch.float32)), batch_of("mpt", 9)["input_ids"]
    text = (AGAIN == 0).cumsum(0)
    sees = (text[:, None] == text).tril()
    mask = torch.zeros(9, 9).masked_fill(~sees, torch.finfo(torch.float32).min).expand(2, 1, 9, 9)
    given = {"input_ids": ids, "position_ids": AGAIN}
    with torch.no_grad():
        second = net.apply(net.params, {**given, "attention_mask": mask})[:, 4:]
        torch.testing.assert_close(second, net.apply(net.params, {"input_ids": ids[:, 4:]}), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="leave them out"):
        net.prepare({**given, "attention_mask": torch.zeros(2, 1, 9, 9)})


@pytest.mark.parametrize("name", ["position_ids", "decoder_position_ids"])
def test_a_decoders_positions_are_not_read_either(name):
    batch = batch_of("bart", 9) | {name: AGAIN}
    with pytest.raises(ValueError, match=f"`{name}` are not read by Bart"):
        loss_of("bart", batch)
    with pytest.raises(ValueError, match=r"has 40 tokens, and the encoder of .* has 32 positions"):
        loss_of("bart", batch_of("bart", 40) | {"position_ids": torch.arange(40)})
