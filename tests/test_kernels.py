"""The kernel that a model has, and what one cannot be asked for. Oracle: the model as it is made, and called."""

import sys
import types
from copy import deepcopy

import pytest
import torch
import transformers
from problems import seeded, tokens
from test_architectures import model_of
from torch.testing import assert_close
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import funcscope as fs
from funcscope.core import attention_blocks

EVERY = ("auto", "blocks", "eager")


def test_a_falcon_counts_distances_once():
    model = model_of("falcon, alibi", torch.float64)
    batch = tokens(7, 3, 9, pad=4)
    theirs = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    net = fs.functional(model)
    ours = net.apply(net.params, batch)[batch["attention_mask"].bool()]
    assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_falcon_that_was_made_eager_counts_them_twice_and_is_left_so():
    fused = model_of("falcon, alibi", torch.float64)
    batch = tokens(7, 3, 9, pad=4)
    once = fused(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    config = deepcopy(fused.config)
    made = transformers.AutoModelForCausalLM.from_config
    model = seeded(0, lambda: made(config, attn_implementation="eager")).double().eval()
    model.load_state_dict(fused.state_dict())
    theirs = model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]
    assert (once - theirs).abs().max() > 1e-3
    for attention in ("auto", "eager", "keep"):
        net = fs.functional(model, attention=attention)
        assert_close(net.apply(net.params, batch)[batch["attention_mask"].bool()], theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "mpt"])
def test_a_functional_in_parts_is_cast_as_others_are(name):
    batch = tokens(7, 2, 6)
    net, single = (fs.functional(model_of(name, kind), attention="blocks") for kind in (torch.float64, torch.float32))
    cast = single.in_dtype(torch.float64)
    assert_close(cast.apply(net.params, batch), net.apply(net.params, batch))


def llama():
    return model_of("llama", torch.float64)


@pytest.mark.parametrize("attention", ["auto", "blocks", "eager", "keep"])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_refused(attention, name):
    net = fs.functional(llama(), attention=attention)
    past = transformers.DynamicCache(config=llama().config)
    with pytest.raises(ValueError, match=rf"`{name}` is a cache.*Pass whole sequences without it"):
        net.apply(net.params, {"input_ids": tokens(7, 2, 5)["input_ids"], name: past})


def test_attentions_are_asked_of_whole_scores():
    batch = {"input_ids": tokens(7, 2, 5)["input_ids"], "output_attentions": True}
    for attention in EVERY:
        net = fs.functional(llama(), attention=attention)
        if attention == "eager":
            net.apply(net.params, batch)
        else:
            with pytest.raises(ValueError, match=r'`output_attentions` needs whole scores.*`attention="eager"`'):
                net.apply(net.params, batch)


def halved(module, query, key, value, attention_mask, **options):
    return modeling_llama.eager_attention_forward(module, query / 2, key, value, attention_mask, **options)


def test_a_registered_attention_is_a_part_of_the_model():
    model = deepcopy(llama())
    transformers.AttentionInterface.register("halved", halved)
    model.set_attn_implementation("halved")
    for attention in (*EVERY, "math"):
        with pytest.raises(ValueError, match=r"'halved' is a function that is registered by other code.*keep"):
            fs.functional(model, attention=attention)
    net = fs.functional(model, attention="keep")
    ids = tokens(7, 2, 5)["input_ids"]
    assert_close(net.apply(net.params, ids), model(ids).logits)
    del ALL_ATTENTION_FUNCTIONS._global_mapping["halved"]


def test_attention_of_another_file_is_taken_whole(monkeypatch):
    """It may be anything: here, distances from the first key that it is given."""

    def with_distances(module, query, key, value, mask, scaling, dropout=0.0, **options):
        key = modeling_llama.repeat_kv(key, module.num_key_value_groups)
        value = modeling_llama.repeat_kv(value, module.num_key_value_groups)
        scores = query @ key.mT * scaling + 0.3 * torch.arange(key.shape[-2])
        return ((scores + mask).softmax(-1) @ value).transpose(1, 2).contiguous(), None

    file = types.ModuleType("somewhere_else")
    file.eager_attention_forward = with_distances
    monkeypatch.setitem(sys.modules, "somewhere_else", file)
    monkeypatch.setattr(attention_blocks, "LONG", 3)
    monkeypatch.setattr("funcscope.core.model.LONG", 3)
    monkeypatch.setattr(attention_blocks, "ROWS", 4)
    kind = type("OwnAttention", (modeling_llama.LlamaAttention,), {"__module__": "somewhere_else"})
    model = deepcopy(llama())
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    with pytest.raises(ValueError, match=r'pass `attention="eager"` instead of "blocks"'):
        fs.functional(model, attention="blocks")
    assert fs.functional(model).attention == "eager"


def test_scores_that_are_upcast_in_eager_attention_alone_are_whole():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=40, bos_token_id=1, eos_token_id=1,
        reorder_and_upcast_attn=True,
    )  # fmt: skip
    model = seeded(0, lambda: transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager"))
    model = model.to(torch.bfloat16).eval()
    assert fs.functional(model).attention == "eager"
    with pytest.raises(ValueError, match=r'pass `attention="eager"` instead of "blocks"'):
        fs.functional(model, attention="blocks")


def test_a_mask_for_each_head_beside_keys_that_heads_share(monkeypatch):
    monkeypatch.setattr(attention_blocks, "ROWS", 4)
    monkeypatch.setattr(attention_blocks, "LONG", 3)
    ids = tokens(7, 2, 9)["input_ids"]
    seen = seeded(3, lambda: torch.rand(2, 2, 9, 9).double() < 0.6) | torch.eye(9).bool()
    batch = {"input_ids": ids, "attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min).double()}
    nets = [fs.functional(llama(), attention=kind) for kind in ("blocks", "eager")]
    assert_close(*(net.apply(net.params, batch) for net in nets), rtol=0, atol=1e-6)


def test_autocast_lowers_products_by_blocks_as_it_does_whole_ones(monkeypatch):
    monkeypatch.setattr(attention_blocks, "ROWS", 4)
    monkeypatch.setattr(attention_blocks, "LONG", 3)
    model, ids = model_of("gpt2", torch.float32), tokens(7, 2, 9)["input_ids"]
    blocks, eager = (fs.functional(model, attention=kind) for kind in ("blocks", "eager"))
    exact = eager.apply(eager.params, ids)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (net.apply(net.params, ids).float() for net in (blocks, eager))
    assert (ours - exact).abs().max() < 2 * (theirs - exact).abs().max()
