"""Derivatives of long sequences and of deep models: time in bare forward passes, and memory.

    python bench/long.py [--lengths N ...] [--models NAME ...] [--ways NAME ...] [--attention NAME ...] [--threads N]
    python bench/long.py --deep [--layers N ...]

Long: a GPT-2 and a Llama of some 14 million parameters, one sequence, a vocabulary of 8,192 whose logits exist 512 at a
time in products. `attention` is that of `fs.functional`, or `sdpa`: transformers' own fused kernel, for what it has (the
gradient). Deep: a Llama whose layers are kept whole or rematerialised, at 256 tokens.

Every row is a process of its own. Memory is the growth of the peak resident set over that after a forward pass. Time is the
processor's: of a product after the first, over that of a forward pass with the loss of the same functional without a
gradient. The exponent is the slope of log memory in log length over the lengths from 2,048 on.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tabulate import tabulate
from torch.func import grad, jvp

import funcscope as fs

VOCAB = 8192
WAYS = ("gradient", "jvp", "ggn", "hessian")


def model_of(name: str, length: int, layers: int = 6) -> transformers.PreTrainedModel:
    if name == "gpt2":
        config: Any = transformers.GPT2Config(
            n_embd=384, n_layer=layers, n_head=6, n_positions=length, vocab_size=VOCAB
        )
    else:
        config = transformers.LlamaConfig(
            hidden_size=384, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2,
            intermediate_size=1024, vocab_size=VOCAB, max_position_embeddings=length, tie_word_embeddings=True,
        )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return float(np.median(taken))


def measure(name: str, length: int, way: str, attention: str, remat: str, layers: int) -> dict[str, float]:
    model, ids = model_of(name, length, layers), torch.randint(0, VOCAB, (1, length))
    net = fs.functional(model, attention="keep" if attention == "sdpa" else attention, remat=remat)
    loss = fs.objective(net, [{"input_ids": ids, "labels": ids}], fs.causal_lm)
    theta = net.theta
    v = fs.normal(fs.key(0), theta)
    with torch.no_grad():
        forward = seconds(lambda: loss(theta), 3)
    before = mib()
    if way in ("ggn", "hessian"):
        start = time.process_time()
        product = getattr(fs, way)(loss, theta, head_chunk=512)
        product(v)
        first = time.process_time() - start
        call = lambda: product(v)  # noqa: E731
    else:
        call = {"gradient": lambda: grad(loss)(theta), "jvp": lambda: jvp(loss, (theta,), (v,))}[way]
        first = seconds(call)
    taken = seconds(call)
    return {"forward": forward, "forwards": taken / forward, "first": first / forward, "memory": mib() - before}


def child(*args: Any, threads: int) -> dict[str, float] | None:
    """None where it ended for want of memory."""
    command = [sys.executable, __file__, "--threads", str(threads), "--child", *map(str, args)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode in (-9, 137) or "memory" in run.stderr:
        return None
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def exponent(lengths: list[int], memory: list[float]) -> float:
    """Of memory in length, from 2,048 tokens on; nan of fewer than two."""
    pairs = [(n, m) for n, m in zip(lengths, memory, strict=True) if n >= 2048]
    return float(np.polyfit(*np.log(pairs).T, 1)[0]) if len(pairs) > 1 else float("nan")


def long(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for way in args.ways:
            for attention in args.attention:
                if attention == "sdpa" and way != "gradient":
                    continue
                done: list[dict[str, Any]] = []
                for length in args.lengths:
                    if attention == "eager" and length > args.eager_up_to:
                        continue
                    found = child(name, length, way, attention, "none", 6, threads=args.threads)
                    if found is None:
                        break
                    done.append({"model": name, "way": way, "attention": attention, "tokens": length, **found})
                    print(tabulate(done[-1:], headers="keys", floatfmt=".3g"), flush=True)
                slope = exponent([row["tokens"] for row in done], [row["memory"] for row in done])
                rows += [{**row, "exponent": slope} for row in done]
    return rows


def deep(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for way in args.ways:
        for remat in ("none", "layer"):
            for layers in args.layers:
                found = child("llama", 256, way, "auto", remat, layers, threads=args.threads)
                if found is not None:
                    rows.append({"way": way, "remat": remat, "layers": layers, **found})
                    print(tabulate(rows[-1:], headers="keys", floatfmt=".3g"), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--models", nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--attention", nargs="+", default=["auto", "eager", "sdpa"])
    parser.add_argument("--eager-up-to", type=int, default=2048, help="tokens up to which whole scores are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        torch.set_num_threads(args.threads)
        name, length, way, attention, remat, layers = args.child
        print(json.dumps(measure(name, int(length), way, attention, remat, int(layers))))
        return
    rows = deep(args) if args.deep else long(args)
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
