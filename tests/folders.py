"""Tiny Hugging Face folders on disk: a model of the catalogue with a tokenizer of one word per id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from problems import VOCAB, problem
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXTS = [" ".join(f"w{(7 * i + 3 * j) % 31 + 4}" for j in range(3 + i % 9)) for i in range(24)]


def tokenizer(shift: int = 0) -> PreTrainedTokenizerFast:
    """Words w4 ... w39; `shift` moves their ids."""
    words = [f"w{i}" for i in range(4, VOCAB)]
    words = words[shift:] + words[:shift]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[MASK]", "[UNK]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", mask_token="[MASK]", unk_token="[UNK]"
    )


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Characters of the words, in the form of GPT-2 and Qwen2: transformers makes Qwen2's pre-tokenizer on its own."""
    alphabet = ["[PAD]", "[EOS]", "[UNK]", *"w0123456789", "Ġ", "Ġw"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, [("Ġ", "w")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


def folder(path: Path, name: str = "gpt2", *, scale: float = 1.0, shift: int = 0, **changes: Any) -> Path:
    """A saved model of the catalogue, its weights multiplied by `scale`."""
    model = problem(name, torch.float32).model
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(scale)
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.save_pretrained(path)
    (bytes_tokenizer() if name == "qwen2" else tokenizer(shift)).save_pretrained(path)
    return path


def texts(path: Path, lines: list[str] | None = None) -> str:
    """A .jsonl file of texts."""
    path.write_text("\n".join(json.dumps({"text": text}) for text in (TEXTS if lines is None else lines)))
    return str(path)
