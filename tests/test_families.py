"""Seven Hugging Face families: the untouched model's numbers, under every kind of input and every transform."""

import pytest
import torch
from problems import LANGUAGE, masked, mistral, problem, seeded, seen, tokens, translated
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs


def padded(left):
    return tokens(7, 3, 9, pad=4, left=left)


def with_a_row_of_padding():
    batch = tokens(7, 3, 9, pad=4)
    batch["attention_mask"][1] = 0
    return batch


def with_position_ids(left):
    batch = padded(left)
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


BATCHES = {
    "no padding": lambda: tokens(7, 2, 8),
    "no mask": lambda: {"input_ids": tokens(7, 2, 8)["input_ids"]},
    "right padding": lambda: padded(left=False),
    "left padding": lambda: padded(left=True),
    "a row of padding": with_a_row_of_padding,
    "position ids, right padding": lambda: with_position_ids(left=False),
    "position ids, left padding": lambda: with_position_ids(left=True),
    "shifted position ids, no mask": lambda: {
        "input_ids": tokens(7, 2, 8)["input_ids"],
        "position_ids": torch.arange(3, 11)[None].repeat(2, 1),
    },
}


def without_empty_rows(batch):
    """Nothing is scored in a row whose encoder sees nothing: attention over nothing is undefined."""
    empty = ~batch["attention_mask"].any(1) if "attention_mask" in batch else torch.zeros(len(batch["labels"])).bool()
    return {**batch, "labels": batch["labels"].masked_fill(empty[:, None], -100)}


def labelled(name, batch):
    """The batch with labels that the model's own loss and ours read alike; None where the family takes no such input."""
    if name == "t5":
        return None if "position_ids" in batch else without_empty_rows(translated(batch, 8, 5))
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if name == "bert":
        if "attention_mask" not in batch:
            return None
        hidden = masked(batch)  # a mask token that is not `padding_idx`, whose gradient torch drops on the way
        return {**hidden, "input_ids": hidden["input_ids"].masked_fill(hidden["labels"] != -100, 2)}
    scored = real.clone()
    scored[:, 1:] &= real[:, :-1]  # a first token is predicted from padding: never scored here
    return {**batch, "labels": batch["input_ids"].masked_fill(~scored, -100)}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("name", LANGUAGE)
def test_logits_loss_and_gradient_are_the_untouched_models(name, kind):
    model, _, criterion = problem(name, torch.float32)
    batch = labelled(name, BATCHES[kind]())
    if batch is None:
        pytest.skip("this family takes no such input")
    net = fs.functional(model)
    loss = fs.objective(net, [batch], criterion)
    inputs, _ = criterion.prepare(batch)
    theirs = model.eval()(**batch)
    theirs.loss.backward()
    read = seen(inputs) if "attention_mask" in inputs or "labels" in inputs else slice(None)
    with torch.no_grad():
        assert_close(net.apply(net.params, inputs)[read], theirs.logits[read], rtol=1e-5, atol=2e-6)
        assert_close(loss(net.params), theirs.loss.double(), rtol=1e-5, atol=0)
    ours, wanted = grad(loss)(net.theta), net.layout.ravel({n: p.grad for n, p in model.named_parameters()})
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5
    lazily = grad(lambda a: loss.at_leaves(lambda _, value: a * value))(torch.tensor(1.0))
    assert_close(lazily, net.theta @ wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LANGUAGE)
def test_ragged_batches_are_the_mean_over_all_scored_tokens(name):
    model, _, criterion = problem(name)
    batches = [
        labelled(name, tokens(seed, rows, length, pad=pad)) for seed, rows, length, pad in [(1, 3, 9, 4), (2, 1, 5, 2)]
    ]
    losses = [model.eval()(**batch).loss for batch in batches]
    counts = [(batch["labels"] != -100)[:, int(criterion is fs.causal_lm) :].sum() for batch in batches]
    wanted = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    net = fs.functional(model)
    ours = fs.objective(net, batches, criterion)(net.theta)
    assert_close(ours, wanted.double(), rtol=1e-6, atol=0)  # their loss is in float32, whatever the model


@pytest.mark.parametrize("name", [name for name in LANGUAGE if name not in ("bert", "t5")])
def test_sequences_packed_into_a_row_do_not_see_each_other(name):
    model, _, _ = problem(name, torch.float32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2], list(range(9))])
    packed = {"input_ids": tokens(7, 2, 9)["input_ids"], "position_ids": positions}
    net = fs.functional(model)
    with torch.no_grad():
        ours = net.apply(net.params, packed)
        alone = net.apply(net.params, {"input_ids": packed["input_ids"][:1, 4:6]})
        assert_close(ours, model.eval()(**packed, use_cache=False).logits, rtol=1e-5, atol=2e-6)
        assert_close(ours[:1, 4:6], alone, rtol=1e-5, atol=2e-6)
        unpacked = net.apply(net.params, {**packed, "attention_mask": torch.ones_like(packed["input_ids"])})
    assert (unpacked[0, 4:] - ours[0, 4:]).abs().max() > 1e-4  # negative control: with a mask it is one sequence


