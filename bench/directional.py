"""What one random direction costs, beside a bare forward pass and the documented algorithm, in one run.

    python bench/directional.py [--threads N] [--rounds N] [--sizes 0.1M 14M 124M] [--json FILE]

(a) a bare forward pass of the untouched model, no gradient, with its loss, (b) drawing one direction alone by
one-threaded `torch.randn`, (c) the documented algorithm: a flat float32 copy, a rescaled direction, the whole vector
written into the model and back, (d) `directional_losses`, filter-normalised, per direction, set-up and baseline included.
Each round times all of them in turn; figures are medians over rounds and ratios of medians. Extra memory is the growth of
the peak resident set over a process that has run a forward pass, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.benchmark import Timer
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs

CONFIGS = {
    "0.1M": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 256, "n_positions": 64},
    "14M": {"n_layer": 4, "n_embd": 384, "n_head": 6, "vocab_size": 16384, "n_positions": 64},
    "124M": {},
}
DIRECTIONS = {"0.1M": 48, "14M": 16, "124M": 8}
SPAN = 0.1


def model_of(size: str) -> tuple[nn.Module, Tensor]:
    """A GPT-2 with random weights, and a batch of 4 x 64 tokens; made in place, so that its making leaves no peak."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    torch.manual_seed(0)
    config = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLMLoss", **CONFIGS[size]}
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**config))
    assert not list(model.buffers())
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.fill_(1.0) if "ln_" in name and name.endswith("weight") else param.normal_(std=0.02)
    return model.eval(), torch.randint(0, 250, (4, 64))


class Documented:
    """The published loop, as it is described: in place, from a flat copy, restored afterwards."""

    def __init__(self, model: nn.Module, ids: Tensor):
        self.model, self.ids = model, ids
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.base = parameters_to_vector(self.params).detach().float()

    @torch.no_grad()
    def __call__(self) -> float:
        direction = torch.randn_like(self.base)
        offset, parts = 0, []
        for p in self.params:
            z = direction[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
            if p.ndim > 1:
                dims = tuple(range(1, p.ndim))
                z = z / (z.norm(dim=dims, keepdim=True) + 1e-10) * p.norm(dim=dims, keepdim=True)
            else:
                z = z / (z.norm() + 1e-10) * p.norm()
            parts.append(z.flatten())
        vector_to_parameters(self.base + SPAN * torch.cat(parts), self.params)
        loss = float(self.model(self.ids, labels=self.ids).loss)
        vector_to_parameters(self.base, self.params)
        return loss


def ways(size: str) -> dict[str, tuple[Callable[[], object], int]]:
    """What is timed, and how many directions one call of it makes."""
    model, ids = model_of(size)
    other, _ = model_of(size)
    net = fs.functional(model)
    loss = fs.objective(net, {"input_ids": ids}, fs.causal_lm)
    num = DIRECTIONS[size]

    @torch.no_grad()
    def bare() -> object:
        return model(ids, labels=ids).loss

    def ours(normalize: str) -> Callable[[], object]:
        return lambda: fs.directional_losses(
            loss, net.params, key=fs.key(0), n_samples=num, span=SPAN, normalize=normalize
        )

    found = {
        "(a) bare forward": (bare, 1),
        "(b) torch.randn": (lambda: torch.randn(net.layout.num), 1),
        "(c) documented": (Documented(other, ids), 1),
        "(d) filter": (ours("filter"), num),
    }
    if size != "0.1M":
        found["(d) layer"] = (ours("layer"), num)
    return found


def measure(size: str, threads: int, rounds: int) -> dict[str, float]:
    """Median milliseconds per direction of each way."""
    timed = {}
    for name, (call, num) in ways(size).items():
        one = threads if "randn" not in name else 1
        timed[name] = (Timer("call()", globals={"call": call}, num_threads=one), num)
        timed[name][0].timeit(1)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, (timer, num) in timed.items():
            repeats = 20 if size == "0.1M" and num == 1 else 5 if size == "14M" and num == 1 else 1
            seconds[name].append(timer.timeit(repeats).mean / num)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def extra_memory(size: str, way: str) -> float:
    """In this process: growth of the peak over a bare forward, for one or two directions of one way."""
    DIRECTIONS[size] = 2
    model, ids = model_of(size)
    with torch.no_grad():
        model(ids, labels=ids)
    call = {
        "(c) documented": lambda: Documented(model, ids)(),
        "(d) filter": lambda: fs.directional_losses(
            fs.objective(fs.functional(model), {"input_ids": ids}, fs.causal_lm),
            fs.functional(model).params, key=fs.key(0), n_samples=2, span=SPAN,
        ),
    }[way]  # fmt: skip
    before = peak_mib()
    call()
    return peak_mib() - before


def extra_memory_in_a_process(size: str, way: str) -> float:
    command = [sys.executable, __file__, "--memory", size, way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def row(size: str, ms: dict[str, float], memory: dict[str, float]) -> list[list[str]]:
    a, b = ms["(a) bare forward"], ms["(b) torch.randn"]
    rows = []
    for name, value in ms.items():
        ratios = (f"{value / base:.2f}" for base in (a, a + b, a + 2 * b))
        rows.append([size, name, f"{value:.2f}", *ratios, f"{memory[name]:.0f}" if name in memory else ""])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "directional.json")
    parser.add_argument("--memory", nargs=2, metavar=("SIZE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    if args.memory:
        print(extra_memory(*args.memory))
        return
    # first, as a new process starts with the peak of the one that made it
    ways_of = ("(c) documented", "(d) filter") if "124M" in args.sizes else ()
    extra = {way: extra_memory_in_a_process("124M", way) for way in ways_of}
    report, rows = {}, []
    for size in args.sizes:
        rounds = args.rounds if size != "124M" else max(3, args.rounds // 2)
        ms = measure(size, args.threads, rounds)
        memory = extra if size == "124M" else {}
        report[size] = {"ms": ms, "extra_mib": memory, "rounds": rounds}
        rows += row(size, ms, memory)
        largest = max(p.numel() for p in model_of(size)[0].parameters()) * 4 / 2**20
        report[size]["largest_tensor_mib"] = largest
    headers = ["size", "way", "ms per direction", "/ a", "/ (a + b)", "/ (a + 2b)", "extra MiB"]
    print(tabulate(rows, headers=headers, stralign="right"))
    tensors = ", ".join(f"{size} {found['largest_tensor_mib']:.0f} MiB" for size, found in report.items())
    print(f"{args.threads} threads, torch {torch.__version__}; largest tensor: {tensors}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    args.json.write_text(json.dumps({"threads": args.threads, "machine": machine, "sizes": report}, indent=1))


if __name__ == "__main__":
    main()
