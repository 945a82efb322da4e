"""Every line of the table of architectures, against the untouched model: a family is added by its line alone."""

import warnings
from functools import cache

import pytest
import torch
import transformers
from problems import VOCAB, seeded, tokens
from torch.func import grad, jvp
from torch.nn import functional as F
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import attention_blocks
from funcscope.core.architectures import FAMILIES, FULL, SLIDING, computes_in_float32
from funcscope.core.brief_masks import is_brief

TINY = {
    "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": VOCAB, "max_position_embeddings": 32, "bos_token_id": 1,
    "eos_token_id": 1, "pad_token_id": 0, "sliding_window": 4, "use_sliding_window": True, "layer_types": [SLIDING, FULL],
}  # fmt: skip
"""One configuration for all: whoever has no window must leave it alone."""
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "head_dim": 4,
    "n_group": 2, "topk_group": 1, "num_key_value_heads": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
BOTH = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "decoder_start_token_id": 2, "layer_types": ..., "hidden_size": ...,
    "num_attention_heads": ..., "num_hidden_layers": ...,
}  # fmt: skip
CHANGES = {
    **dict.fromkeys(("bart", "marian", "mbart", "pegasus"), BOTH),
    "deepseek_v2": {**EXPERTS, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "deepseek_v3": {**EXPERTS, **LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "gpt_oss": EXPERTS,
    "mamba": {"state_size": 4, "layer_types": ...},
    "mamba2": {"state_size": 4, "layer_types": ..., "num_heads": 4, "n_groups": 2, "chunk_size": 4, "expand": 2},
    "mixtral": EXPERTS,
    "modernbert": {"cls_token_id": 1, "sep_token_id": 1},
    "olmoe": {**EXPERTS, "num_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**EXPERTS, "num_experts": 4},
    "albert": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 20},
    "falcon": {"head_dim": ...},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
    "gptj": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 20},
    "t5": {
        "layer_types": None,
        "num_decoder_layers": 2,
        "d_kv": 8,
        "d_ff": 20,
        "decoder_start_token_id": 0,
        "relative_attention_num_buckets": 8,
    },
}
"""By model type, added to that; `...` takes a setting out."""
VARIANTS = {
    "deepseek_v2, groups": {"topk_method": "group_limited_greedy", "n_routed_experts": 4},
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
SPEECH = "whisper"
LINES = [*(name for name in FAMILIES if name != SPEECH), *VARIANTS]
QUICK = ("bloom", "falcon, alibi", "gemma2", "llama", "opt", "t5")
HEAVY = [line if line in QUICK else pytest.param(line, marks=pytest.mark.slow) for line in LINES]
OWN_KERNEL = ("bloom", "gemma2", "mpt")


@cache
def model_of(line: str, dtype: torch.dtype, **changes):
    """A small model of one line in eager attention, its norms and biases away from 1 and 0."""
    name = line.split(",")[0]
    settings = {**TINY, **CHANGES.get(name, {}), **VARIANTS.get(line, {}), **changes}
    config = transformers.AutoConfig.for_model(name, **{k: v for k, v in settings.items() if v is not ...})
    kind = {"encoder": "MaskedLM", "both": "Seq2SeqLM"}.get(FAMILIES[name].attention, "CausalLM")
    make = getattr(transformers, f"AutoModelFor{kind}")
    fused = line == "falcon, alibi"  # whose eager attention adds its distances twice
    kernels = {"attn_implementation": "sdpa" if fused else "eager"} | (
        {"experts_implementation": "eager"} if FAMILIES[name].routed else {}
    )
    model = seeded(0, lambda: make.from_config(config, **kernels)).to(dtype).eval()
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
    if FAMILIES[line.split(",")[0]].attention == "none":
        return {kind: batch for kind, batch in made.items() if kind != "left"}
    if line in ("bloom", "mpt"):  # they take no positions
        return made
    counted = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    shifted, again = torch.arange(3, 12).expand(3, 9), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(3, 9)
    positions = {"counted": {**left, "position_ids": counted}, "shifted": {**bare, "position_ids": shifted}}
    packed = {} if line == "falcon, alibi" else {"packed": {**bare, "position_ids": again}}  # which counts for itself
    return {**made, **positions, **packed}


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
        scored.append(
            F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), ignore_index=-100, reduction="none")
        )
    count = sum(int((batch["labels"][:, int(shift) :] != -100).sum()) for batch in batches)
    return torch.cat(scored).sum() / count


