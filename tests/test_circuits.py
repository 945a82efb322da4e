"""Weights of heads and circuits. Oracles: the model's own sites, dense V x V matrices, the model with a head removed."""

import math
from functools import cache

import pytest
import torch
from problems import tokens
from test_architectures import model_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.linalg.ranks import matrix_ranks
from funcscope.mechanistic import full_circuit, qk_ov_circuits
from funcscope.mechanistic.weights import Weights, head_weights

CAUSAL = ("gpt2", "gemma2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
EVERY = [line if line in CAUSAL[:2] else pytest.param(line, marks=pytest.mark.slow) for line in CAUSAL]
FAMILIES = [*EVERY, pytest.param("bert", marks=pytest.mark.slow)]


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


@pytest.mark.parametrize("line", EVERY)
def test_norms_and_head_make_the_models_own_logits(line):
    net = net_of(line)
    w = Weights(net, net.params)
    seen = fs.trace(net, net.params, batch(), ["resid_post", "final", "final_scale", "logits", "tok_embed"])
    last = seen["resid_post"][-1]
    assert_close(w.final(last), seen["final"], rtol=1e-5, atol=1e-6)
    assert_close(w.final.scale(last), seen["final_scale"], rtol=1e-6, atol=0)
    assert_close(w.logits(w.final(last)), seen["logits"], rtol=1e-5, atol=1e-6)
    assert_close(w.embedding[batch()["input_ids"]], seen["tok_embed"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("line", ["gpt2", *EVERY[2:-1]])
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


# circuits, against dense matrices


def dense(net, fold):
    """W_QK, W_OV (layer, head, D, D), W_E (D, V), W_U (V, D), with norms as dense matrices where they are folded."""
    w = Weights(net, net.params)

    def matrix(norm):
        size = len(norm.gain)
        centre = torch.eye(size, dtype=norm.gain.dtype) - (1 / size if norm.centred else 0)
        return torch.diag(norm.gain) @ centre

    qk, ov = [], []
    for layer in range(w.num_layers):
        heads = w.heads(layer)
        q, k, v, o = heads.q, heads.shared(heads.k), heads.shared(heads.v), heads.o
        if fold:
            reads = matrix(w.norm(w.body.anatomy.attn_in, layer)) if w.body.anatomy.attn_in else None
            gains = [torch.ones(()) if norm is None else norm.gain[:, None] for norm in w.head_norms(layer)]
            q, k, v = (x if reads is None else x @ reads for x in (gains[0] * q, gains[1] * k, v))
            behind = w.write_norms(layer)[0]
            o = o if behind is None else matrix(behind) @ o
        qk.append(heads.scaling * q.mT @ k)
        ov.append(o @ v)
    return torch.stack(qk), torch.stack(ov), w


@pytest.mark.parametrize("line", FAMILIES)
@pytest.mark.parametrize("fold", [True, False])
def test_circuits_are_those_of_dense_matrices(line, fold):
    net = net_of(line)
    found = qk_ov_circuits(net, net.params, fold=fold)
    qk, ov, w = dense(net, fold)
    assert_close(found.qk_norm, qk.flatten(2).norm(dim=-1))
    assert_close(found.ov_norm, ov.flatten(2).norm(dim=-1))
    for layer in range(2):
        for head in range(2):
            assert_close(
                float(found.qk_rank[layer, head]), matrix_ranks(qk[layer, head]).effective_rank, rtol=1e-6, atol=0
            )
            assert_close(
                float(found.ov_rank[layer, head]), matrix_ranks(ov[layer, head]).effective_rank, rtol=1e-6, atol=0
            )
    if line == "bert":
        assert found.copying_score.isnan().all()
        assert "not linear" in found.notes[-1]
    else:
        bare = w.unembedding[0] @ (torch.diag(w.final.gain) @ _centre(w.final) if fold else torch.eye(16).double())
        for centred, out in ((True, bare - bare.mean(0)), (False, bare)):
            values = torch.linalg.eigvals(out @ ov @ w.embedding.T)  # V x V
            score = qk_ov_circuits(net, net.params, fold=fold, centred=centred).copying_score
            assert_close(score, values.real.sum(-1) / values.abs().sum(-1), rtol=1e-6, atol=1e-6)
    for a in range(2):
        for b in range(2):
            reads, writes = (1, a), (0, b)
            for kind, matrix in (("q", qk[reads].T), ("k", qk[reads]), ("v", ov[reads])):
                score = (matrix @ ov[writes]).norm() / matrix.norm() / ov[writes].norm()
                excess = getattr(found, f"{kind}_composition")
                assert_close(excess[2 + a, b], score - 0.25)
                assert excess[b, 2 + a].isnan()
                assert excess[2 + a, 2 + b].isnan()


def _centre(norm):
    size = len(norm.gain)
    return torch.eye(size).double() - (1 / size if norm.centred else 0)


def test_composition_under_random_rotations_has_the_mean_and_the_deviation_that_are_taken_off():
    net = net_of("gpt2")
    found = qk_ov_circuits(net, net.params)
    qk, ov, _ = dense(net, fold=True)
    gauss = fs.normal(fs.key(1), torch.zeros(4000, 16, 16, dtype=torch.float64))
    q, r = torch.linalg.qr(gauss)
    turns = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    a, b = qk[1, 0], ov[0, 1]
    squares = (a @ turns @ b).square().sum((-2, -1)) / a.square().sum() / b.square().sum()
    assert abs(squares.mean() - found.random_composition**2) < 4 * squares.std() / 4000**0.5
    score = float(found.k_composition[2, 1]) + found.random_composition
    spread = (score**2 - 1 / 16) / float(found.k_composition_z[2, 1])
    assert abs(squares.var() / spread**2 - 1) < 0.1
    assert abs(squares.sqrt().mean() - (squares.mean()) ** 0.5) < 0.01  # of roots: a little lower


def test_what_is_added_to_all_rows_of_the_unembedding_changes_no_copying_score():
    net, name = net_of("gpt_neox"), "embed_out.weight"
    name = next(each for each in net.params if each in (name, "lm_head.weight"))
    moved = {**net.params, name: net.params[name] + fs.normal(fs.key(3), net.params[name][0])}
    own, other = (qk_ov_circuits(net, params).copying_score for params in (net.params, moved))
    assert_close(other, own, rtol=1e-9, atol=1e-9)
    own, other = (qk_ov_circuits(net, params, centred=False).copying_score for params in (net.params, moved))
    assert not torch.allclose(other, own, atol=0.01)


def test_a_head_that_copies_scores_1_and_one_that_forbids_minus_1():
    net = net_of("gpt2", tie_word_embeddings=True)
    name = "transformer.h.0.attn.c_proj.weight"
    w = Weights(net, net.params)
    between = w.embedding.T @ w.final.folded(w.unembedding[0] - w.unembedding[0].mean(0))
    between = w.norm("ln_1", 0).folded(between.T).T  # from what is written to what is read
    v = w.heads(0).v[0]
    o = torch.linalg.pinv(v @ between)  # the d x d product is the identity
    for sign in (1, -1):
        params = {**net.params, name: torch.cat([sign * o.T, net.params[name][8:]])}
        assert_close(float(qk_ov_circuits(net, params).copying_score[0, 0]), float(sign), rtol=0, atol=0.02)
    assert -0.9 < float(qk_ov_circuits(net, net.params).copying_score[0, 1]) < 0.9


@pytest.mark.parametrize("line", ["gpt2", "gemma2", "llama"])
def test_full_circuits_are_rows_of_the_dense_ones(line):
    net = net_of(line)
    qk, ov, w = dense(net, fold=True)
    out = w.unembedding[0] @ torch.diag(w.final.gain) @ _centre(w.final)
    rows = full_circuit(net, net.params, 1, 1, circuit="ov", sources=[3, 7])
    assert_close(rows, (out @ ov[1, 1] @ w.embedding.T).T[[3, 7]])
    rows = full_circuit(net, net.params, 1, 0, circuit="qk", sources=[3, 7], targets=[2])
    assert_close(rows, (w.embedding @ qk[1, 0] @ w.embedding.T)[[3, 7]][:, [2]])
    if line == "gpt2":
        rows = full_circuit(net, net.params, 0, 0, circuit="qk", sources=[1], of="positions")
        assert_close(rows, (w.positions @ qk[0, 0] @ w.positions.T)[[1]])
    else:
        with pytest.raises(ValueError, match="no embedding of positions"):
            full_circuit(net, net.params, 0, 0, circuit="qk", sources=[1], of="positions")


def test_no_distance_is_that_of_a_token_with_itself_where_rotations_scale_too():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    net = fs.functional(model_of.__wrapped__("llama", torch.float64, rope_parameters=yarn))
    heads = head_weights(net, net.params, 0)
    assert_close(heads.qk(), heads.qk(0), rtol=0, atol=0)
    assert_close(heads.qk(0), (0.1 * math.log(4) + 1) ** 2 * heads.scaling * heads.q.mT @ heads.shared(heads.k))


def test_rows_of_full_circuits_that_are_not_there():
    net = net_of("gpt2")
    for at, message in (({"sources": [40]}, "`sources`"), ({"sources": [0], "targets": [1, -1]}, "`targets`")):
        for circuit in ("qk", "ov"):
            with pytest.raises(ValueError, match=f"{message} must be from 0 to 39"):
                full_circuit(net, net.params, 0, 0, circuit=circuit, **at)


def test_rotation_changes_the_circuit_and_the_result_says_so():
    net = net_of("llama")
    bare, far = (qk_ov_circuits(net, net.params, distance=n) for n in (None, 3))
    assert_close(qk_ov_circuits(net, net.params, distance=0).qk_norm, bare.qk_norm)
    assert not torch.allclose(bare.qk_norm, far.qk_norm, rtol=1e-3)
    assert_close(bare.ov_norm, far.ov_norm)
    assert "distance 0, as of a token with itself" in bare.notes[0]
    assert "distance 3" in far.notes[0]
    assert not qk_ov_circuits(net_of("gpt2"), net_of("gpt2").params).notes
    assert "norms of their own" in qk_ov_circuits(net_of("qwen3"), net_of("qwen3").params).notes[1]
