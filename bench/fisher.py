"""Inner products of per-sample gradients beside `vmap(grad)`, torchjd's engine, BackPACK, nngeometry; KFAC beside curvlinops.

    python bench/fisher.py [rows|growth|thousand|kfac]

rows: Gram of 64 sequences of 32 tokens; each way in a process of its own, its time in units of the bare forward pass
that takes turns with it there, its memory as the growth of the resident set. growth: exponents of our time in N, T and P.
thousand: 1,000 sequences on the 14M model. kfac: see bench/kfac.py. The peers are `pip install --no-deps torchjd
backpack-for-pytorch nngeometry unfoldnd`, and curvlinops (bench/install_peers.sh); one that does not take a model says why.
One thread.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import ENDS, grown
from torch import Tensor
from torch.func import functional_call, grad, vmap
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import funcscope as fs

NUM, LENGTH, ROUNDS = 64, 32, 5
WAYS = ("funcscope", "vmap(grad)", "torchjd", "BackPACK", "nngeometry")


def config_of(name: str, length: int = LENGTH) -> Any:
    kind, size = name.split("-")
    width, vocab = {"1M": (128, 1024), "4M": (256, 4096), "14M": (384, 16384)}[size]
    if kind == "gpt2":
        return GPT2Config(n_layer=4, n_embd=width, n_head=width // 64, vocab_size=vocab, n_positions=length, **ENDS)
    return LlamaConfig(
        hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=4, num_attention_heads=width // 64,
        num_key_value_heads=width // 64, vocab_size=vocab // 2, max_position_embeddings=length, tie_word_embeddings=False,
        attn_implementation="eager", **ENDS,
    )  # fmt: skip


class Task:
    """A model with random weights and random tokens; what is measured does not depend on either."""

    def __init__(self, name: str, num: int = NUM, length: int = LENGTH):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        config = config_of(name, length)
        kind = LlamaForCausalLM if isinstance(config, LlamaConfig) else GPT2LMHeadModel
        self.model = kind(config).eval()
        self.model.set_attn_implementation("eager")
        self.ids = torch.randint(config.vocab_size, (num, length))
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        self.inputs = {"attention_mask": mask, "position_ids": torch.arange(length)[None], "use_cache": False}
        self.loss = fs.objective(fs.functional(self.model), [self.ids], fs.causal_lm)
        self.theta = self.loss.net.theta
        self.loss.check_function()

    def losses(self, params: dict[str, Tensor] | None, ids: Tensor) -> Tensor:
        """The sum over the tokens of each sequence."""
        given = (self.inputs | {"input_ids": ids},)
        out = self.model(**given[0]) if params is None else functional_call(self.model, params, (), given[0])
        logits = out.logits[:, :-1].transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").sum(1)

    @torch.no_grad()
    def bare(self) -> Tensor:
        return self.losses(None, self.ids)

    def way(self, name: str) -> Callable[[], Tensor]:
        return {
            "funcscope": self.ours, "vmap(grad)": self.mapped, "torchjd": self.torchjd,
            "BackPACK": self.backpack, "nngeometry": self.nngeometry,
        }[name]  # fmt: skip

    def ours(self) -> Tensor:
        return fs.curvature.gram(self.loss, self.theta, by="none", chunk_size=len(self.ids)).total

    def mapped(self) -> Tensor:
        params = {name: param.detach() for name, param in self.model.named_parameters()}
        rows = vmap(grad(lambda p, ids: self.losses(p, ids[None])[0]), (None, 0))(params, self.ids)
        total = torch.zeros(len(self.ids), len(self.ids), dtype=torch.float64)
        for name in list(rows):
            row = rows.pop(name).flatten(1)
            total += row @ row.T
        return total

    def torchjd(self) -> Tensor:
        from torchjd.autogram import Engine

        return Engine(self.model, batch_dim=0).compute_gramian(self.losses(None, self.ids))

    def backpack(self) -> Tensor:
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        model = extend(self.model, use_converter=False)
        with backpack(BatchGrad()):
            self.losses(None, self.ids).sum().backward()
        rows = [param.grad_batch.flatten(1) for param in model.parameters()]
        return sum(row @ row.T for row in rows)

    def nngeometry(self) -> Tensor:
        from nngeometry.backend import TorchHooksJacobianBackend
        from nngeometry.layercollection import LayerCollection

        layers = LayerCollection.from_model(self.model)
        backend = TorchHooksJacobianBackend(
            model=self.model, function=lambda ids, *_: self.losses(None, ids)[:, None], layer_collection=layers
        )
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(self.ids, self.ids), batch_size=len(self.ids)
        )
        return backend.get_gram_matrix(loader).squeeze()


def measured(name: str, way: str, num: int, length: int, rounds: int) -> dict[str, Any]:
    task = Task(name, num, length)
    found, value = timed(task.way(way), task.bare, rounds)
    gram = value.double()
    return found | {
        "P": task.theta.numel(), "gram": gram[:4, :4].flatten().tolist(), "top": float(torch.linalg.eigvalsh(gram)[-1]),
    }  # fmt: skip


def timed(call: Callable[[], Any], bare: Callable[[], Any], rounds: int) -> tuple[dict[str, float], Any]:
    """Peak of one call, then medians of the call and of the bare forward pass in turns; and what the call gives."""
    value: dict[str, Any] = {}
    bare()
    peak = grown(lambda: value.setdefault("first", call()))
    seconds: dict[str, list[float]] = {"call": [], "bare": []}
    for _ in range(rounds):
        for each, function in (("bare", bare), ("call", call)):
            start = time.perf_counter()
            function()
            seconds[each].append(time.perf_counter() - start)
    ratio = statistics.median(c / b for c, b in zip(seconds["call"], seconds["bare"], strict=True))
    return {"ratio": ratio, "seconds": statistics.median(seconds["call"]), "MiB": peak}, value["first"]


def apart(name: str, way: str, num: int = NUM, length: int = LENGTH, rounds: int = ROUNDS) -> dict[str, Any]:
    return run_one(__file__, [name, way, num, length, rounds])


def run_one(file: str, arguments: list[Any]) -> dict[str, Any]:
    """What `python file one [...]` prints last, in a process of its own; or why it does not run."""
    arguments = [sys.executable, file, "one", json.dumps(arguments)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        return {"refusal": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:90]}
    return json.loads(done.stdout.splitlines()[-1])


def rows() -> None:
    for name in ("gpt2-4M", "gpt2-14M", "llama-4M", "llama-14M"):
        oracle = None
        for way in reversed(WAYS):
            found = apart(name, way)
            if "refusal" in found:
                print(f"{name:10} {way:12} does not run: {found['refusal']}", flush=True)
                continue
            gram = torch.tensor(found["gram"])
            oracle = gram if way == "vmap(grad)" else oracle
            off = "" if oracle is None else f"  off {float((gram - oracle).norm() / oracle.norm()):.0e}"
            print(
                f"{name:10} {way:12} {found['ratio']:6.2f} forwards {found['MiB']:8.0f} MiB  P {found['P']:,}{off}",
                flush=True,
            )


def growth() -> None:
    """Slopes between doublings, in the logarithm."""
    base = apart("gpt2-4M", "funcscope", 32, 32)
    for what, other in {
        "N, 32 to 64": apart("gpt2-4M", "funcscope", 64, 32),
        "T, 32 to 64": apart("gpt2-4M", "funcscope", 32, 64),
        "P, 4M to 14M": apart("gpt2-14M", "funcscope", 32, 32),
    }.items():
        factor = other["P"] / base["P"] if what[0] == "P" else 2
        slope = math.log(other["seconds"] / base["seconds"]) / math.log(factor)
        print(f"time grows with {what}: exponent {slope:.2f}", flush=True)


def thousand() -> None:
    task = Task("gpt2-14M", 1000, LENGTH)
    start = time.perf_counter()
    with torch.no_grad():
        task.model(task.ids[:8])
    peak = grown(lambda: fs.curvature.gram(task.loss, task.theta, by="none", chunk_size=24).total)
    print(f"1,000 sequences on {task.theta.numel():,}: {peak:.0f} MiB, {time.perf_counter() - start:.0f} s", flush=True)


def kfac() -> None:
    import kfac

    kfac.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measured(*json.loads(sys.argv[2]))))
    else:
        {"rows": rows, "growth": growth, "thousand": thousand, "kfac": kfac}[(sys.argv[1:] or ["rows"])[0]]()