def flat(tensors, params):
    return torch.cat(
        [(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in zip(tensors, params, strict=True)]
    )


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        monkeypatch.setattr("funcscope.core.readout.has_linear_head", lambda _: True)
        bold = fs.functional(studied(line)[0])
        inputs = studied(line)[1].batches[0][0]
        off = bold.readout(bold.params, bold.hidden(bold.params, inputs)) - bold.apply(bold.params, inputs)
        assert off.abs().max() > 1e-2
        monkeypatch.undo()


def unknown(name: str):
    """A small model whose masks the table does not know, in float32 and with the kernel that transformers chooses."""
    experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    more = {"shared_expert_intermediate_size": 8, "state_size": 4, "cls_token_id": 1, "sep_token_id": 1}
    settings = {**TINY, **experts, **more}
    settings = {k: v for k, v in settings.items() if k not in ("sliding_window", "use_sliding_window", "layer_types")}
    config = transformers.AutoConfig.for_model(name, **settings)
    return seeded(0, lambda: transformers.AutoModelForCausalLM.from_config(config)).eval()


def by_differences(value, params, d, step):
    """The untouched model's gradient, and its Hessian product by the difference of two of them."""

    def slope(shift):
        places = d.split([p.numel() for p in params])
        with torch.no_grad():
            for param, part in zip(params, places, strict=True):
                param.add_(part.view_as(param), alpha=shift)
        found = flat(torch.autograd.grad(value(), params, allow_unused=True), params)
        with torch.no_grad():
            for param, part in zip(params, places, strict=True):
                param.sub_(part.view_as(param), alpha=shift)
        return found

    return slope(0.0), (slope(step) - slope(-step)) / (2 * step)


@pytest.mark.parametrize("name", ["falcon_mamba", "granitemoe", "modernbert-decoder"])
def test_what_is_not_known_is_refused_and_what_the_refusal_offers_is_right(name):
    model = unknown(name)
    mask = tokens(1, 3, 9, pad=3)
    batch = {**mask, "labels": mask["input_ids"].masked_fill(mask["attention_mask"] == 0, -100)}
    with pytest.raises(ValueError, match=rf"how a '{name}' model masks its attention is not known.*attention=\"keep\""):
        fs.objective(fs.functional(model), [batch], fs.causal_lm)
    net = fs.functional(model, attention="keep")
    loss, theta = fs.objective(net, [batch], fs.causal_lm), net.theta
    params = [dict(model.named_parameters())[leaf] for leaf in net.layout.names]

    def value():
        logits = model(**mask).logits[:, :-1]
        return F.cross_entropy(logits.reshape(-1, VOCAB), batch["labels"][:, 1:].reshape(-1), ignore_index=-100)

    d = fs.normal(fs.key(1), theta)
    d /= d.norm()
    slope, product = by_differences(value, params, d, 1e-2)
    assert_close(loss(theta).float(), value().detach(), rtol=1e-5, atol=0)
    assert float((grad(loss)(theta) - slope).norm() / slope.norm()) < 1e-5
    matvec = fs.hessian_difference(loss, theta, step=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where experts change, steps disagree, and the product says by how much
        ours = matvec(d)
    assert float((ours - product).norm() / product.norm()) < max(1e-3, 3 * matvec.error() / float(product.norm()))


def masks_by_hand(mask, length):
    """Float masks of a causal model, full and with a window, written out position by position."""
    rows, n = mask.shape
    full, near = torch.full((2, rows, 1, n, n), torch.finfo(torch.float32).min)
    for row in range(rows):
        for q in range(n):
            for k in range(q + 1):
                if mask[row, k]:
                    full[row, 0, q, k] = 0
                    if q - k < length:
                        near[row, 0, q, k] = 0
    return full, near


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_a_family_with_layer_types_is_offered_a_mapping_that_is_right(name, monkeypatch):
    model, batch = model_of(name, torch.float32), tokens(7, 3, 9, pad=4)
    known = fs.functional(model)
    monkeypatch.delitem(FAMILIES, name)
    net = fs.functional(model)
    with pytest.raises(ValueError, match=r"mapping of two float masks.*'full_attention' and 'sliding_attention'"):
        net.apply(net.params, batch)
    full, near = masks_by_hand(batch["attention_mask"], 4)
    ids, read = batch["input_ids"], batch["attention_mask"].bool()
    with pytest.raises(ValueError, match="of several types"):
        net.apply(net.params, {"input_ids": ids, "attention_mask": full})
    masks = {FULL: full, SLIDING: near}
    with torch.no_grad():
        ours = net.apply(net.params, {"input_ids": ids, "attention_mask": masks})
        assert_close(ours[read], model(**batch).logits[read], rtol=1e-5, atol=1e-5)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"of several types.*\(batch, tokens\)"):
        known.apply(known.params, {"input_ids": ids, "attention_mask": full})


def test_masks_of_four_dimensions_where_the_model_counts_in_two():
    batch = {"input_ids": tokens(7, 3, 9)["input_ids"], "attention_mask": torch.zeros(3, 1, 9, 9)}
    for line, remedy in (
        ("bloom", r"\(batch, tokens\)"),
        ("falcon, alibi", r"\(batch, tokens\)"),
        ("opt", "`position_ids`"),
    ):
        net = fs.functional(model_of(line, torch.float32))
        with pytest.raises(ValueError, match=remedy):
            net.apply(net.params, batch)
    bloom = fs.functional(model_of("bloom", torch.float64))
    with pytest.raises(ValueError, match="pad them on the right"):
        bloom.apply(bloom.params, tokens(7, 3, 9, pad=4, left=True))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_states_that_run_through_a_text(name):
    """Mapped over parameters, and without padding on the left, which they count in some batches and not in others."""
    loss = studied(name)[1]
    theta, v = loss.net.theta, fs.normal(fs.key(1), loss.net.theta)
    assert loss.is_mapped()
    ends = torch.stack([theta, theta + 0.1 * v])
    assert_close(torch.func.vmap(loss)(ends), torch.stack([loss(end) for end in ends]), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="pad texts on the right"):
        loss.net.prepare(tokens(7, 3, 9, pad=4, left=True))
    with pytest.raises(ValueError, match=r"has no attention: .* shape \(batch, tokens\)"):
        loss.net.prepare({"input_ids": tokens(7, 3, 9)["input_ids"], "attention_mask": torch.zeros(3, 1, 9, 9).bool()})
    assert loss.net.attention == "eager"


def test_attention_in_both_directions_is_not_known_of_a_causal_family():
    net = fs.functional(model_of("gemma3_text", torch.float32, use_bidirectional_attention=True))
    with pytest.raises(ValueError, match=r"'gemma3_text'.*attention=\"keep\""):
        net.apply(net.params, tokens(7, 3, 9))


@pytest.mark.parametrize("name", OWN_KERNEL)
def test_a_model_without_the_kernel_names_the_one_that_it_has(name):
    with pytest.raises(ValueError, match='attention="eager"'):
        fs.functional(model_of(name, torch.float32), attention="math")


def test_speech_has_every_derivative(monkeypatch):
    """Whisper's logits, gradient and Hessian product, of features and of what is to be said, part of which is not scored."""
    sizes = {key: value for key, value in BOTH.items() if value is not ...}
    more = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20, "vocab_size": VOCAB}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **more, **special)
    make = transformers.WhisperForConditionalGeneration._from_config
    model = seeded(0, lambda: make(config, attn_implementation="eager")).double().eval()
    sound, labels = seeded(1, lambda: (torch.randn(3, 8, 20).double(), torch.randint(3, VOCAB, (3, 6))))
    labels[1, 4:] = -100
    loss = fs.objective(fs.functional(model), [{"input_features": sound, "labels": labels}], fs.seq2seq_lm)
    theta, params = loss.net.theta, [model.get_parameter(name) for name in loss.layout.names]
    value = model(input_features=sound, labels=labels).loss
    slope = flat(torch.autograd.grad(value, params, create_graph=True), params)
    v = fs.normal(fs.key(1), theta)
    product = flat(torch.autograd.grad(slope @ v, params, allow_unused=True), params)
    assert_close(loss(theta), value.detach(), rtol=1e-10, atol=0)
    assert float((grad(loss)(theta) - slope.detach()).norm() / slope.detach().norm()) < 1e-10
    assert float((fs.hessian(loss, theta)(v) - product).norm() / product.norm()) < 1e-10
    ends = torch.stack([theta, theta + 0.1 * v])
    assert_close(torch.func.vmap(loss)(ends), torch.stack([loss(end) for end in ends]), rtol=1e-8, atol=0)
    monkeypatch.setattr(attention_blocks, "ROWS", 4)
    batch = {"input_features": sound, "labels": labels}
    parts = fs.objective(fs.functional(model, attention="blocks"), [batch], fs.seq2seq_lm)
    assert is_brief(parts.batches[0][0]["decoder_attention_mask"])
    assert float((fs.hessian(parts, theta)(v) - product).norm() / product.norm()) < 1e-10


