"""What is inside a forward pass, in units of the bare one: traces, attention, circuits, lenses, patching.

    python bench/mechanisms.py [all|patching|growth]

GPT-2 on 64 sequences of 128 tokens: one of 13M parameters, whose 16,384 logits are half of its forward pass, and one of
14.5M in 8 layers with 512. Each call in turns with the bare forward pass of the untouched model, medians of five rounds
in one process and one thread; memory is the growth of the resident set in a process of its own.
patching: 24 heads by `vmap` in chunks and one by one, beside hooks by hand and TransformerLens. growth: peak memory of
attention_patterns on 2, 4 and 8 batches.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import cached_property
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
    def __init__(self, batches: int = 1, layers: int = 4, vocab: int = 16384):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = GPT2Config(n_layer=layers, n_embd=384, n_head=6, vocab_size=vocab, n_positions=LENGTH, **ENDS)
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
            "those of one pass, shared": lambda: fs.read(
                loss,
                params,
                {
                    each.__name__: each.reading(loss, params)
                    for each in (mechanistic.attention_patterns, mechanistic.logit_attribution, mechanistic.logit_lens)
                },
            ),
            "jacobian_lens, 1 probe": lambda: mechanistic.jacobian_lens(loss, params, key=KEY, method="probes", num=1),
        }

    def patching(self, chunk: int) -> Any:
        clean = {name: x[:8] for name, x in {"input_ids": self.ids}.items()}
        corrupt = {"input_ids": self.ids[8:16]}
        return mechanistic.activation_patching(
            self.net, self.params, clean, corrupt, lambda logits: logits[:, -1, 5] - logits[:, -1, 9], chunk=chunk
        )

    @torch.no_grad()
    def by_hooks(self) -> Any:
        """The same 24 patches as they are written by hand: a hook on each output matrix, put on and taken off."""
        size, blocks, corrupt = 64, self.model.transformer.h, self.ids[8:16]
        kept: list[torch.Tensor] = []
        hooks = [b.attn.c_proj.register_forward_pre_hook(lambda _, x: kept.append(x[0])) for b in blocks]
        self.model(input_ids=corrupt, use_cache=False)
        for hook in hooks:
            hook.remove()
        found = []
        for layer, block in enumerate(blocks):
            for head in range(6):
                part = slice(head * size, (head + 1) * size)

                def patch(_: Any, x: Any, layer: int = layer, part: slice = part) -> Any:
                    new = x[0].clone()
                    new[..., part] = kept[layer][..., part]
                    return (new,)

                hook = block.attn.c_proj.register_forward_pre_hook(patch)
                logits = self.model(input_ids=self.ids[:8], use_cache=False).logits
                hook.remove()
                found.append(logits[:, -1, 5] - logits[:, -1, 9])
        return torch.stack(found)

    @torch.no_grad()
    def by_transformer_lens(self) -> Any:
        """The same patches by its hooks."""
        model = self.lens
        _, cache = model.run_with_cache(self.ids[8:16], names_filter=lambda name: name.endswith("hook_z"))
        found = []
        for layer in range(4):
            name = f"blocks.{layer}.attn.hook_z"
            for head in range(6):

                def patch(z: torch.Tensor, hook: Any, head: int = head, name: str = name) -> torch.Tensor:  # noqa: ARG001
                    z[:, :, head] = cache[name][:, :, head]
                    return z

                logits = model.run_with_hooks(self.ids[:8], fwd_hooks=[(name, patch)])
                found.append(logits[:, -1, 5] - logits[:, -1, 9])
        return torch.stack(found)

    @cached_property
    def lens(self) -> Any:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

        config = HookedTransformerConfig(
            n_layers=4, d_model=384, n_heads=6, d_head=64, n_ctx=LENGTH, d_vocab=16384, act_fn="gelu_new", d_mlp=1536,
            normalization_type="LN",
        )  # fmt: skip
        model = HookedTransformer(config)
        weights = convert_gpt2_weights(self.model, config) | {"unembed.b_U": torch.zeros(16384)}
        model.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
        return model.eval()


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


IN_ALL = ("induction_heads", "qk_ov_circuits", "those of one pass, shared")


def everything() -> None:
    for layers, vocab in ((4, 16384), (8, 512)):
        case, found = Case(layers=layers, vocab=vocab), {}
        print(f"{layers} layers, {vocab} tokens")
        for name, call in case.calls().items():
            found[name] = ratios(call, case.bare)
            print(f"  {name:26} {found[name]:6.2f} forwards", flush=True)
        print(f"  {'all, without Jacobians':26} {sum(found[name] for name in IN_ALL):6.2f} forwards", flush=True)
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
    for name, call in (("hooks on the modules", case.by_hooks), ("TransformerLens", case.by_transformer_lens)):
        try:
            print(f"{name}: {ratios(call, bare, 3):6.1f} forwards", flush=True)
        except ImportError as err:
            print(f"{name}: not here ({err})")


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
