"""The models of the benchmark of curvature, each with one batch, in the forms that the ways need; clock and memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import funcscope as fs

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLMLoss"}
CONFIGS = {
    "1.5k": GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=64, n_positions=16, **ENDS),
    "0.1M": GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=256, n_positions=64, **ENDS),
    "14M": GPT2Config(n_layer=4, n_embd=384, n_head=6, vocab_size=16384, n_positions=64, **ENDS),
    "llama-13M": LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, vocab_size=16384,
        max_position_embeddings=64, tie_word_embeddings=False, **ENDS,
    ),
    "50k": GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=50304, n_positions=128, **ENDS),
}  # fmt: skip


class Case:
    """One model with one batch of tokens, in the forms that the ways need; each is made when it is first asked for."""

    def __init__(self, size: str, steps: int = 0):
        self.size, self.steps, self.config = size, steps, CONFIGS[size]
        length = getattr(self.config, "n_positions", None) or self.config.max_position_embeddings
        self.shape = (4, length)
        self.ids = self.stream(0)
        self.targets = self.ids[:, 1:].flatten()

    def stream(self, seed: int) -> Tensor:
        """A phrase of 24 tokens over and over, three tokens of ten replaced by others."""
        fixed, own = torch.Generator().manual_seed(1234), torch.Generator().manual_seed(seed)
        phrase = torch.randint(self.config.vocab_size, (24,), generator=fixed)
        rows = torch.stack([phrase.roll(int(k)) for k in torch.randint(24, self.shape[:1], generator=own)])
        ids = rows.repeat(1, -(-self.shape[1] // 24))[:, : self.shape[1]]
        other = torch.randint(self.config.vocab_size, self.shape, generator=own)
        return torch.where(torch.rand(self.shape, generator=own) < 0.3, other, ids)

    @cached_property
    def untouched(self) -> nn.Module:
        """The model as it comes, with its default attention; trained for a few steps of Adam if so asked."""
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        torch.manual_seed(0)
        kind = LlamaForCausalLM if isinstance(self.config, LlamaConfig) else GPT2LMHeadModel
        model = kind(copy.deepcopy(self.config)).eval()
        adam = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(self.steps):
            ids = self.stream(1 + step)
            adam.zero_grad()
            model(ids, labels=ids).loss.backward()
            adam.step()
        adam.zero_grad()
        return model

    @cached_property
    def eager(self) -> nn.Module:
        model = copy.deepcopy(self.untouched)
        model.set_attn_implementation("eager")
        return model

    @cached_property
    def plain(self) -> nn.Module:
        """Eager attention, and norms and SiLU from primitives."""
        model = copy.deepcopy(self.eager)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = _LayerNorm
            elif hasattr(module, "act_fn"):
                module.act_fn = _SiLU()
        return model

    @cached_property
    def loss(self) -> fs.Loss:
        return fs.objective(fs.functional(self.untouched), {"input_ids": self.ids}, fs.causal_lm)

    @cached_property
    def theta(self) -> Tensor:
        return self.loss.net.theta

    @torch.no_grad()
    def bare(self) -> Tensor:
        """The unit of every ratio: a forward pass of the untouched model with its loss, no gradient."""
        return self.untouched(self.ids, labels=self.ids).loss


class _LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight + self.bias


class _SiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Scored(nn.Module):
    """ids -> the logits of the positions that are scored, one row each: for peers with a plain cross-entropy."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits[:, :-1].flatten(0, 1)


def milliseconds(calls: dict, threads: int, rounds: int, repeats: int) -> dict:
    """Medians over rounds in which each call has its turn, after one that is not counted."""
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    seconds: dict = {name: [] for name in timers}
    for turn in range(rounds + 1):
        for name, timer in timers.items():
            taken = timer.timeit(repeats if turn else 1).mean
            seconds[name] += [taken] if turn else []
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def seconds_of(call: Callable) -> tuple[float, object]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def grown(call: Callable[[], object]) -> float:
    """MiB by which the resident set is larger at its peak during the call than before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    rest = _resident("VmRSS")
    call()
    return _resident("VmHWM") - rest


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
