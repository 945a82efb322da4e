"""What the ranks of tests/test_parameter_shards.py do: each in a process of its own, which imports this file."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from shard_workers import KEY, OPERATORS, _failing, _said, gained
from torch import nn
from torch.func import grad, jvp

import funcscope as fs


class Odd(nn.Module):
    """Parameters in odd places: a number, one without a module, one that is added in place, one that is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.randn(7))
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3, bias=False)
        self.norm = nn.LayerNorm(7)
        self.register_buffer("offset", torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x) * self.scale
        h += self.shift
        h = self.norm(h).tanh() + self.offset
        return self.last(h) + h @ self.last.weight.T


def models() -> dict[str, tuple[nn.Module, list[Any], fs.Criterion, Any]]:
    """Name -> model, batches, criterion, what is rematerialised."""
    from problems import gpt2, seeded, tokens

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        odd = Odd().double()
        data = [(torch.randn(n, 5).double(), torch.randint(3, (n,))) for n in (3, 2)]
        data[0][1][0] = -100
        real = [(torch.randn(n, 5).double(), torch.randn(n, 3).double()) for n in (3, 2)]
    text = [tokens(1, 4, 9, pad=3), tokens(2, 3, 6, pad=1)]
    square = fs.custom(lambda out, y: ((out - y) ** 2).sum(-1).tanh())
    return {
        "mlp": (mlp, data, fs.classification, "none"),
        "odd": (odd, real, square, ("first",)),
        "gpt2": (seeded(0, gpt2).double().eval(), text, fs.causal_lm, "none"),
        "layers": (seeded(0, gpt2).double().eval(), text, fs.causal_lm, "layer"),
    }


def alone(name: str) -> fs.Loss:
    model, batches, criterion, remat = models()[name]
    return fs.objective(fs.functional(model, remat=remat), batches, criterion)


def together(name: str, ranks: fs.Processes) -> fs.core.sharded_objective.ShardedLoss:
    model, batches, criterion, remat = models()[name]
    return fs.sharded_objective(fs.sharded_functional(model, ranks, remat=remat), batches, criterion)


def operators(name: str) -> dict[str, Any]:
    """Fishers need a distribution of labels; of layers, what their rematerialisation changes."""
    some = {"odd": ("hessian", "rebuilt", "ggn"), "layers": ("hessian", "ggn")}.get(name, tuple(OPERATORS))
    return {key: OPERATORS[key] for key in some}


def numbers(loss: Any, ranks: fs.Processes | None, name: str) -> dict[str, Any]:
    """All that one rank gives, and several: vectors whole."""
    theta = loss.net.theta
    space = theta if ranks is None else loss.net.shares
    whole = (lambda x: x) if ranks is None else space.gathered
    v = fs.normal(KEY, theta) if ranks is None else space.draw(KEY, "normal")
    out = {"theta": whole(theta), "v": whole(v), "loss": loss(theta), "gradient": whole(grad(loss)(theta))}
    out["slope"] = jvp(loss, (theta,), (v,))[1]
    out["bend"] = jvp(lambda t: jvp(loss, (t,), (v,))[1], (theta,), (v,))[1]
    out["H v by jvp of grad"] = whole(jvp(grad(loss), (theta,), (v,))[1])
    for key, (operator, settings) in operators(name).items():
        made = (
            operator(loss, theta, **settings) if ranks is None else fs.sharded(operator, loss, theta, ranks, **settings)
        )
        out[key] = whole(made(v))
    if name in ("mlp", "layers"):
        few = {} if name == "mlp" else {"max_matvecs": 4}
        H = fs.hessian(loss, theta) if ranks is None else fs.sharded(fs.hessian, loss, theta, ranks)
        out["trace"] = fs.hutchinson_trace(H, space, key=KEY, num=2).samples
        pairs = fs.eigenpairs(H, space, key=KEY, num=2, vectors=True, **few)
        out["eigenvalues"] = pairs.values
        out["eigenvectors"] = torch.stack([whole(row) for row in pairs.vectors])
    if name == "mlp":
        density = fs.spectral_density(H, space, key=KEY, num_probes=2, steps=5)
        out["nodes"], out["weights"] = density.nodes, density.weights
    return out


