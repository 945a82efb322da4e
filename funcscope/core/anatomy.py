"""Where the parts of a transformer are: which module is its attention, what its head writes, which norms stand before.

An entry of `ANATOMIES` is a claim about a model type. tests/test_trace.py compares every site of a small model of each with
what the untouched one computes there.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from .imported import Model, is_pretrained


class Anatomy(NamedTuple):
    """Names of modules: those of a block below it, the others below the base model."""

    blocks: str
    tokens: str
    """The embedding of tokens."""
    attention: str
    """Calls the kernel."""
    attn_in: str
    """The norm before it; empty where it reads the residual stream."""
    attn_out: str
    """Its output is what attention writes into the residual stream."""
    output: str
    """The matrix that the heads' outputs are multiplied by."""
    mlp_in: str
    mlp_pre: str
    """Its output goes through the nonlinearity."""
    mlp_post: str
    """Its input has gone through it."""
    mlp_out: str
    query: str = ""
    """Its output is rotated; empty where nothing is. One name for both means one matrix for queries, keys and values."""
    key: str = ""
    mid: str = ""
    """Its output is the residual stream between attention and MLP; empty where that is a plain sum."""
    final: str = ""
    """The norm before the logits."""
    positions: str = ""
    """The embedding of positions."""


_GPT2 = Anatomy(
    "h", "wte", "attn", "ln_1", "attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj", "mlp", final="ln_f", positions="wpe"
)  # fmt: skip
_LLAMA = Anatomy(
    "layers", "embed_tokens", "self_attn", "input_layernorm", "self_attn", "self_attn.o_proj", "post_attention_layernorm",
    "mlp.gate_proj", "mlp.down_proj", "mlp", "self_attn.q_proj", "self_attn.k_proj", final="norm",
)  # fmt: skip
_NEOX = Anatomy(
    "layers", "embed_in", "attention", "input_layernorm", "attention", "attention.dense", "post_attention_layernorm",
    "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "mlp", "attention.query_key_value", "attention.query_key_value",
    final="final_layer_norm",
)  # fmt: skip
_BERT = Anatomy(
    "encoder.layer", "embeddings.word_embeddings", "attention.self", "", "attention.output.dense", "attention.output.dense",
    "", "intermediate.dense", "output.dense", "output.dense", mid="attention", positions="embeddings.position_embeddings",
)  # fmt: skip

ANATOMIES: dict[str, Anatomy] = {
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    **dict.fromkeys(("llama", "mistral", "qwen2"), _LLAMA),
    "qwen3": _LLAMA._replace(query="self_attn.q_norm", key="self_attn.k_norm"),
    "gemma2": _LLAMA._replace(
        attn_out="post_attention_layernorm", mlp_in="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm"
    ),
    "bert": _BERT,
}


class Body(NamedTuple):
    """A model of a described family."""

    anatomy: Anatomy
    model: Any
    """The base model: without its head."""
    blocks: Any
    kind: str
    """Its model type."""

    @property
    def norm(self) -> Literal["pre", "parallel", "post"]:
        """Norms before the parts of a block, one for both parts, or behind each."""
        if self.anatomy.mid:
            return "post"
        return "parallel" if getattr(self.model.config, "use_parallel_residual", False) else "pre"


def body_of(model: Model) -> Body | None:
    """The described parts of a model; None for one of no described family."""
    if not is_pretrained(model) or model.config.model_type not in ANATOMIES:
        return None
    anatomy = ANATOMIES[model.config.model_type]
    return Body(anatomy, model.base_model, model.base_model.get_submodule(anatomy.blocks), model.config.model_type)
