"""Derivatives of long sequences: time in forward passes, and memory.

    python bench/long.py [--lengths N ...] [--models NAME ...] [--ways NAME ...] [--attention NAME ...] [--threads N]
    python bench/long.py --models attention --lengths 4096 --ways hessian --eager-up-to 4096     # attention alone

A GPT-2 and a Llama of some 14 million parameters, one sequence, a vocabulary of 8,192 whose logits exist 512 at a time in
products; `attention` is a Llama of one layer that has hardly anything else. `--attention` names that of `fs.functional`;
`sdpa`, transformers' own fused kernel, for what it has (the gradient); or a peer (hessian-eigenthings, PyHessian with its
kept graph; `install_peers.sh`), which has the Hessian of the model with eager attention.

Every row is a process of its own. Memory is the growth of the peak resident set over that after a forward pass, in MiB.
Time is the processor's: of a product after the first, over that of a forward pass with the loss of the same functional
without a gradient (`forwards`), and over that of the untouched model with its fused kernel (`bare`); `first` is what the
first one takes, with its graph and, up to 8,192 tokens, the check of its derivatives against values. The exponent is the
slope of log memory in log length over the lengths from 2,048 on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from cases import Scored, grown
from tabulate import tabulate
from torch import Tensor, nn
from torch.func import grad, jvp

import funcscope as fs

VOCAB = 8192
WAYS = ("gradient", "jvp", "ggn", "hessian")
PEERS = ("hessian-eigenthings", "PyHessian")


def model_of(name: str, length: int, layers: int = 6) -> transformers.PreTrainedModel:
    if name == "gpt2":
        config: Any = transformers.GPT2Config(
            n_embd=384, n_layer=layers, n_head=6, n_positions=length, vocab_size=VOCAB, bos_token_id=0, eos_token_id=0
        )
    else:
        alone = {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 64, "num_key_value_heads": 6}
        whole = {"num_hidden_layers": layers, "intermediate_size": 1024, "vocab_size": VOCAB, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(
            hidden_size=384, num_attention_heads=6, max_position_embeddings=length, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, **(alone if name == "attention" else whole),
        )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return float(np.median(taken))


def measure(name: str, length: int, way: str, attention: str, remat: str, layers: int) -> dict[str, float]:
    once(nn.Linear(2, 2))  # what is imported with the first derivative is no part of it
    model = model_of(name, length, layers)
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    with torch.no_grad():
        bare = seconds(lambda: model(ids, labels=ids).loss, 3)
    kind = "keep" if attention == "sdpa" else "eager" if attention in PEERS else attention
    net = fs.functional(model, attention=kind, remat=remat)
    loss = fs.objective(net, [{"input_ids": ids, "labels": ids}], fs.causal_lm)
    theta = net.theta
    v = fs.normal(fs.key(0), theta)
    with torch.no_grad():
        forward = seconds(lambda: loss(theta), 3)
    calls: list[Callable[[], Any]] = []
    times: list[float] = []

    def work() -> None:
        start = time.process_time()
        calls.append(call_of(way, loss, theta, v, length) if attention not in PEERS else peer(attention, model, ids, v))
        calls[0]()
        times.append(time.process_time() - start)
        times.append(seconds(calls[0], 3 if length <= 2048 else 1))

    memory = grown(work)
    return {"forwards": times[1] / forward, "bare": times[1] / bare, "first": times[0] / forward, "memory": memory}


def once(model: nn.Module) -> None:
    net = fs.functional(model)
    fs.hessian(fs.objective(net, [(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))], fs.classification), net.theta)(
        net.theta
    )


def call_of(way: str, loss: fs.Loss, theta: Tensor, v: Tensor, length: int) -> Callable[[], Tensor]:
    if way in ("ggn", "hessian"):
        chunk = 512 if VOCAB in sizes(loss) else None
        unchecked = {"check": False} if way == "hessian" and length > 8192 else {}
        product = getattr(fs, way)(loss, theta, head_chunk=chunk, **unchecked)
        return lambda: product(v)
    return {"gradient": lambda: grad(loss)(theta), "jvp": lambda: jvp(loss, (theta,), (v,))[1]}[way]


def sizes(loss: fs.Loss) -> set[int]:
    return {n for p in loss.net.params.values() for n in p.shape}


def peer(name: str, model: nn.Module, ids: Tensor, v: Tensor) -> Callable[[], Any]:
    model.set_attn_implementation("eager")
    if name == "hessian-eigenthings":
        import hessian_eigenthings as he

        operator = he.HessianOperator(model, [{"input_ids": ids, "labels": ids}], he.hf_lm_loss())
        return lambda: operator.matvec(v)
    import pyhessian

    data = (ids, ids[:, 1:].flatten())
    made = pyhessian.hessian(Scored(model), nn.CrossEntropyLoss(), data=data, cuda=False)
    parts = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in made.params]), made.params, strict=True)]
    return lambda: pyhessian.hessian_vector_product(made.gradsH, made.params, parts)


def child(*args: Any, threads: int) -> dict[str, float] | None:
    """None where it ended for want of memory."""
    command = [sys.executable, str(Path(__file__).with_name("long.py")), "--threads", str(threads), "--child"]
    run = subprocess.run([*command, *map(str, args)], capture_output=True, text=True)
    if run.returncode in (-9, 137) or (run.returncode and "allocate memory" in run.stderr):
        return None
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def exponent(lengths: list[int], memory: list[float]) -> float:
    """Of memory in length, from 2,048 tokens on; nan of fewer than two."""
    pairs = [(n, m) for n, m in zip(lengths, memory, strict=True) if n >= 2048]
    return float(np.polyfit(*np.log(pairs).T, 1)[0]) if len(pairs) > 1 else float("nan")


def measured(attention: str, way: str) -> bool:
    return way == "gradient" if attention == "sdpa" else way == "hessian" if attention in PEERS else True


def long(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in args.models:
        for way in args.ways:
            for attention in filter(lambda kind: measured(kind, way), args.attention):
                done: list[dict[str, Any]] = []
                for length in args.lengths:
                    if attention in ("eager", *PEERS) and length > args.eager_up_to:
                        continue
                    figures = child(name, length, way, attention, "none", 6, threads=args.threads)
                    if figures is None:
                        break
                    done.append({"model": name, "way": way, "attention": attention, "tokens": length, **figures})
                    print(tabulate(done[-1:], headers="keys", floatfmt=".3g"), flush=True)
                slope = exponent([row["tokens"] for row in done], [row["memory"] for row in done])
                rows += [{**row, "exponent": slope} for row in done]
    return rows


def report(rows: list[dict[str, Any]], name: str) -> None:
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--models", nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--attention", nargs="+", default=["auto", "eager", "sdpa"])
    parser.add_argument("--eager-up-to", type=int, default=2048, help="tokens up to which whole scores are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        torch.set_num_threads(args.threads)
        name, length, way, attention, remat, layers = args.child
        print(json.dumps(measure(name, int(length), way, attention, remat, int(layers))))
        return
    report(long(args), "long")


if __name__ == "__main__":
    main()