def test_mistrals_window_matters():
    batch = tokens(7, 2, 9)
    near, far = (fs.functional(seeded(0, lambda w=w: mistral()).float()) for w in (0, 1))
    far._skeleton.config.sliding_window = None
    assert (near.apply(near.params, batch) - far.apply(far.params, batch)).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
def test_fused_kernels_are_kept_for_values_and_first_derivatives(name):
    """No float 4-D mask, no other kernel: the model as it is, in every plan."""
    model, batches, criterion = problem(name, torch.float32)
    kept, eager = (fs.objective(fs.functional(model, attention=a), batches, criterion) for a in ("keep", "eager"))
    assert kept.net._skeleton.config._attn_implementation == model.config._attn_implementation == "sdpa"
    asked = {"key": fs.key(0), "n_samples": 3, "two_sided": True, "compute_gradient": True}
    results = [
        fs.directional_losses(loss, loss.net.params, **asked, **plan)
        for loss, plan in [(eager, {}), (kept, {}), (kept, {"lazy": True})]
    ]
    for other in results[1:]:
        assert_close(other.losses, results[0].losses, rtol=1e-5, atol=1e-6)
        assert_close(other.losses_negative, results[0].losses_negative, rtol=1e-5, atol=1e-6)
        assert_close(other.slopes, results[0].slopes, rtol=1e-4, atol=1e-5)


def test_the_door_of_an_encoder_decoder():
    model, batches, _ = problem("t5")
    net, batch = fs.functional(model), batches[0]
    with pytest.raises(ValueError, match=r"needs `labels` or `decoder_input_ids`"):
        net.apply(net.params, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"seq2seq_lm needs a batch with `input_ids`.*`labels`"):
        fs.seq2seq_lm.prepare({"input_ids": batch["input_ids"]})
    given = {
        **batch,
        "decoder_input_ids": torch.cat([torch.zeros(3, 1).long(), batch["labels"][:, :-1].clamp(min=0)], 1),
    }
    assert_close(
        fs.objective(net, [given], fs.seq2seq_lm)(net.theta), fs.objective(net, [batch], fs.seq2seq_lm)(net.theta)
    )
    other = {**given, "decoder_input_ids": given["decoder_input_ids"].flip(1)}  # negative control: they are read
    assert fs.objective(net, [other], fs.seq2seq_lm)(net.theta) != fs.objective(net, [given], fs.seq2seq_lm)(net.theta)
    hidden = {**batch, "decoder_attention_mask": torch.ones(3, 4).long()}
    hidden["decoder_attention_mask"][:, 1] = 0
    with torch.no_grad():
        inputs = net.prepare(hidden)
        assert net.prepare(inputs)["decoder_attention_mask"] is inputs["decoder_attention_mask"]
        assert_close(net.apply(net.params, inputs)[:, 2:], model.eval()(**hidden).logits[:, 2:], rtol=1e-6, atol=1e-6)


def test_labels_do_not_reach_a_model_that_would_score_them():
    net = fs.functional(problem("gpt2").model)
    batch = tokens(7, 2, 6)
    with pytest.raises(ValueError, match=r"`labels` are no input of the model"):
        net.apply(net.params, {**batch, "labels": batch["input_ids"]})


def test_a_class_name_that_says_nothing():
    with pytest.raises(ValueError, match=r"'Linear' does not say.*choose a criterion: causal_lm"):
        fs.criterion_of(seeded(0, lambda: torch.nn.Linear(2, 2)))


def test_a_boolean_4d_mask_of_the_decoder_is_applied_and_not_added():
    model, batches, criterion = problem("t5")
    net = fs.functional(model)
    causal = torch.ones(4, 4).tril().bool().expand(3, 1, 4, 4)
    with torch.no_grad():
        plain = net.apply(net.params, criterion.prepare(batches[0])[0])
        masked_too = net.apply(net.params, {**batches[0], "decoder_attention_mask": causal})
    assert_close(masked_too, plain)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_negative_ids_are_refused_in_every_plan(name):
    model, batches, criterion = problem(name)
    harmed = {**batches[0], "input_ids": batches[0]["input_ids"].masked_fill(batches[0]["attention_mask"] == 0, -100)}
    with pytest.raises(ValueError, match=r"`input_ids` holds the negative id -100: -100 belongs into `labels` only"):
        fs.objective(fs.functional(model), [harmed], criterion)
