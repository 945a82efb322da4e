"""The models and their tokenizer of bytes, and how they lie on the disk: as any Hugging Face model does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ...core.keys import fold_in, key, normal
from ...core.store import write
from .variants import Config

if TYPE_CHECKING:  # imported with the first model: it takes seconds
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

WEIGHTS = "model.safetensors"
END = 256
"""The token that ends a text. Those before it are the bytes, each its own number."""
_END_TOKEN = "<|end|>"
_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
"""Bytes that stand for themselves in a vocabulary of GPT-2's form."""


def make(config: Config) -> LlamaForCausalLM:
    """The untrained model: matrices normal with standard deviation 0.02, norms 1, from the configuration's seed.

    >>> sum(param.numel() for param in make(Config()).parameters())
    234176
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.length,
        bos_token_id=None,
        eos_token_id=END,
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights, which are then replaced
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    root = fold_in(key(config.seed), "weights")
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() > 1:
                param.copy_(normal(fold_in(root, name), param) * 0.02)
    return model


def tokenizer() -> Tokenizer:
    r"""A token for each byte, and one that ends a text.

    >>> tokenizer().encode("a\né").ids, list("a\né".encode())
    ([97, 10, 195, 169], [97, 10, 195, 169])
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    others = iter(range(256, 512))
    letters = [chr(byte if byte in _VISIBLE else next(others)) for byte in range(256)]
    made = Tokenizer(models.BPE({**{letter: i for i, letter in enumerate(letters)}, _END_TOKEN: END}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(_END_TOKEN, special=True)])
    return made


def spelled(tokens: Sequence[int]) -> str | None:
    """The text that `tokenizer` makes these tokens of; None where they begin or end inside a character.

    >>> spelled([*"é".encode(), END, 97]), spelled(list("é".encode())[1:])
    ('é<|end|>a', None)
    """
    try:
        return b"".join(_END_TOKEN.encode() if token == END else bytes([token]) for token in tokens).decode()
    except UnicodeDecodeError:
        return None


def save(folder: Path, model: LlamaForCausalLM) -> None:
    """The folder of a Hugging Face model, file by file, the weights last; transformers and AutoTokenizer read it."""
    length = model.config.max_position_embeddings
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_TOKEN, "model_max_length": length}
    write(folder / "config.json", model.config.to_json_string().encode())
    write(folder / "tokenizer.json", tokenizer().to_str(pretty=True).encode())
    write(folder / "tokenizer_config.json", json.dumps(about, indent=1).encode())
    write(folder / WEIGHTS, save_safetensors(weights(model), {"format": "pt"}))


def weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: param.detach().contiguous() for name, param in model.named_parameters()}


def load(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder that `save` wrote."""
    return load_safetensors((folder / WEIGHTS).read_bytes())


@torch.no_grad()
def place(model: LlamaForCausalLM, stored: Mapping[str, Tensor]) -> None:
    """Give a model these weights."""
    for name, param in model.named_parameters():
        param.copy_(stored[name])
