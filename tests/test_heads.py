"""Slices of attention heads, checked by zeroing them in the model itself."""

from __future__ import annotations

import types
from functools import cache

import pytest
import torch
from problems import VOCAB, gpt_neox, qwen2, seeded, tokens
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import funcscope as fs
from funcscope.core.layout import Layout
from funcscope.curvature.gram import gram
from funcscope.curvature.rows import per_sample_gradients
from funcscope.fisher import Heads, head_part, head_views

WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 20}
SMALL = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 16,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
MODELS = {
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=12, n_head=3, vocab_size=VOCAB, n_positions=16)), "c_proj"),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **SMALL)), "o_proj"),
    "qwen2": (qwen2, "o_proj"),
    "gpt_neox": (gpt_neox, "dense"),
    "bert": (
        lambda: BertForMaskedLM(BertConfig(**(WIDE | SMALL | {"num_attention_heads": 2}))),
        "attention.output.dense",
    ),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(n_layer=2, n_head=3, hidden_size=12, vocab_size=VOCAB)), "dense"),
    "falcon": (
        lambda: FalconForCausalLM(FalconConfig(**SMALL, hidden_size=16, num_attention_heads=4, num_kv_heads=2,
                                               new_decoder_architecture=True, attn_implementation="eager")),
        "dense",
    ),
    "falcon_multi_query": (
        lambda: FalconForCausalLM(FalconConfig(**SMALL, hidden_size=16, num_attention_heads=4, multi_query=True,
                                               attn_implementation="eager")),
        "dense",
    ),
    "phi3": (lambda: Phi3ForCausalLM(Phi3Config(**WIDE, **SMALL, pad_token_id=0)), "o_proj"),
    "gpt_bigcode": (
        lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(n_layer=2, n_embd=12, n_head=3, vocab_size=VOCAB, n_positions=16)),
        "c_proj",
    ),
}  # fmt: skip
QUICK = ("gpt2", "llama", "gpt_neox", "falcon")
every = pytest.mark.parametrize("name", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in MODELS])


@cache
def model(name: str) -> nn.Module:
    """With weights and biases so large that attention is not nearly uniform from the start."""
    made = seeded(0, MODELS[name][0]).double().eval()
    if not name.startswith("falcon"):  # which would add its boolean mask then
        made.set_attn_implementation("eager")

    def spread():
        for param in made.parameters():
            param.data += torch.randn_like(param) / 3

    seeded(1, spread)
    return made


def zeroed(net: nn.Module, views):
    """A context in which those slices are zero."""
    params = dict(net.named_parameters())

    class Zeroed:
        def __enter__(self):
            self.old = {view.leaf: params[view.leaf].detach().clone() for view in views}
            for view in views:
                params[view.leaf].data.movedim(view.dim, 0)[view.slice] = 0

        def __exit__(self, *_):
            for name, value in self.old.items():
                params[name].data.copy_(value)

    return Zeroed()


def run(net: nn.Module):
    with torch.no_grad():
        out = net(tokens(3, 2, 6)["input_ids"], output_attentions=True)
    return out.logits, out.attentions


def output_module(net: nn.Module, name: str, attention: str) -> nn.Module:
    found = [m for path, m in net.named_modules() if path.startswith(attention) and path.endswith(MODELS[name][1])]
    assert len(found) == 1
    return found[0]


def ablated(net: nn.Module, module: nn.Module, heads: list[int], num: int):
    """The model whose attention gives nothing for those heads."""

    def silence(_, args):
        x = args[0].unflatten(-1, (num, -1)).clone()
        x[..., heads, :] = 0
        return (x.flatten(-2), *args[1:])

    handle = module.register_forward_pre_hook(silence)
    try:
        return run(net)[0]
    finally:
        handle.remove()


