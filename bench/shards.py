"""One operator over data on 1, 2 and 4 ranks: the same product, how much sooner, and how many bytes it moves.

    python bench/shards.py [0.1M|14M] [ROUNDS]

GPT-2 with random weights on 26 sequences of 64 tokens in batches of 8: shards are ragged. Four processes of one thread each
are started once; groups of the first 1, 2 and 4 of them take turns, round by round, while the others wait. Seconds are the
slowest rank's, wall and of its CPU; the product of one process without ranks takes its turn, too. Bytes: what `ranks`
counted per product and rank, the model's, and what the loopback device of the machine sent meanwhile over all ranks,
headers and whatever else runs here included. Errors are relative, of 0.1M parameters in float32 and float64.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import CONFIGS
from tabulate import tabulate
from transformers import GPT2LMHeadModel

import funcscope as fs
from funcscope.core.processes import bytes_per_product

NUMS, ROUNDS, REPEATS = (1, 2, 4), 5, 2


def loss_of(size: str, dtype: torch.dtype) -> fs.Loss:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(CONFIGS[size]).eval().to(dtype)
    ids = torch.randint(CONFIGS[size].vocab_size, (26, 64))
    return fs.objective(fs.functional(model), list(ids.split(8)), fs.causal_lm)


def sent() -> int:
    """Bytes that the loopback device has sent."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("lo:"))


def errors(loss: fs.Loss, ranks: fs.Processes | None) -> dict[str, float]:
    """Of three operators beside one process."""
    if ranks is None:
        return {}
    theta = loss.net.theta
    v = fs.normal(fs.key(1), theta)
    cases: dict[str, Any] = {
        "hessian": (fs.hessian, {}),
        "ggn": (fs.ggn, {}),
        "fisher_mc": (fs.fisher_mc, {"key": fs.key(2)}),
    }
    out = {}
    for name, (operator, settings) in cases.items():
        expected = operator(loss, theta, **settings)(v)
        off = fs.sharded(operator, loss, theta, ranks, **settings)(v) - expected
        out[name] = float(off.norm() / expected.norm())
    return out


def timed(product: Any, v: torch.Tensor) -> tuple[float, float, int]:
    """Wall and CPU seconds and loopback bytes of one product."""
    wall, cpu, before = time.perf_counter(), time.process_time(), sent()
    for _ in range(REPEATS):
        product(v)
    each = (time.perf_counter() - wall) / REPEATS, (time.process_time() - cpu) / REPEATS
    return *each, (sent() - before) // REPEATS


def run(rank: int, folder: str, size: str, rounds: int) -> None:
    """One process: its turns in every group that it is in."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(NUMS))
    groups = {num: dist.new_group(list(range(num))) for num in NUMS}
    ranks = {num: fs.processes(groups[num], timeout=300) if rank < num else None for num in NUMS}
    loss, small, wide = loss_of(size, torch.float32), loss_of("0.1M", torch.float32), loss_of("0.1M", torch.float64)
    theta = loss.net.theta
    v = fs.normal(fs.key(1), theta)
    out: dict[str, Any] = {"num": loss.layout.num, "errors": {}, "times": {}, "bytes": {}}
    products: dict[Any, Any] = {"alone": fs.hessian(loss, theta) if rank == 0 else None}
    for num, group in ranks.items():
        out["errors"][num] = {"float32": errors(small, group), "float64": errors(wide, group)}
        products[num] = None if group is None else fs.sharded(fs.hessian, loss, theta, group)
        dist.barrier()
    for turn in range(rounds + 1):
        for name, product in products.items():
            dist.barrier()
            if product is not None:
                counted = ranks[name].moved if name in ranks else 0.0
                each = timed(product, v)
                if turn:
                    out["times"].setdefault(name, []).append(each)
                if name in ranks:
                    out["bytes"][name] = (ranks[name].moved - counted) / REPEATS
    Path(folder, f"{rank}.json").write_text(json.dumps(out))
    dist.barrier()
    dist.destroy_process_group()


def main(size: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder, size, rounds), nprocs=max(NUMS))
        each = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(max(NUMS))]
    rows = [row_of(name, each) for name in ("alone", *map(str, NUMS))]
    base = rows[0]
    for row in rows:
        row["speed-up, wall"], row["speed-up, CPU"] = base["wall s"] / row["wall s"], base["CPU s"] / row["CPU s"]
    print(f"Hessian products of GPT-2 with {each[0]['num']:,} parameters, 26 sequences of 64 tokens")
    print(tabulate(rows, headers="keys", floatfmt=".3g"))
    for num in NUMS:
        print(f"{num} ranks, relative errors: {each[0]['errors'][str(num)]}")
    path = Path(__file__).parent / "results" / "shards.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


def row_of(name: str, each: list[dict[str, Any]]) -> dict[str, Any]:
    """The slowest rank's medians, and bytes per product."""
    times = [
        [statistics.median(column) for column in zip(*rank["times"][name], strict=True)]
        for rank in each
        if name in rank["times"]
    ]
    wall, cpu = (max(row[i] for row in times) for i in (0, 1))
    row: dict[str, Any] = {"ranks": name, "wall s": wall, "CPU s": cpu}
    if name != "alone":
        row["bytes counted"] = each[0]["bytes"][name]
        row["bytes of the model"] = bytes_per_product(each[0]["num"], 4, int(name))
        row["loopback / model"] = times[0][2] / (row["bytes of the model"] * int(name)) if int(name) > 1 else 0.0
    return row


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "0.1M", int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS)
