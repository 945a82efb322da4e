"""The network: a Llama whose attention rotates, with MLPs or with some that write nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...core.keys import fold_in, key, normal
from ...core.model import Functional, functional
from .variants import Config

if TYPE_CHECKING:  # imported with the first model: it takes seconds
    from transformers import LlamaForCausalLM


def make(config: Config) -> LlamaForCausalLM:
    """The untrained model: matrices normal with standard deviation 0.02, norms 1, from the configuration's seed.

    Without MLPs, these have one unit, which writes zeros: constants, as are the norms before them.

    >>> model = make(Config())
    >>> sorted({name.split(".")[-2] for name, param in model.named_parameters() if not param.requires_grad})
    ['down_proj', 'gate_proj', 'post_attention_layernorm', 'up_proj']
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = LlamaConfig(
        vocab_size=config.vocab_size + 1,
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size if config.mlp else 1,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.length,
        bos_token_id=config.vocab_size,
        eos_token_id=None,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights, which are then replaced
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    root = fold_in(key(config.seed), "weights")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.copy_(normal(fold_in(root, name), param) * 0.02)
        for block in () if config.mlp else model.model.layers:
            block.mlp.down_proj.weight.zero_()
            block.mlp.requires_grad_(False)
            block.post_attention_layernorm.requires_grad_(False)
    return model


def network(config: Config) -> Functional:
    """The model as a pure function; its own weights are the untrained ones."""
    return functional(make(config))
