"""Information and representation of a GPT-2 of 13M parameters on 64 sequences of 128 tokens: what each metric costs.

    python bench/activations.py [all|growth]

all: every metric of both categories through the catalogue, as a study runs them on two threads: seconds of each, in units of
the bare forward pass too, and of the whole. growth: peak memory of the metrics of one pass on 2, 4 and 8 batches, each in a
process of its own.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from cases import grown
from fisher import run_one
from mechanisms import Case

import funcscope as fs
from funcscope.study.catalogue import CATALOGUE
from funcscope.study.engine import run
from funcscope.study.meter import Options
from funcscope.study.sharing import is_shared
from funcscope.study.sources import InMemory

CATEGORIES = ("information", "representation")


def everything() -> None:
    case = Case()
    torch.set_num_threads(2)
    case.bare()
    began = time.perf_counter()
    for _ in range(3):
        case.bare()
    forward = (time.perf_counter() - began) / 3
    print(f"bare forward pass: {forward:.2f} s", flush=True)
    metrics = [one for one in CATALOGUE.values() if one.category in CATEGORIES and one.on == "model"]
    source = InMemory({"data": case.loss.split(16)}, "gpt2", content="1")
    began = time.perf_counter()

    def watch(outcome: object) -> None:
        seconds = outcome.cost["seconds"]  # type: ignore[attr-defined]
        name, status = outcome.metric, outcome.status  # type: ignore[attr-defined]
        print(f"{name:24} {status:8} {seconds:7.1f} s {seconds / forward:7.1f} forwards", flush=True)

    run(metrics, [source], options=Options(), watch=watch)
    print(f"all {len(metrics)}: {time.perf_counter() - began:.0f} s", flush=True)


def growth() -> None:
    for batches in (2, 4, 8):
        print(f"{batches} batches: {run_one(__file__, [batches])['MiB']:.0f} MiB", flush=True)


def measured(batches: int) -> dict[str, float]:
    case = Case(batches)
    case.bare()
    loss = case.loss
    metrics = [one for one in CATALOGUE.values() if one.category == "representation" and is_shared(one)]

    def call() -> None:
        made = {
            one.name: one.call.reading(  # type: ignore[attr-defined]
                loss, case.params, **({"key": fs.key(0)} if "key" in one.needs else {}), **_small(one.settings)
            )
            for one in metrics
        }
        fs.read(loss, case.params, made)

    return {"MiB": grown(call)}


def _small(settings: dict[str, object]) -> dict[str, object]:
    """Samples of one size, whatever the batches, and few permutations."""
    return {name: {"size": 256, "num": 19}.get(name, value) for name, value in settings.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(measured(*json.loads(sys.argv[2]))))
    else:
        {"all": everything, "growth": growth}[(sys.argv[1:] or ["all"])[0]]()