def everything(ranks: fs.Processes) -> dict[str, Any]:
    return {name: numbers(together(name, ranks), ranks, name) for name in models()}


def traffic(ranks: fs.Processes) -> dict[str, Any]:
    """Bytes of one product of each kind."""
    loss = together("mlp", ranks)
    kinds = {"ggn": (fs.ggn, {}), "hessian": (fs.hessian, {}), "rebuilt": (fs.hessian, {"keep": False})}
    out: dict[str, Any] = {"num": loss.net.num_gathered, "uses": loss.net.num_uses, "batches": len(loss.batches)}
    for name, (operator, settings) in kinds.items():
        H = fs.sharded(operator, loss, loss.net.theta, ranks, **settings)
        before = ranks.moved
        H(loss.net.theta)
        out[name] = ranks.moved - before
    return out


def wrong(ranks: fs.Processes) -> dict[str, str]:
    """What each rank says where one has something else."""
    odd = ranks.rank == ranks.num - 1
    loss = together("mlp", ranks)
    model, batches, criterion, _ = models()["mlp"]
    net, theta, v = loss.net, loss.net.theta, loss.net.theta
    other = models()["mlp"][0]
    with torch.no_grad():
        other[0].bias[0] += odd
    H, whole = fs.sharded(fs.ggn, loss, theta, ranks), net.shares.gathered(v)
    other_act, failing = (torch.relu, _failing) if odd else (torch.tanh, torch.tanh)
    return {
        "weights": _said(lambda: fs.sharded_functional(other, ranks)),
        "settings": _said(lambda: fs.sharded_functional(model, ranks, remat=("0",) if odd else "none")),
        "meta": _said(lambda: fs.sharded_functional(model.to("meta") if odd else model, ranks)),
        "data": _said(lambda: fs.sharded_objective(net, batches[::-1] if odd else batches, criterion)),
        "operator": _said(lambda: fs.sharded(fs.hessian, loss, theta, ranks, keep=odd)),
        "theta": _said(lambda: fs.sharded(fs.ggn, loss, theta[1:] if odd else theta, ranks)),
        "vector": _said(lambda: H(v[1:] if odd else v)),
        "key": _said(lambda: H(net.shares.draw(fs.key(int(odd)), "normal"))),
        "whole vector": _said(lambda: H(net.shares.of(whole.flip(0) if odd else whole))),
        "without a product": _said(lambda: net.shares.dot(v, 0 * v if odd else H(v))),
        "number": _said(lambda: gained(3.0 if odd else 1.0, ranks=ranks)),
        "criterion": _said(lambda: fs.sharded(fs.ggn, *gained(power=4 if odd else 2, ranks=ranks), ranks)),
        "activation": _said(lambda: fs.sharded(fs.ggn, *gained(act=other_act, ranks=ranks), ranks)),
        "forward pass": _said(lambda: fs.sharded(fs.ggn, *gained(act=failing, ranks=ranks), ranks)),
        "scaled": _said(lambda: fs.eigenpairs(fs.linalg.scaled(H, 2.0), theta, key=KEY, num=1)),
        "theta for shares": _said(lambda: fs.hutchinson_trace(H, theta, key=KEY, num=2)),
        "right": _said(lambda: fs.hutchinson_trace(H, net.shares, key=KEY, num=2)),
    }


def missing(ranks: fs.Processes) -> torch.Tensor:
    """A product where a target is missing and the last rank has one batch more than the others."""
    loss = fs.sharded_objective(fs.sharded_functional(models()["mlp"][0], ranks), *with_missing())
    return loss.net.shares.gathered(
        fs.sharded(fs.hessian, loss, loss.net.theta, ranks)(loss.net.shares.draw(KEY, "normal"))
    )


def with_missing() -> tuple[list[Any], fs.Criterion]:
    """Two sequences, then one; of weight 0 where the target is not a number."""
    x, y, weight = (
        torch.ones(3, 5).double().cumsum(0) / 3,
        torch.ones(3, 3).double(),
        torch.tensor([1.0, 0, 1]).double(),
    )
    y[1, 0] = torch.nan
    batches = [(x[at], (y[at], weight[at])) for at in (slice(0, 2), slice(2, 3))]
    return batches, fs.custom(lambda out, targets: (((out - targets[0]) ** 2).sum(-1), targets[1]))