@every
def test_zero_slices_of_a_head_silence_that_head_and_no_other(name):
    net = model(name)
    views = head_views(fs.functional(net).layout, net.config)
    heads = Heads.of(net.config)
    share = heads.num // heads.num_kv
    logits, attentions = run(net)
    assert len({head_part(block).attention for block in views}) == len(attentions)
    assert len(views) == len(attentions) * 2 * (heads.num + heads.num_kv)
    layers = list(dict.fromkeys(head_part(block).attention for block in views))
    for block, cut in views.items():
        attention, kind, head = head_part(block)
        layer = layers.index(attention)
        readers = [head] if kind in "QO" else list(range(head * share, (head + 1) * share))
        with zeroed(net, cut):
            changed, maps = run(net)
        if kind in "VO":
            oracle = ablated(net, output_module(net, name, attention), readers, heads.num)
            assert not torch.allclose(oracle, logits, atol=1e-4)
            torch.testing.assert_close(changed, oracle, rtol=1e-6, atol=1e-6)
        elif name != "bloom":  # a zero score is uniform attention
            scores = maps[layer]
            flat = (scores > 0).double()
            flat /= flat.sum(-1, keepdim=True)
            off = (scores - flat).abs().amax((0, 2, 3))
            assert [i for i in range(heads.num) if off[i] < 1e-6] == readers
            rest = [i for i in range(heads.num) if i not in readers]
            torch.testing.assert_close(scores[:, rest], attentions[layer][:, rest], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bloom_keys_and_queries_without_scores_leave_the_slope():
    """Its attention without a score is the softmax of its bias by distance, the same for a query and a key of zero."""
    net = model("bloom")
    views = head_views(fs.functional(net).layout, net.config)
    _, before = run(net)
    for head in range(3):
        maps = []
        for kind in "QK":
            with zeroed(net, views[f"transformer.h.0.self_attention.{kind}.{head}"]):
                maps.append(run(net)[1][0])
        torch.testing.assert_close(maps[0], maps[1], rtol=1e-5, atol=1e-6)
        rest = [i for i in range(3) if i != head]
        torch.testing.assert_close(maps[0][:, rest], before[0][:, rest], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(maps[0][:, head], before[0][:, head], atol=1e-3)


@every
def test_no_coordinate_is_of_two_heads_and_all_of_queries_keys_and_values_are_of_one(name):
    net = fs.functional(model(name))
    count = net.layout.unravel(torch.zeros_like(net.theta))
    for cut in head_views(net, model(name).config).values():
        for view in cut:
            count[view.leaf].movedim(view.dim, 0)[view.slice] += 1
    for leaf, times in count.items():
        assert times.max() <= 1
        assert times.min() == times.max(), leaf  # a parameter is cut wholly or not at all


def test_grams_by_head_are_those_of_the_gradients_slices():
    net = fs.functional(model("gpt2"))
    loss = fs.objective(net, [tokens(5, 4, 6)], fs.causal_lm)
    views = head_views(net, model("gpt2").config)
    grams = gram(loss, net.theta, by=views)
    rows = per_sample_gradients(loss, net.theta)
    for block, cut in views.items():
        parts = [
            torch.stack([net.layout.unravel(r)[v.leaf].movedim(v.dim, 0)[v.slice].flatten() for r in rows]) for v in cut
        ]
        dense = torch.cat(parts, 1)
        torch.testing.assert_close(grams.block(block), dense @ dense.T, rtol=1e-9, atol=1e-12)


def test_the_documented_head_dimension_cuts_keys_of_grouped_queries_wrongly():
    """E21: hidden // n_kv is not the width of a head; rows // n_kv is."""
    net = model("llama")
    key = head_views(fs.functional(net).layout, net.config)["model.layers.0.self_attn.K.1"][0]
    hidden, num_kv, rows = (
        net.config.hidden_size,
        net.config.num_key_value_heads,
        net.model.layers[0].self_attn.k_proj.out_features,
    )
    assert key.slice == slice(rows // num_kv, 2 * rows // num_kv)
    assert (hidden // num_kv) * num_kv != rows  # so that `view` failed, and rows were taken for heads
    gpt2 = head_views(fs.functional(model("gpt2")).layout, model("gpt2").config)["transformer.h.0.attn.Q.1"]
    assert gpt2[0].dim == 1  # a Conv1D's rows are inputs


def test_what_cannot_be_cut_is_refused():
    layout = fs.functional(model("gpt_neox")).layout
    with pytest.raises(ValueError, match="order that is not known for the model type 'codegen'"):
        head_views(layout, types.SimpleNamespace(num_attention_heads=2, model_type="codegen"))
    with pytest.raises(ValueError, match="multiple of its"):
        head_views(layout, types.SimpleNamespace(num_attention_heads=5, model_type="gpt_neox"))
    with pytest.raises(ValueError, match="no parameter has the name"):
        head_views(Layout.of(seeded(0, lambda: nn.Linear(2, 2))), types.SimpleNamespace(num_attention_heads=2))
    with pytest.raises(ValueError, match="num_attention_heads"):
        head_views(layout, types.SimpleNamespace())
    with pytest.raises(ValueError, match="multiple of `num_key_value_heads`"):
        head_views(layout, types.SimpleNamespace(num_attention_heads=3, num_key_value_heads=2))
    llama = fs.functional(model("llama")).layout
    with pytest.raises(ValueError, match="equally wide, got"):
        head_views(llama, types.SimpleNamespace(num_attention_heads=4, num_key_value_heads=4))
    with pytest.raises(ValueError, match="blocks must be named"):
        head_part("layer.0")
