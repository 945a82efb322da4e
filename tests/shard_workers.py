"""What the ranks of tests/test_shards.py do: each in a process of its own, which imports this file."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import funcscope as fs

KEY = fs.key(3)
OPERATORS = {
    "hessian": (fs.hessian, {}),
    "rebuilt": (fs.hessian, {"keep": False}),
    "ggn": (fs.ggn, {}),
    "exact": (fs.exact_fisher, {}),
    "drawn": (fs.fisher_mc, {"key": KEY, "num": 2}),
    "by sequence": (fs.empirical_fisher, {}),
    "by token": (fs.empirical_fisher, {"unit": "token"}),
}
DIRECTIONAL = {
    "difference": {"two_sided": True, "compute_gradient": True, "compute_curvature": True},
    "exact": {"compute_gradient": True, "slope": "jvp", "compute_curvature": True, "curvature": "exact", "chunk": 1},
}


def mlp_loss(sizes: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float64, seed: int = 0) -> fs.Loss:
    """Batches of so many sequences, weights of which one is 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = fs.functional(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype))
        batches = [(torch.randn(n, 4, dtype=dtype), torch.randint(3, (n,))) for n in sizes]
    batches[0][1][0] = -100
    return fs.objective(net, batches, fs.classification)


def lm_loss() -> fs.Loss:
    """A language model on seven sequences in two batches, with padding."""
    from problems import gpt2, seeded, tokens

    model = seeded(0, gpt2).double().eval()
    return fs.objective(fs.functional(model), [tokens(1, 4, 9, pad=3), tokens(2, 3, 6, pad=1)], fs.causal_lm)


def vector(loss: fs.Loss, seed: int = 1) -> torch.Tensor:
    return fs.normal(fs.key(seed), loss.net.theta)


def products(loss: fs.Loss, ranks: Any = None) -> dict[str, Any]:
    """Of every operator, on the ranks or on one."""
    theta, v = loss.net.theta, vector(loss)
    made = {
        name: operator(loss, theta, **settings)
        if ranks is None
        else fs.sharded(operator, loss, theta, ranks, **settings)
        for name, (operator, settings) in OPERATORS.items()
    }
    return {name: matvec(v) for name, matvec in made.items()}


def grams(loss: fs.Loss, ranks: Any = None) -> torch.Tensor:
    if ranks is None:
        return fs.gram(loss, loss.net.theta, by="layer").values
    return fs.sharded_gram(loss, loss.net.theta, ranks, by="layer").values


def directional(loss: fs.Loss, name: str, ranks: Any = None) -> Any:
    settings = {"key": KEY, "n_samples": 11, "span": 0.1, **DIRECTIONAL[name]}
    if ranks is None:
        return fs.directional_losses(loss, loss.net.theta, **settings)
    return fs.sharded_directional_losses(loss, loss.net.theta, ranks, **settings)


def everything(ranks: fs.Processes) -> dict[str, Any]:
    loss, text = mlp_loss(), lm_loss()
    out = {"mlp": products(loss, ranks), "lm": products(text, ranks)}
    out |= {"gram": grams(loss, ranks), "text gram": grams(text, ranks)}
    for name in DIRECTIONAL:
        each = directional(loss, name, ranks)
        out[name] = {**each.arrays(), "mean": float(each.delta_mean.value), "error": float(each.delta_mean.stderr)}
        out[f"{name} residuals"] = each.residuals._asdict()
    H = fs.sharded(fs.hessian, loss, loss.net.theta, ranks)
    out["eigenvalues"] = fs.eigenpairs(H, loss.net.theta, key=KEY, num=2).values
    return out


def few(ranks: fs.Processes) -> dict[str, Any]:
    """Fewer scored sequences than ranks: one shard is empty, one has nothing that is scored."""
    loss = mlp_loss((2,))
    each = directional(loss, "difference", ranks)
    return {"mlp": products(loss, ranks), "gram": grams(loss, ranks), "losses": each.losses}


def traffic(ranks: fs.Processes) -> dict[str, Any]:
    loss = mlp_loss(dtype=torch.float32)
    H = fs.sharded(fs.hessian, loss, loss.net.theta, ranks)
    before, v = (ranks.reduced, ranks.moved), vector(loss)
    for _ in range(5):
        H(v)
    return {
        "reduced": ranks.reduced - before[0],
        "moved": ranks.moved - before[1],
        "num": loss.layout.num,
        "product": H(v),
    }


