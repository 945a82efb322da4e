"""Every line of the table of architectures, against the untouched model: a family is added by its line alone."""

from functools import cache

import pytest
import torch
import transformers
from problems import VOCAB, gpt2, problem, qwen2, seeded, tokens
from torch.func import grad, jvp
from torch.nn import functional as F
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import architectures
from funcscope.core.architectures import FAMILIES, FULL, SLIDING, computes_in_float32

TINY = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 32, "bos_token_id": 1,
    "eos_token_id": 1, "pad_token_id": 0, "sliding_window": 4, "use_sliding_window": True, "layer_types": [SLIDING, FULL],
}  # fmt: skip
"""One configuration for all: whoever has no window must leave it alone."""
CHANGES = {
    "albert": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 20},
    "falcon": {"head_dim": None},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 20},
    "t5": {"layer_types": None, "num_decoder_layers": 2, "d_kv": 8, "d_ff": 20, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8},
}
VARIANTS = {
    "falcon, alibi": {"alibi": True},
    "falcon, new": {"new_decoder_architecture": True, "num_kv_heads": 1},
    "gemma3_text, capped": {"final_logit_softcapping": 5.0},
    "gemma3_text, all slide": {"layer_types": [SLIDING, SLIDING]},
    "gpt_bigcode, several keys": {"multi_query": False},
    "granite, scaled": {"logits_scaling": 3.0},
    "opt, projected": {"word_embed_proj_dim": 8},
    "phi3, no window": {"sliding_window": None, "layer_types": None},
    "qwen2, no window": {"use_sliding_window": False, "layer_types": None},
    "stablelm, parallel": {"use_parallel_residual": True, "qk_layernorm": True},
}
LINES = [*FAMILIES, *VARIANTS]
QUICK = ("bloom", "falcon, alibi", "gemma2", "llama", "opt", "t5")
HEAVY = [line if line in QUICK else pytest.param(line, marks=pytest.mark.slow) for line in LINES]
OWN_KERNEL = ("bloom", "gemma2", "mpt")


@cache
def model_of(line: str, dtype: torch.dtype, **changes):
    """A small model of one line in eager attention, its norms and biases away from 1 and 0."""
    name = line.split(",")[0]
    settings = {**TINY, **CHANGES.get(name, {}), **VARIANTS.get(line, {}), **changes}
    config = transformers.AutoConfig.for_model(name, **{k: v for k, v in settings.items() if (k, v) != ("head_dim", None)})
    kind = {"encoder": "MaskedLM", "both": "Seq2SeqLM"}.get(FAMILIES[name].attention, "CausalLM")
    make = getattr(transformers, f"AutoModelFor{kind}")
    model = seeded(0, lambda: make.from_config(config, attn_implementation="eager")).to(dtype).eval()
    noise = seeded(1, lambda: [torch.randn(p.shape).to(dtype) for p in model.parameters()])
    with torch.no_grad():
        for param, step in zip(model.parameters(), noise, strict=True):
            param.add_(step, alpha=0.1)
    return model


def labelled(line: str, batch: dict) -> dict:
    """The batch for the family's criterion: every real token is a label."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return {**batch, "labels": batch["input_ids"].masked_fill(mask == 0, -100)}


def criterion_of(line: str) -> fs.Criterion:
    return {"encoder": fs.masked_lm, "both": fs.seq2seq_lm}.get(FAMILIES[line.split(",")[0]].attention, fs.causal_lm)


def inputs_of(line: str) -> dict[str, dict]:
    """Batches by name: padding on both sides, no mask, positions that are shifted, counted or start again."""
    right, left = (tokens(7, 3, 9, pad=4, left=side) for side in (False, True))
    bare = {"input_ids": right["input_ids"].clamp(min=1)}
    made = {"right": right, "left": left, "no mask": bare}
    if FAMILIES[line.split(",")[0]].attention == "both":
        return {kind: labelled(line, batch) for kind, batch in made.items()}
    if line in ("bloom", "distilbert", "mpt"):  # they take no positions
        return made
    counted = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    shifted, again = torch.arange(3, 12).expand(3, 9), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(3, 9)
    positions = {"counted": {**left, "position_ids": counted}, "shifted": {**bare, "position_ids": shifted}}
    return {**made, **positions, "packed": {**bare, "position_ids": again}}


@pytest.mark.parametrize("line", LINES)
def test_logits_are_the_untouched_models(line):
    model = model_of(line, torch.float32)
    net = fs.functional(model)
    batches = inputs_of(line)
    cacheless = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        for kind, batch in batches.items():
            read = batch.get("labels", batch.get("attention_mask", batch["input_ids"])).ge(0)
            read &= batch.get("attention_mask", read).bool()
            theirs = model(**batch, **cacheless).logits[read]
            scale = float(theirs.abs().max())
            ours = net.apply(net.params, batch)[read]
            assert_close(ours, theirs, rtol=0, atol=3e-6 * scale, msg=lambda text, kind=kind: f"{kind}: {text}")
    if FAMILIES[line.split(",")[0]].window != "none" and "no window" not in line:
        far = fs.functional(model_of(line, torch.float32, sliding_window=32))
        near, whole = (n.apply(n.params, batches["no mask"]).detach() for n in (net, far))
        assert (near - whole).abs().max() > 1e-3  # the window matters in these texts


def mean_loss(model, line, batches):
    """The untouched model's mean loss over all scored tokens of all batches."""
    shift = criterion_of(line) is fs.causal_lm
    scored = []
    for batch in batches:
        labels = batch["labels"][:, int(shift) :]
        given = batch if criterion_of(line) is fs.seq2seq_lm else {k: v for k, v in batch.items() if k != "labels"}
        logits = model(**given).logits
        logits = logits[:, :-1] if shift else logits
        scored.append(F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), ignore_index=-100, reduction="none"))
    count = sum(int((batch["labels"][:, int(shift) :] != -100).sum()) for batch in batches)
    return torch.cat(scored).sum() / count