def killed(ranks: fs.Processes, how: int = signal.SIGKILL) -> dict[str, Any]:
    """The last rank ends, or stops, in the middle of a forward pass of its third product."""
    loss = together("mlp", ranks)
    H, gather, left = fs.sharded(fs.hessian, loss, loss.net.theta, ranks), ranks.gathered_rows, [0]

    def gathered_rows(rows: torch.Tensor, what: str) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), how)
        return gather(rows, what)

    ranks.gathered_rows = gathered_rows
    for step in range(4):
        left[0] = 5 if step == 2 and ranks.rank == ranks.num - 1 else 0
        start = time.monotonic()
        said = _said(lambda: H(loss.net.theta))
        if said != "nothing":
            again = _said(lambda: H(loss.net.theta))
            return {"step": step, "said": said, "seconds": time.monotonic() - start, "again": again}
    return {"said": "nothing"}


def stopped(ranks: fs.Processes) -> dict[str, Any]:
    return killed(ranks, signal.SIGSTOP)


def fully_sharded(ranks: fs.Processes) -> dict[str, Any]:
    """Parameters that FSDP2 has spread, into a model of the same kind on the meta device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate

    model, batches, criterion, _ = models()["mlp"]
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks.num,)))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = models()["mlp"][0].to("meta")
    before = ranks.rowed
    net = fs.sharded_functional(meta, ranks, state=state)
    gathered = ranks.rowed - before
    loss = fs.sharded_objective(net, batches, criterion)
    product = fs.sharded(fs.ggn, loss, net.theta, ranks)(net.shares.draw(KEY, "normal"))
    copies = {name: DTensor.from_local(x.full_tensor(), x.device_mesh, [Replicate()]) for name, x in state.items()}
    return {
        "gathered": gathered,
        "product": net.shares.gathered(product),
        "functional": _said(lambda: fs.functional(model)),
        "itself": _said(lambda: fs.sharded_functional(model, ranks)),
        "replicated": _said(lambda: fs.sharded_functional(meta, ranks, state=copies)),
        "missing": _said(lambda: fs.sharded_functional(meta, ranks, state={"0.weight": state["0.weight"]})),
    }


WIDTH, DEPTH = 1024, 12
"""48 MiB of float32 in matrices of 4 MiB."""


class Loaded(dict):
    """Parameters that are made when they are asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.named_parameters())

    def __getitem__(self, name: str) -> torch.Tensor:
        return fs.normal(fs.fold_in(KEY, name), torch.empty(super().__getitem__(name).shape)) / 32


def memory(ranks: fs.Processes) -> dict[str, Any]:
    """MiB that theta, its operator, a vector and two products take on this rank."""
    from funcscope.core.memory import peak_growth, without_holes

    without_holes()
    layers = [part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH, bias=False, device="meta"), nn.Tanh())]
    model, data = nn.Sequential(*layers), [(torch.ones(2, WIDTH), torch.zeros(2, WIDTH))]
    zeros = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
    small = fs.sharded_functional(nn.Linear(2, 2), ranks, state=zeros)  # what torch takes once for itself
    square = fs.custom(lambda out, y: ((out - y) ** 2).mean(-1))
    warm = fs.sharded_objective(small, [(torch.ones(2, 2), torch.zeros(2, 2))], square)
    fs.sharded(fs.hessian, warm, small.theta, ranks)(small.theta)

    def work() -> float:
        net = fs.sharded_functional(model, ranks, state=Loaded(model))
        loss = fs.sharded_objective(net, data, square)
        H = fs.sharded(fs.hessian, loss, net.theta, ranks)
        v = H(net.shares.draw(KEY, "normal"))
        return net.shares.dot(v, H(v))

    form, grown = peak_growth(work)
    return {"form": form, "MiB": grown}


def coupled(ranks: fs.Processes) -> dict[str, str]:
    """A loss that looks at the mean over its batch, which is cut."""
    model, batches, *_ = models()["mlp"]
    square = fs.custom(lambda out, y: ((out - out.mean(0)) ** 2).sum(-1))
    loss = fs.sharded_objective(fs.sharded_functional(model, ranks), batches, square)
    return {"said": _said(lambda: fs.sharded(fs.ggn, loss, loss.net.theta, ranks))}
