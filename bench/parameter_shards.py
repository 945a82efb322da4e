"""Parameters on 1, 2 and 4 ranks: the memory of each rank, the time of a product, and the bytes that it moves.

    python bench/parameter_shards.py [WIDTH] [DEPTH]

A stack of DEPTH square matrices (12 of 1,024: 48 MiB in float32) on two inputs, so that parameters are all that counts: one
Hessian of them, a product with a normal draw, and another product. `whole` is `fs.functional` in one process. Memory is the
growth of the resident set during all of that, weights included, of the largest rank; the model beside it is
(k P / n + 5 of the largest matrix), k that of one rank. Every group of ranks is made anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tabulate import tabulate
from torch import nn

import funcscope as fs
from funcscope.core.memory import peak_growth, without_holes
from funcscope.curvature.parameter_shards import bytes_per_product

NUMS, REPEATS = (0, 1, 2, 4), 3
KEY = fs.key(0)


class Loaded(dict):
    """Parameters that are made when they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.named_parameters())

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = super().__getitem__(name).shape
        return fs.normal(fs.fold_in(KEY, name), torch.empty(shape)) / shape[1] ** 0.5


def stack(width: int, depth: int) -> nn.Module:
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width, bias=False, device="meta"), nn.Tanh())]
    return nn.Sequential(*layers)


def work(model: nn.Module, ranks: fs.Processes | None, width: int) -> dict[str, Any]:
    """The operator, the form of a draw, and how long a product takes."""
    data, square = [(torch.ones(2, width), torch.zeros(2, width))], fs.custom(lambda out, y: ((out - y) ** 2).mean(-1))
    if ranks is None:
        state = Loaded(model)
        model.to_empty(device="cpu")
        for name, param in model.named_parameters():
            param.data.copy_(state[name])
        net: Any = fs.functional(model)
        H = fs.hessian(fs.objective(net, data, square), net.theta, check=False)
        space, num, uses = net.theta, net.layout.num, 0
    else:
        net = fs.sharded_functional(model, ranks, state=Loaded(model))
        H = fs.sharded(fs.hessian, fs.sharded_objective(net, data, square), net.theta, ranks)
        space, num, uses = net.shares, net.num_gathered, net.num_uses
    trace = fs.hutchinson_trace(H, space, key=KEY, num=1, distribution="normal")
    v, before, start = torch.ones_like(net.theta), ranks.moved if ranks else 0.0, time.perf_counter()
    for _ in range(REPEATS):
        H(v)
    seconds, moved = (time.perf_counter() - start) / REPEATS, ((ranks.moved if ranks else 0.0) - before) / REPEATS
    return {"form": float(trace.value), "s": seconds, "moved": moved, "num": num, "uses": uses}


def run(rank: int, num: int, folder: str, width: int, depth: int) -> None:
    torch.set_num_threads(1)
    without_holes()
    ranks = None
    if num:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{num}", rank=rank, world_size=num)
        ranks = fs.processes()
    try:
        work(stack(2, 2), ranks, 2)  # what torch takes once for itself
        out, grown = peak_growth(lambda: work(stack(width, depth), ranks, width))
        Path(folder, f"{num} {rank}.json").write_text(json.dumps({**out, "MiB": grown}))
    finally:
        if num:
            dist.destroy_process_group()


def main(width: int, depth: int) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for num in NUMS:
            mp.spawn(run, (num, folder, width, depth), nprocs=max(1, num))
            each = [json.loads(Path(folder, f"{num} {rank}.json").read_text()) for rank in range(max(1, num))]
            rows.append(row_of(num, each, rows, width))
    print(tabulate(rows, headers="keys", floatfmt=".4g"))
    path = Path(__file__).parent / "results" / "parameter_shards.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


def row_of(num: int, each: list[dict[str, Any]], before: list[dict[str, Any]], width: int) -> dict[str, Any]:
    """The largest rank's memory, the slowest one's time."""
    most = max(one["MiB"] for one in each)
    row = {"ranks": num or "whole", "MiB": most, "s a product": max(one["s"] for one in each), "form": each[0]["form"]}
    if num:
        one = next((old["MiB"] for old in before if old["ranks"] == 1), most)
        row["MiB of the model"] = one / num + 5 * width**2 * 4 / 2**20
        row["MB sent"] = each[0]["moved"] / 1e6
        row["at most"] = bytes_per_product(each[0]["num"], each[0]["uses"], 4, num) / 1e6
    return row


if __name__ == "__main__":
    main(*(int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 1024), (2, 12))))
