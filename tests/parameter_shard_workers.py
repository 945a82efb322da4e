"""What the ranks of tests/test_parameter_shards.py do: each in a process of its own, which imports this file."""

from __future__ import annotations

from typing import Any

import torch
from shard_workers import KEY, OPERATORS
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
    """Fishers need a distribution of labels."""
    return {key: one for key, one in OPERATORS.items() if name != "odd" or key in ("hessian", "rebuilt", "ggn")}


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
        H = fs.hessian(loss, theta) if ranks is None else fs.sharded(fs.hessian, loss, theta, ranks)
        out["trace"] = fs.hutchinson_trace(H, space, key=KEY, num=4).samples
        pairs = fs.eigenpairs(H, space, key=KEY, num=2, vectors=True, tol=1e-9)
        out["eigenvalues"] = pairs.values
        out["eigenvectors"] = torch.stack([whole(row) for row in pairs.vectors])
        density = fs.spectral_density(H, space, key=KEY, num_probes=2, steps=5)
        out["nodes"], out["weights"] = density.nodes, density.weights
    return out


def everything(ranks: fs.Processes) -> dict[str, Any]:
    return {name: numbers(together(name, ranks), ranks, name) for name in models()}