IMAGES = {
    "beit": {"layer_scale_init_value": 0.1},
    "convnext": {
        "hidden_sizes": [4, 6],
        "depths": [1, 1],
        "num_stages": 2,
        "patch_size": 2,
        "layer_scale_init_value": 0.1,
    },
    "deit": {},
    "dinov2": {"mlp_ratio": 2, "layerscale_value": 0.1},
    "resnet": {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"},
    "swin": {
        "embed_dim": 4,
        "depths": [2, 1],
        "num_heads": [1, 2],
        "window_size": 2,
        "patch_size": 1,
        "num_attention_heads": ...,
    },
    "vit": {},
}
"""Small classifiers of images: what they have beside the sizes of all; `...` takes one out."""
FEW_IMAGES = [line if line == "vit" else pytest.param(line, marks=pytest.mark.slow) for line in IMAGES]


@cache
def classifier(line: str):
    """In float64, with normalisers that are not those of a new model."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {**sizes, "image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3, **IMAGES[line]}
    config = transformers.AutoConfig.for_model(line, **{k: v for k, v in settings.items() if v is not ...})
    kinds = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    kind = kinds[0] if isinstance(kinds, tuple) else kinds
    model = seeded(0, lambda: kind(config)).double().eval()
    noise = seeded(1, lambda: [torch.randn(p.shape).double() for p in model.parameters()])
    with torch.no_grad():
        for param, step in zip(model.parameters(), noise, strict=True):
            param.add_(step, alpha=0.1)
    return model


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of Swin's pooling, mapped
@pytest.mark.parametrize("line", FEW_IMAGES)
def test_images_have_every_derivative(line):
    """Logits, gradients and Hessian products of the untouched model by double backward, and mapped over parameters."""
    model = classifier(line)
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    x, y = seeded(1, lambda: torch.randn(3, 1, 8, 8).double()), torch.tensor([0, 1, 2])
    net = fs.functional(model)
    loss, theta = fs.objective(net, [({"pixel_values": x}, y)], fs.classification), net.theta
    params = [dict(model.named_parameters())[leaf] for leaf in net.layout.names]
    logits = model(pixel_values=x).logits
    value = F.cross_entropy(logits, y)
    slope = flat(torch.autograd.grad(value, params, create_graph=True, allow_unused=True), params)
    v = fs.normal(fs.key(1), theta)
    product = flat(torch.autograd.grad(slope @ v, params, allow_unused=True), params)
    assert_close(net.apply(net.params, {"pixel_values": x}), logits, rtol=1e-8, atol=1e-8)
    assert_close(loss(theta), value.detach(), rtol=1e-8, atol=0)
    assert float((grad(loss)(theta) - slope.detach()).norm() / slope.detach().norm()) < 1e-8
    for ours in (fs.hessian(loss, theta)(v), jvp(grad(loss), (theta,), (v,))[1]):
        assert float((ours - product).norm() / product.norm()) < 1e-7  # ViT takes its softmax in float32
    ends = torch.stack([theta, theta + 0.1 * v])
    assert_close(torch.func.vmap(loss)(ends), torch.stack([loss(end) for end in ends]), rtol=1e-8, atol=0)
