"""Small models with data, as a catalogue: what every law is tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.func import grad, jacfwd
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import funcscope as fs

VOCAB = 40


class Problem(NamedTuple):
    model: nn.Module
    batches: list[Any]
    criterion: fs.Criterion


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    """What `make` makes under a seeded generator, which is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def tokens(seed: int, rows: int, length: int, pad: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    """Random token ids; the last row is padded on one side."""
    ids = seeded(seed, lambda: torch.randint(1, VOCAB, (rows, length)))
    mask = torch.ones_like(ids)
    if pad:
        mask[-1, :pad] = 0 if left else 1
        mask[-1, length - pad :] = 1 if left else 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def masked(batch: dict[str, torch.Tensor], every: int = 3) -> dict[str, torch.Tensor]:
    """A masked-LM batch: every third token replaced by id 0, its label kept."""
    hidden = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    hidden[:, ::every] = True
    hidden &= batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~hidden, -100)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 0), "labels": labels}


def translated(batch: dict[str, torch.Tensor], seed: int, length: int) -> dict[str, torch.Tensor]:
    """A batch for an encoder-decoder: the same inputs, random labels, the last row with two of them not scored."""
    labels = tokens(seed, len(batch["input_ids"]), length)["input_ids"]
    labels[-1, -2:] = -100
    return {**batch, "labels": labels}


def seen(inputs: Any) -> Any:
    """The positions of the output that are read: those of real tokens; a decoder's scored ones."""
    if not isinstance(inputs, dict):
        return slice(None)
    return inputs["labels"] != -100 if "labels" in inputs else inputs["attention_mask"].bool()


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=12, n_head=2, vocab_size=VOCAB, n_positions=16, bos_token_id=1, eos_token_id=1)
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=VOCAB, max_position_embeddings=16, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip


def qwen2(**changes: Any) -> nn.Module:
    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=VOCAB, max_position_embeddings=16, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True,
            **changes,
        )
    )  # fmt: skip


def mistral(**changes: Any) -> nn.Module:
    return MistralForCausalLM(
        MistralConfig(
            hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            vocab_size=VOCAB, max_position_embeddings=16, bos_token_id=1, eos_token_id=1, sliding_window=4, **changes,
        )
    )  # fmt: skip


def gpt_neox() -> nn.Module:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB,
            max_position_embeddings=16, bos_token_id=1, eos_token_id=1, rotary_pct=0.5,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            d_model=12, d_kv=6, d_ff=20, num_layers=2, num_heads=2, vocab_size=VOCAB, decoder_start_token_id=0,
            pad_token_id=0, relative_attention_num_buckets=8, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, vocab_size=VOCAB,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.SiLU(), nn.ConvTranspose2d(3, 2, 2), nn.Dropout(0.5), nn.Flatten(),
        nn.Linear(32, 3),
    )  # fmt: skip


def _points(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return seeded(seed, lambda: (torch.randn(*shape), torch.randint(0, 3, shape[:1])))


_CAUSAL = [tokens(1, 3, 8, pad=3), tokens(2, 2, 5)]
_MASKED = [masked(batch) for batch in _CAUSAL]
_TRANSLATED = [translated(batch, seed, 4) for seed, batch in enumerate(_CAUSAL)]
CATALOGUE: dict[str, tuple[Callable[[], nn.Module], list[Any], fs.Criterion]] = {
    "gpt2": (gpt2, _CAUSAL, fs.causal_lm),
    "llama": (llama, _CAUSAL, fs.causal_lm),
    "qwen2": (qwen2, _CAUSAL, fs.causal_lm),
    "mistral": (mistral, _CAUSAL, fs.causal_lm),
    "gpt_neox": (gpt_neox, _CAUSAL, fs.causal_lm),
    "bert": (bert, _MASKED, fs.masked_lm),
    "t5": (t5, _TRANSLATED, fs.seq2seq_lm),
    "mlp": (mlp, [_points(3, 5, 4), _points(4, 2, 4)], fs.classification),
    "cnn": (cnn, [_points(5, 4, 1, 5, 5)], fs.classification),
}

QUICK = ("mlp", "cnn", "gpt2")
"""Where every family is tried and each takes seconds, the others come with the slow tests."""
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CATALOGUE]
LANGUAGE = ("gpt2", "llama", "qwen2", "mistral", "gpt_neox", "bert", "t5")
IN_FLOAT32 = ("llama", "qwen2", "mistral", "gpt_neox", "t5")
"""Families that compute norms and softmax in float32 whatever the dtype, so that differences carry its noise."""


def problem(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    """A fresh model in train mode, its fixed batches in its dtype, and its criterion."""
    make, batches, criterion = CATALOGUE[name]
    model = seeded(0, make).to(dtype).train()
    return Problem(model, [cast(batch, dtype) for batch in batches], criterion)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {name: cast(value, dtype) for name, value in batch.items()}
    return tuple(cast(value, dtype) for value in batch)


def dense_hessian(loss: Callable[[torch.Tensor], torch.Tensor], theta: torch.Tensor) -> torch.Tensor:
    """The oracle. Not `torch.func.hessian`: differentiating through its inner `vmap` is wrong for layer norm."""
    return jacfwd(grad(loss))(theta)


def relative(value: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((value - oracle).norm() / oracle.norm())


def loss_of(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> fs.Loss:
    model, batches, criterion = problem(name, dtype)
    return fs.objective(fs.functional(model, **options), batches, criterion)


def infinitesimal_jackknife(a, b):
    """Oracle of the error of sum(a) / sum(b): what the weight of each sequence moves it by, from autograd."""
    moves = torch.func.grad(lambda p: (p * a).sum() / (p * b).sum())(torch.ones_like(a))
    return float((len(a) / (len(a) - 1) * moves.square().sum()).sqrt())


def of_unlike_length(seed: int, num: int) -> fs.Loss:
    """A regression on sequences of 2 to 40 scored positions, whose gradients at 0 go with their lengths."""
    steps = 40

    def draw() -> tuple[torch.Tensor, ...]:
        lengths, x = torch.randint(2, steps, (num, 1)), torch.randn(num, steps, dtype=torch.float64)
        return lengths, x, torch.randn(num, steps, dtype=torch.float64) - 1

    lengths, x, y = seeded(seed, draw)
    there = (torch.arange(steps) < lengths).double()
    criterion = fs.custom(lambda out, y: ((out[..., 0] - y[..., 0]) ** 2 / 2 * y[..., 1], y[..., 1]))
    net = fs.functional(seeded(0, lambda: nn.Linear(2, 1, bias=False).double()))
    return fs.objective(net, [(torch.stack([torch.ones_like(x), 0.3 * x], -1), torch.stack([y, there], -1))], criterion)
