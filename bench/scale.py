"""Losses, curvatures, slopes, sharpness and traces of a model with 1.5 billion parameters: time and memory.

    python bench/scale.py [--directions N] [--threads N] [--layers N] [--ways WAY ...] [--json FILE]

A Qwen2 of the size of Qwen2.5-Math-1.5B with random bfloat16 weights, made in place; batch 1 x 64. Each way runs in a
process of its own: `losses` (two-sided, difference curvature), `slopes` (the same and a `jvp` per direction), `float32`
(as `losses`, computed in float32 from the bfloat16 weights). Peak is the peak resident set of the whole process, the
interpreter and its libraries included (`idle` is their share). In the same process: (a) a bare forward pass with its loss,
no gradient, and (b) a draw of as many normal numbers by one-threaded torch, in a buffer that is reused.

`critical` and `sam` are sharpness along a gradient in a file in the folder for temporary files, which is to lie on a disk
(6 GiB at full size); `hessian` and `ggn` a trace of two probes; those with `-32` are computed in float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import funcscope as fs
from funcscope.core.objective import Loss

WAYS = {
    "losses": ({"two_sided": True, "compute_curvature": True}, None),
    "slopes": ({"two_sided": True, "compute_curvature": True, "compute_gradient": True}, None),
    "float32": ({"two_sided": True, "compute_curvature": True}, torch.float32),
}
GIB = 2**30


def critical(loss: Loss, params: dict[str, Tensor]) -> float:
    gradient = fs.curvature.stored_gradient(loss, params, tempfile.gettempdir())
    return fs.critical_sharpness(loss, params, gradient).value


def sam(loss: Loss, params: dict[str, Tensor], **options: bool) -> float:
    gradient = fs.curvature.stored_gradient(loss, params, tempfile.gettempdir())
    found = fs.sam_sharpness(loss, params, epsilon=0.01, adaptive_epsilon=True, gradient=gradient, **options)
    return found.absolute


def trace(loss: Loss, params: dict[str, Tensor], matrix: str) -> float:
    return float(fs.curvature.leafwise_trace(loss, params, key=fs.key(0), num=2, matrix=matrix).trace.value)


CALLS = {
    "critical": critical,
    "sam": partial(sam, curvature=False),
    "sam-curvature": sam,
    "hessian": partial(trace, matrix="hessian"),
    "ggn": partial(trace, matrix="ggn"),
}
CALLS |= {f"{name}-32": call for name, call in CALLS.items()}


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def made_in_place(layers: int) -> Qwen2ForCausalLM:
    """Random weights, drawn where they lie: no float32 copy of them ever exists."""
    config = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=layers, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151_936, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                param.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                param.normal_(std=0.02)
    return model.eval()


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of some calls after one to warm up."""
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def drawn(num: int, buffer: Tensor) -> None:
    for _ in range(num // len(buffer)):
        buffer.normal_()


def measure(way: str, directions: int, threads: int, layers: int) -> dict[str, float]:
    """In this process: one way, then the bare forward pass and the draw."""
    options, dtype = WAYS[way]
    idle = peak_gib()
    model = made_in_place(layers)
    ids = torch.randint(0, 150_000, (1, 64))
    net = fs.functional(model, dtype=dtype)
    loss = fs.objective(net, {"input_ids": ids}, fs.causal_lm)
    start = time.perf_counter()
    result = fs.directional_losses(loss, net.params, key=fs.key(0), n_samples=directions, span=0.1, **options)
    taken, peak = time.perf_counter() - start, peak_gib()
    assert bool(result.losses.isfinite().all())
    assert result.plan.lazy
    with torch.no_grad():
        forward = seconds(lambda: model(ids, labels=ids).loss, 5)
    torch.set_num_threads(1)
    draw = seconds(lambda: drawn(net.layout.num, torch.empty(2**22)), 1)
    evaluations = directions * (2 + 3 * (way == "slopes"))  # a jvp costs about as much as three forward passes
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    return {
        "parameters": net.layout.num, "weights_gib": weights, "idle_gib": idle, "peak_gib": peak,
        "seconds": taken, "per_direction": taken / directions, "per_evaluation": taken / evaluations,
        "forward": forward, "draw": draw, "threads": threads, "directions": directions,
        "realised_error": result.realised.error if result.realised else 0.0,
    }  # fmt: skip


def measure_call(way: str, threads: int, layers: int) -> dict[str, float]:
    """In this process: one call."""
    idle = peak_gib()
    model = made_in_place(layers)
    net = fs.functional(model, dtype=torch.float32 if way.endswith("-32") else None)
    loss = fs.objective(net, {"input_ids": torch.randint(0, 150_000, (1, 64))}, fs.causal_lm)
    start = time.perf_counter()
    value = CALLS[way](loss, net.params)
    taken, peak = time.perf_counter() - start, peak_gib()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    return {
        "parameters": net.layout.num, "weights_gib": weights, "idle_gib": idle, "peak_gib": peak, "seconds": taken,
        "value": value, "threads": threads,
    }  # fmt: skip


def row(way: str, found: dict[str, float]) -> list[str]:
    a, b, one = found["forward"], found["draw"], found["per_direction"]
    return [
        way, f"{found['peak_gib'] - found['weights_gib']:.2f}", f"{found['idle_gib']:.2f}", f"{one:.1f}",
        f"{found['per_evaluation']:.2f}", f"{a:.2f}", f"{b:.1f}", f"{one / (2 * a + b):.2f}",
    ]  # fmt: skip


def print_table(rows: list[list[str]], headers: list[str]) -> None:
    if rows:
        print(tabulate(rows, headers=headers, disable_numparse=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directions", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=28, help="28 make 1.54 billion parameters")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *CALLS], default=[*WAYS, *CALLS])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    parser.add_argument("--child", choices=[*WAYS, *CALLS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        torch.set_num_threads(args.threads)
        if args.child in CALLS:
            print(json.dumps(measure_call(args.child, args.threads, args.layers)))
        else:
            print(json.dumps(measure(args.child, args.directions, args.threads, args.layers)))
        return
    report = {}
    for way in args.ways:
        command = [sys.executable, __file__, "--child", way]
        command += [f"--{name}={getattr(args, name)}" for name in ("directions", "threads", "layers")]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        report[way] = json.loads(lines[-1])
    any_way = next(iter(report.values()))
    print(f"{any_way['parameters']:,} parameters, {any_way['weights_gib']:.2f} GiB of weights, {args.threads} threads")
    headers = [
        "way", "peak - weights (GiB)", "of it idle", "s / direction", "s / evaluation", "(a) forward, s", "(b) draw, s",
        "/ (2a + b)",
    ]  # fmt: skip
    print_table([row(way, found) for way, found in report.items() if way in WAYS], headers)
    rows = [
        [way, f"{found['peak_gib'] - found['weights_gib']:.2f}", f"{found['idle_gib']:.2f}", f"{found['seconds']:.0f}",
         f"{found['value']:.4g}"]
        for way, found in report.items() if way in CALLS
    ]  # fmt: skip
    print_table(rows, ["way", "peak - weights (GiB)", "of it idle", "seconds", "value"])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
