"""What is inside a forward pass, in units of the bare one: traces, attention, circuits, lenses, patching.

    python bench/mechanisms.py [all|patching|growth]

A GPT-2 of 13M parameters on 64 sequences of 128 tokens, each call in turns with the bare forward pass of the untouched model,
medians of five rounds in one process and one thread; memory is the growth of the resident set in a process of its own.
patching: 24 heads by `vmap` in chunks and one by one. growth: peak memory of attention_patterns on 2, 4 and 8 batches.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import ENDS, grown
from fisher import run_one
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs
from funcscope import mechanistic

ROUNDS, ROWS, LENGTH = 5, 64, 128
KEY = fs.key(0)


class Case:
    def __init__(self, batches: int = 1):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = GPT2Config(n_layer=4, n_embd=384, n_head=6, vocab_size=16384, n_positions=LENGTH, **ENDS)
        self.model = GPT2LMHeadModel(config).eval()
        self.model.set_attn_implementation("eager")
        self.net = fs.functional(self.model)
        self.ids = torch.randint(1, config.vocab_size, (ROWS, LENGTH))
        batch = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        self.loss = fs.objective(self.net, [batch] * batches, fs.causal_lm)
        self.params, self.inputs = self.net.params, self.loss.batches[0][0]

    @torch.no_grad()
    def bare(self) -> Any:
        return self.model(input_ids=self.ids, use_cache=False).logits

    @torch.no_grad()
    def trace(self) -> dict[str, torch.Tensor]:
        names = [each for each in fs.sites_of(self.net) if not each.startswith("result")]
        return fs.trace(self.net, self.params, self.inputs, names).values

    def calls(self) -> dict[str, Callable[[], Any]]:
        loss, net, params = self.loss, self.net, self.params
        return {
            "trace of all sites": self.trace,
            "attention_patterns": lambda: mechanistic.attention_patterns(loss, params),
            "induction_heads": lambda: mechanistic.induction_heads(
                net, params, key=KEY, num=ROWS, period=(LENGTH - 1) // 2
            ),
            "qk_ov_circuits": lambda: mechanistic.qk_ov_circuits(net, params),
            "logit_attribution": lambda: mechanistic.logit_attribution(loss, params),
            "logit_lens": lambda: mechanistic.logit_lens(loss, params),
            "jacobian_lens, 1 probe": lambda: mechanistic.jacobian_lens(loss, params, key=KEY, method="probes", num=1),
        }

    def patching(self, chunk: int) -> Any:
        clean = {name: x[:8] for name, x in {"input_ids": self.ids}.items()}
        corrupt = {"input_ids": self.ids[8:16]}
        return mechanistic.activation_patching(
            self.net, self.params, clean, corrupt, lambda logits: logits[:, -1, 5] - logits[:, -1, 9], chunk=chunk
        )


def ratios(call: Callable[[], Any], bare: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Median over rounds of the call's time over that of the bare pass beside it."""
    each = []
    call()
    for _ in range(rounds):
        start = time.perf_counter()
        bare()
        middle = time.perf_counter()
        call()
        each.append((time.perf_counter() - middle) / (middle - start))
    return statistics.median(each)


def everything() -> None:
    case, total = Case(), 0.0
    for name, call in case.calls().items():
        found = ratios(call, case.bare)
        total += 0.0 if name.startswith("trace") else found
        print(f"{name:24} {found:6.2f} forwards", flush=True)
    print(f"{'all but the trace':24} {total:6.2f} forwards", flush=True)
    memory = run_one(__file__, ["trace"])
    print(f"trace: {memory['MiB']:.0f} MiB for {memory['returned']:.0f} MiB that it returns")


def patching() -> None:
    """24 heads on 8 sequences: in units of the bare forward pass of 8 sequences."""
    case = Case()

    @torch.no_grad()
    def bare() -> Any:
        return case.model(input_ids=case.ids[:8], use_cache=False).logits

    for chunk in (1, 4, 8):
        print(f"chunk {chunk}: {ratios(lambda chunk=chunk: case.patching(chunk), bare, 3):6.1f} forwards", flush=True)


def growth() -> None:
    for batches in (2, 4, 8):
        print(f"{batches} batches: {run_one(__file__, ['patterns', batches])['MiB']:.0f} MiB", flush=True)


def measured(what: str, batches: int = 1) -> dict[str, float]:
    case = Case(batches)
    case.bare()
    if what == "trace":
        seen: dict[str, torch.Tensor] = {}
        peak = grown(lambda: seen.update(case.trace()))
        places = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in seen.values()}
        return {"MiB": peak, "returned": sum(places.values()) / 2**20}
    return {"MiB": grown(lambda: mechanistic.attention_patterns(case.loss, case.params))}


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measured(*json.loads(sys.argv[2]))))
    else:
        {"all": everything, "patching": patching, "growth": growth}[(sys.argv[1:] or ["all"])[0]]()
