"""TransformerLens on the same weights as an oracle: circuits, composition, copying, logit attribution, lens.

pip install --no-deps "transformer-lens==2.16.1" and what it imports; from 4.0 on it has no HookedTransformer.
"""

from types import SimpleNamespace

import pytest
import torch
from problems import seeded, tokens
from test_architectures import model_of
from test_circuits import net_of
from torch.testing import assert_close

import funcscope as fs
from funcscope.mechanistic import head_weights, logit_contributions, logit_lens, qk_ov_circuits

pytestmark = [pytest.mark.outsider, pytest.mark.filterwarnings("ignore")]
COMMON = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_head": 8, "n_ctx": 32, "d_vocab": 40, "dtype": torch.float64}
KINDS = {
    "gpt2": ("convert_gpt2_weights", {"act_fn": "gelu_new", "d_mlp": 64, "normalization_type": "LN"}),
    "gpt_neox": ("convert_neox_weights", {
        "act_fn": "gelu", "d_mlp": 20, "normalization_type": "LN", "positional_embedding_type": "rotary",
        "parallel_attn_mlp": True, "rotary_dim": 2, "rotary_adjacent_pairs": False,
    }),
    "llama": ("convert_llama_weights", {
        "act_fn": "silu", "d_mlp": 20, "normalization_type": "RMS", "positional_embedding_type": "rotary", "gated_mlp": True,
        "final_rms": True, "rotary_dim": 8, "rotary_adjacent_pairs": False, "n_key_value_heads": 1, "eps": 1e-6,
    }),
}  # fmt: skip


def theirs(line, *, fold):
    lens = pytest.importorskip("transformer_lens")
    if not hasattr(lens, "HookedTransformerConfig"):
        pytest.skip("this version of TransformerLens has no HookedTransformer")
    convert, settings = KINDS[line]
    config = lens.HookedTransformerConfig(**COMMON, **settings)
    model = seeded(0, lambda: lens.HookedTransformer(config))  # it draws weights
    source = model_of(line, torch.float64)
    if line == "gpt_neox":  # the head's name in older versions of transformers
        source = SimpleNamespace(gpt_neox=source.gpt_neox, embed_out=source.get_output_embeddings())
    weights = getattr(lens.pretrained.weight_conversions, convert)(source, config)
    if line == "gpt2":
        weights["unembed.b_U"] = torch.zeros(40, dtype=torch.float64)
    plain = {"center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(
        {name: value.detach().clone() for name, value in weights.items()}, fold_ln=fold, **plain
    )
    return model.requires_grad_(False)


@pytest.mark.parametrize("line", KINDS)
@torch.no_grad()
def test_circuits_composition_and_copying_are_those_of_transformer_lens(line):
    model, net = theirs(line, fold=True), net_of(line)
    found = qk_ov_circuits(net, net.params, centred=False)
    scaling = head_weights(net, net.params, 0).scaling
    assert_close(found.qk_norm / scaling, model.QK.norm().double(), rtol=1e-5, atol=0)
    assert_close(found.ov_norm, model.OV.norm().double(), rtol=1e-5, atol=0)
    for kind in "qkv":
        score = model.all_composition_scores(kind.upper()).permute(2, 3, 0, 1).reshape(4, 4)  # theirs: writer first
        ours = getattr(found, f"{kind}_composition") + found.random_composition
        assert_close(ours[2:, :2], score[2:, :2], rtol=1e-5, atol=0)
    eigenvalues = (model.W_E @ model.OV @ model.W_U).eigenvalues
    assert_close(found.copying_score, eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("line", KINDS)
@torch.no_grad()
def test_logits_attribution_and_lens_are_those_of_transformer_lens(line):
    model, net = theirs(line, fold=True), net_of(line)
    ids = tokens(3, 2, 7)["input_ids"]
    logits, cache = model.run_with_cache(ids, prepend_bos=False)
    assert_close(net.apply(net.params, ids), logits, rtol=1e-5, atol=1e-5)
    made = logit_contributions(net, net.params, {"input_ids": ids}, ids)
    heads = cache.apply_ln_to_stack(cache.stack_head_results(layer=-1), layer=-1)
    direct = torch.einsum("cbtD,Dbt->cbt", heads, model.W_U[:, ids])
    assert_close(made.heads.flatten(0, 1), direct, rtol=1e-4, atol=1e-6)

    found = logit_lens(fs.objective(net, [ids], fs.causal_lm), net.params)
    streams = cache.accumulated_resid(layer=-1)
    normed = torch.stack([model.ln_final(each) for each in streams])  # each stream by its own scale
    log_p = (normed @ model.W_U + model.b_U).log_softmax(-1)[:, :, :-1]
    target = log_p.gather(-1, ids[:, 1:, None].expand(len(log_p), -1, -1, 1)).mean((1, 2, 3))
    assert_close(found.log_prob, target, rtol=1e-5, atol=1e-6)
    assert_close(found.kl, (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1).mean((1, 2)), rtol=1e-4, atol=1e-6)
