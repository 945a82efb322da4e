"""Weights of heads and circuits. Oracles: the model's own sites, dense V x V matrices, the model with a head removed."""

from functools import cache

import pytest
import torch
from problems import tokens
from test_architectures import model_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.mechanistic.weights import Weights, head_weights

CAUSAL = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2")
FAMILIES = (*CAUSAL, "bert")


@cache
def net_of(line, dtype=torch.float64, **changes):
    return fs.functional(model_of(line, dtype, **changes))


def batch(pad=3, left=False):
    return tokens(3, 3, 8, pad=pad, left=left)


@pytest.mark.parametrize("line", FAMILIES)
@pytest.mark.parametrize("left", [False, True])
def test_matrices_of_heads_make_the_models_own_sites(line, left):
    net = net_of(line)
    w = Weights(net, net.params)
    names = ["attn_in"] if line != "bert" else ["resid_pre"]
    rotated = line not in ("gpt2", "bert")
    names += ["q", "k", "v", "z", "result", *(["rot_q", "rot_k"] if rotated else [])]
    seen = fs.trace(net, net.params, batch(left=left), names)
    for layer in range(w.num_layers):
        heads = w.heads(layer)
        x = seen[f"{names[0]}.{layer}"]
        made = {name: torch.einsum("btD,hdD->bthd", x, getattr(heads, name)) for name in "qkv"}
        made = {name: value + heads.biases[name] if name in heads.biases else value for name, value in made.items()}
        for name, norm in zip("qk", w.head_norms(layer), strict=True):
            made[name] = made[name] if norm is None else norm(made[name])
        for name in "qkv":
            assert_close(made[name], seen[f"{name}.{layer}"], rtol=1e-5, atol=1e-6)
        result = torch.einsum("bthe,hDe->bthD", seen[f"z.{layer}"], heads.o)
        assert_close(result, seen[f"result.{layer}"], rtol=1e-5, atol=1e-7)
        if rotated:
            turned = w.rotated(made["q"].transpose(1, 2), torch.arange(8).expand(3, 2, 8)).transpose(1, 2)
            assert_close(turned, seen[f"rot_q.{layer}"], rtol=1e-5, atol=1e-6)
        assert heads.scaling == seen.kernels[layer].scaling


@pytest.mark.parametrize("line", CAUSAL)
def test_norms_and_head_make_the_models_own_logits(line):
    net = net_of(line)
    w = Weights(net, net.params)
    seen = fs.trace(net, net.params, batch(), ["resid_post", "final", "final_scale", "logits", "tok_embed"])
    last = seen["resid_post"][-1]
    assert_close(w.final(last), seen["final"], rtol=1e-5, atol=1e-6)
    assert_close(w.final.scale(last), seen["final_scale"], rtol=1e-6, atol=0)
    assert_close(w.logits(w.final(last)), seen["logits"], rtol=1e-5, atol=1e-6)
    assert_close(w.embedding[batch()["input_ids"]], seen["tok_embed"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("line", [line for line in CAUSAL if line not in ("qwen3", "gemma2")])
def test_scores_are_the_circuit_at_their_distance(line):
    net = net_of(line)
    heads, q, k = head_weights(net, net.params, 0), 5, 3
    seen = fs.trace(net, net.params, batch(), ["attn_in", "scores"])
    x = seen["attn_in.0"][0].double()
    bias = {name: heads.biases.get(name, torch.zeros(())) for name in "qk"}
    circuit = heads.qk(q - k)
    made = torch.einsum("D,hDE,E->h", x[q], circuit, x[k])
    if heads.biases:  # the rest is linear in one of the two
        turn = torch.eye(heads.q.shape[1]).double() if heads.rotation is None else heads.rotation(q - k)
        kb, qb = heads.shared(bias["k"]), bias["q"]
        made = made + heads.scaling * (
            torch.einsum("hd,hdD,D->h", qb, heads.rotated_k(q - k), x[k])
            + torch.einsum("D,hdD,de,he->h", x[q], heads.q, turn, kb)
            + torch.einsum("hd,de,he->h", qb, turn, kb)
        )
    assert_close(made, seen["scores.0"][0, :, q, k], rtol=1e-5, atol=1e-6)
    if heads.rotation is not None:
        assert not torch.allclose(circuit, heads.qk(), rtol=1e-3)


@pytest.mark.parametrize("line", ["gpt2", "gpt_neox", "llama"])
def test_cuts_of_the_documented_formula_are_others(line):
    """Rows of W_O for every family, thirds of a fused matrix, head % kv heads: square matrices, and no error."""
    net = net_of(line, num_attention_heads=4, num_key_value_heads=2, head_dim=4) if line == "llama" else net_of(line)
    heads = head_weights(net, net.params, 0)
    seen = fs.trace(net, net.params, batch(), ["attn_in", "z", "v", "result"])
    if line == "gpt2":
        weight = net.params["transformer.h.0.attn.c_proj.weight"]
        theirs = torch.stack([weight[:, h * 8 : (h + 1) * 8] for h in range(2)])
        assert not torch.allclose(torch.einsum("bthe,hDe->bthD", seen["z.0"], theirs), seen["result.0"], rtol=1e-2)
    if line == "gpt_neox":
        weight = net.params["gpt_neox.layers.0.attention.query_key_value.weight"]
        theirs = weight.chunk(3)[2].unflatten(0, (2, -1))
        assert not torch.allclose(theirs, heads.v, rtol=1e-2)
    if line == "llama":
        pattern = fs.trace(net, net.params, batch(), ["pattern"])["pattern.0"]
        good, bad = (seen["v.0"][:, :, [index(h) for h in range(4)]] for index in (lambda h: h // 2, lambda h: h % 2))
        assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, good), seen["z.0"], rtol=1e-5, atol=1e-6)
        assert_close(heads.shared(heads.v), heads.v[[0, 0, 1, 1]])
        assert not torch.allclose(torch.einsum("bhqk,bkhd->bqhd", pattern, bad), seen["z.0"], rtol=1e-2)


def test_what_is_not_described_says_so():
    net = fs.functional(model_of("opt", torch.float64))
    with pytest.raises(ValueError, match="not described"):
        head_weights(net, net.params, 0)
    net = net_of("gpt2")
    with pytest.raises(ValueError, match="0 to 1, got 2"):
        head_weights(net, net.params, 2)
    net = net_of("bert")
    with pytest.raises(ValueError, match="not linear"):
        _ = Weights(net, net.params).unembedding