def wrong(ranks: fs.Processes) -> dict[str, str]:
    """What each rank says where one has something else."""
    loss, odd = mlp_loss(), ranks.rank == ranks.num - 1
    theta = loss.net.theta
    other = fs.objective(loss.net, loss.batches[::-1] if odd else loss.batches, _as_they_are(loss))
    v = vector(loss)
    H = fs.sharded(fs.ggn, loss, theta, ranks)
    cases = {
        "theta": lambda: fs.sharded(fs.hessian, loss, theta + 1e-9 * odd, ranks),
        "length": lambda: fs.sharded(fs.hessian, loss, theta[1:] if odd else theta, ranks),
        "order": lambda: fs.sharded(fs.hessian, other, theta, ranks),
        "settings": lambda: fs.sharded(fs.fisher_mc, loss, theta, ranks, key=fs.key(int(odd))),
        "operator": lambda: fs.sharded(fs.ggn if odd else fs.hessian, loss, theta, ranks),
        "number": lambda: fs.sharded(fs.ggn, *gained(3.0 if odd else 1.0), ranks),
        "criterion": lambda: fs.sharded(fs.ggn, *gained(power=4 if odd else 2), ranks),
        "activation": lambda: fs.sharded(fs.ggn, *gained(act=torch.relu if odd else torch.tanh), ranks),
        "forward pass": lambda: fs.sharded(fs.ggn, *gained(act=_failing if odd else torch.tanh), ranks),
        "vector": lambda: H(v + 1e-15 * odd),
        "unit vectors": lambda: H(torch.eye(len(v), dtype=v.dtype)[int(odd)]),
        "signs": lambda: H(v[:50].sign().repeat(2)[: len(v)] * (-1 if odd else 1)),
        "order of entries": lambda: H(v.flip(0) if odd else v),
        "shape": lambda: H(v[1:] if odd else v),
        "inside": lambda: ranks.together("a step", lambda: 1 / (not odd)),
    }
    for i in range(20):
        key = fs.key(i + 1000 * odd)
        cases[f"key {i}"] = lambda key=key: fs.hutchinson_trace(H, theta, key=key, num=2)
    cases["right"] = lambda: H(v)
    return {name: _said(call) for name, call in cases.items()}


class Gained(nn.Module):
    """A model that takes a number beside its features."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(4, 5), nn.Linear(5, 3), act

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return self.last(self.act(gain * self.first(x)))


def gained(gain: float = 1.0, power: int = 2, act: Any = torch.tanh, ranks: Any = None) -> tuple[fs.Loss, torch.Tensor]:
    """A loss whose first sequence is not scored, and its theta: what no tensor of it holds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = Gained(act).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    scored = fs.custom(lambda out, y: (((out - y[0]) ** power).sum(-1), y[1]))
    data = [({"x": x, "gain": gain}, (y, torch.tensor([0.0, 1, 1, 1, 1]).double()))]
    if ranks is None:
        net = fs.functional(model)
        return fs.objective(net, data, scored), net.theta
    net = fs.sharded_functional(model, ranks)
    return fs.sharded_objective(net, data, scored), net.theta


def _failing(_: torch.Tensor) -> torch.Tensor:
    raise ValueError("mine")


def _as_they_are(loss: fs.Loss) -> fs.Criterion:
    """The same criterion, for batches that are prepared."""
    from dataclasses import replace

    return replace(loss.criterion, prepare=lambda batch: batch)


def _said(call: Any) -> str:
    try:
        call()
    except (ValueError, RuntimeError, ArithmeticError) as err:
        return f"{type(err).__name__}: {err}"
    return "nothing"


def killed(ranks: fs.Processes, how: int = signal.SIGKILL) -> dict[str, Any]:
    """The last rank ends, or stops, in the middle of its third product."""
    loss = mlp_loss()
    H, v = fs.sharded(fs.hessian, loss, loss.net.theta, ranks), vector(loss)
    for step in range(4):
        if step == 2 and ranks.rank == ranks.num - 1:
            os.kill(os.getpid(), how)
        start = time.monotonic()
        said = _said(lambda: H(v))
        if said != "nothing":
            return {"step": step, "said": said, "seconds": time.monotonic() - start, "again": _said(lambda: H(v))}
    return {"said": "nothing"}


def stopped(ranks: fs.Processes) -> dict[str, Any]:
    return killed(ranks, signal.SIGSTOP)


def spread(
    folder: Path, job: str, num: int, timeout: float = 60.0, missing: int = 0, module: str = "shard_workers"
) -> list[Any]:
    """What the job gives on each of `num` ranks; the last may be missing."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=run, args=(r, num, str(folder), module, job, timeout)) for r in range(num)]
    for each in ranks:
        each.start()
    try:
        for each in ranks[: num - missing]:
            each.join(300)
            assert each.exitcode == 0
    finally:
        for each in ranks:
            each.kill()
            each.join()
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(num - missing)]


def run(rank: int, num: int, folder: str, module: str, job: str, timeout: float) -> None:
    """One rank: its job, and what that gives in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num)
    try:
        work = getattr(importlib.import_module(module), job)
        torch.save(work(fs.processes(timeout=timeout)), Path(folder) / f"{rank}.pt")
    finally:
        # The threads of gloo abort an interpreter that ends before them, which what still holds the group lets happen.
        gc.collect()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # on a busy machine they were seen to outlive their group