def flat(tensors, params):
    return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, params, strict=True)])


@cache
def studied(line: str):
    """The model in float64, its loss over a ragged pair of batches, and both first derivatives that torch itself has."""
    model = model_of(line, torch.float64)
    batches = [labelled(line, tokens(1, 3, 9, pad=3)), labelled(line, tokens(2, 2, 5))]
    loss = fs.objective(fs.functional(model), batches, criterion_of(line))
    params = [dict(model.named_parameters())[name] for name in loss.net.layout.names]
    value = mean_loss(model, line, batches)
    slope = flat(torch.autograd.grad(value, params, create_graph=True, allow_unused=True), params)
    return model, loss, params, value, slope


def tolerance(line: str) -> float:
    return 2e-5 if computes_in_float32(model_of(line, torch.float64).config) else 1e-10


@pytest.mark.parametrize("line", LINES)
def test_loss_and_gradient_are_the_untouched_models(line):
    _, loss, _, value, slope = studied(line)
    theta, slope, within = loss.net.theta, slope.detach(), tolerance(line)
    assert_close(loss(theta), value.detach().double(), rtol=within, atol=0)
    ours = grad(loss)(theta)
    assert float((ours - _without_padding_rows(loss, slope, ours)).norm() / slope.norm()) < within


def _without_padding_rows(loss, theirs, ours):
    """Reverse mode leaves out the row of `padding_idx` in the untouched model; nothing is to be compared there."""
    return torch.where((theirs == 0) & (ours != 0), ours, theirs)


@pytest.mark.parametrize("line", HEAVY)
def test_hessian_products_are_those_of_double_backward(line):
    _, loss, params, _, slope = studied(line)
    theta, within = loss.net.theta, tolerance(line)
    v = fs.normal(fs.key(1), theta)
    theirs = flat(torch.autograd.grad(slope @ v, params, allow_unused=True, retain_graph=True), params)
    for ours in (fs.hessian(loss, theta)(v), jvp(grad(loss), (theta,), (v,))[1]):
        assert float((ours - _without_padding_rows(loss, theirs, ours)).norm() / theirs.norm()) < within


@pytest.mark.parametrize("line", HEAVY)
def test_the_dtype_that_it_computes_in(line):
    """In float64 throughout, a difference over 1e-9 of theta is a slope; with float32 inside it is noise."""
    _, loss, _, _, _ = studied(line)
    theta = loss.net.theta
    d = fs.normal(fs.key(1), theta)
    d *= theta.norm() / d.norm()
    with torch.no_grad():
        difference = (loss(theta + 1e-9 * d) - loss(theta - 1e-9 * d)) / 2e-9
    slope = jvp(loss, (theta,), (d,))[1]
    noisy = abs(float(difference - slope)) > 1e-3 * abs(float(slope))
    assert noisy == computes_in_float32(model_of(line, torch.float64).config)
    assert (loss.net.unit_roundoff > 1e-8) == noisy


@pytest.mark.parametrize("line", HEAVY)
def test_a_head_that_is_known_is_one_linear_map(line):
    """Against the model with an output of its own, whose logits exist as a whole."""
    model, loss, _, _, _ = studied(line)
    net, params, theta = loss.net, loss.net.params, loss.net.theta
    if net.head is None:
        with pytest.raises(ValueError, match="`head_chunk` needs"):
            fs.ggn(loss, theta, head_chunk=4)
        return
    moved = {name: value + 0.1 for name, value in params.items()}
    for inputs, _ in loss.batches:
        assert_close(net.readout(moved, net.hidden(moved, inputs)), net.apply(moved, inputs), rtol=1e-10, atol=1e-10)
    whole = fs.Loss(fs.functional(model, output=lambda out: out.logits), loss.batches, loss.criterion)
    assert whole.net.head is None
    v = fs.normal(fs.key(1), theta)
    for operator in (fs.hessian, fs.ggn):
        ours, theirs = operator(loss, theta, head_chunk=4)(v), operator(whole, theta)(v)
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance(line)


def test_a_head_that_is_scaled_or_capped_is_no_linear_map(monkeypatch):
    for line in ("granite, scaled", "gemma3_text, capped", "cohere"):
        net = studied(line)[1].net
        assert net.head is None
        monkeypatch.setattr("funcscope.core.model.has_linear_head", lambda _: True)
        bold = fs.functional(studied(line)[0])
        inputs = studied(line)[1].batches[0][0]
        off = bold.readout(bold.params, bold.hidden(bold.params, inputs)) - bold.apply(bold.params, inputs)
        assert off.abs().max() > 1e-2
        monkeypatch.undo()
