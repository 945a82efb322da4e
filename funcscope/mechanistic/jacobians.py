"""Derivatives of the residual stream: by an earlier layer's at the same position, by embeddings at every other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from ..core.checks import check_choice, check_count
from ..core.estimate import wide
from ..core.keys import Key, check_key, fold_in, rademacher
from ..core.layout import Params
from ..core.model import Functional, Inputs
from ..core.objective import Loss
from ..core.result import Result, derived, internal, quantity
from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from ..core.trace import Edit, Kernel, apply_with, trace
from .logit_attribution import check_labels
from .passes import attributed_ids
from .weights import Weights

Pull = Callable[[Tensor], tuple[Tensor, ...]]


class MeanJacobians(NamedTuple):
    """By layer, in float64."""

    jacobians: Float[Tensor, "L D D"]
    stderr_norm: Float[Tensor, " L"]
    """The Frobenius norm of the standard errors of the entries, over sequences; nan for one sequence."""


def mean_jacobians(
    loss: Loss,
    params: Params,
    *,
    key: Key,
    method: Literal["exact", "probes"] = "exact",
    num: int = 1,
    chunk_size: int = 16,
) -> MeanJacobians:
    r"""$J_l$, the mean over scored positions of $\partial h_L[t] / \partial h_l[t]$, for every layer's residual stream.

    The derivative at one position, through all layers after: attention to other positions is held fixed in its keys and
    values, which in a causal model depend on nothing that comes later. So one product has all positions and all layers.

    method: "exact" makes D products, one for each unit of the last stream. "probes" makes `num` with signs v of their own at
    every position, $J_l \approx \overline{v\, (J^\top v)^\top}$, unbiased; its relative error falls as
    $\sqrt{D / (num \cdot positions)}$ and is within `stderr_norm`, the error over sequences of the weighted mean. chunk_size:
    products that are made together.

    Raises ValueError for models that are not causal or not described.
    """
    check_choice("method", method, ("exact", "probes"))
    check_key(key)
    check_count("num", num)
    check_count("chunk_size", chunk_size)
    w = Weights(loss.net, params)
    w.check_linear_head()
    rows, weights = 0, []
    sums: Sums | None = None
    for inputs, targets in loss.batches:
        weight = check_labels(targets).weight
        pull, shape = _pull(w, params, inputs, weight.device)
        keys = [fold_in(key, rows + i) for i in range(len(weight))]
        exact = method == "exact"
        made = _exact(pull, shape, weight, chunk_size) if exact else _probed(pull, shape, weight, keys, num, chunk_size)
        sums = made if sums is None else Sums(*(x + y for x, y in zip(sums, made, strict=True)))
        rows += len(weight)
        weights.append(weight.sum(1, dtype=wide(weight.device)))
    assert sums is not None  # a loss has a batch
    return _mean(sums, torch.cat(weights))


class Sums(NamedTuple):
    """Over sequences: of A, their weighted sums of derivatives, of b A, b their weights, and of |A|^2."""

    total: Float[Tensor, "L D D"]
    weighted: Float[Tensor, "L D D"]
    square: Float[Tensor, " L"]


def _mean(sums: Sums, weights: Float[Tensor, " n"]) -> MeanJacobians:
    """The ratio of the sums, and the norm of its linearised errors: that of all A - b R, R the ratio."""
    mean, num = sums.total / weights.sum(), int((weights != 0).sum())
    cross, own = (mean * sums.weighted).sum((1, 2)), mean.square().sum((1, 2)) * weights.square().sum()
    factor = num / (num - 1) if num > 1 else math.nan
    off = (sums.square - 2 * cross + own).clamp(min=0)
    return MeanJacobians(mean, (factor * off).sqrt() / weights.sum())


class PositionJacobian(Result):
    """How strongly the residual stream at each position depends on the embedding at each other."""

    values: Float[Tensor, "b t t"] = quantity(
        "norm of the derivative", per=("sequence", "query", "key"), stderr="values_stderr", shown=False
    )
    """nan where one of the two is padding."""
    values_stderr: Float[Tensor, "b t t"]
    """Over probes; 0 where exact."""
    method: str
    num: int
    layer: int
    num_products: int = internal()

    @derived("mean norm of the derivative", per="distance", stderr="by_distance_stderr")
    def by_distance(self) -> Float[Tensor, " n"]:
        """Over all pairs of tokens of which the query stands so many places behind the key."""
        sums, counts = self._of_distances
        return sums.sum(1) / counts.sum(1)

    @property
    def by_distance_stderr(self) -> Float[Tensor, " n"]:
        """Over sequences."""
        return torch.stack([ratio_stderr(*each) for each in zip(*self._of_distances, strict=True)])

    @property
    def _of_distances(self) -> tuple[Float[Tensor, "n b"], Float[Tensor, "n b"]]:
        each = [self.values.diagonal(-distance, 1, 2) for distance in self.coords["distance"]]
        return torch.stack([x.nansum(1) for x in each]), torch.stack([x.isfinite().sum(1).to(x) for x in each])

    @property
    def coords(self) -> dict[str, list[int]]:
        length = self.values.shape[1]
        return {"distance": list(range(1 - length, length))}

    @property
    def head(self) -> str:
        made = "exact" if self.method == "exact" else f"{counted(self.num, 'probe')} a position"
        return f"derivatives of the stream behind layer {self.layer} by embeddings, {made}"


def position_jacobian(
    net: Functional,
    params: Params,
    inputs: Inputs,
    *,
    key: Key,
    layer: int = -1,
    method: Literal["exact", "probes"] = "exact",
    num: int = 8,
    chunk_size: int = 16,
) -> PositionJacobian:
    r"""On which positions a position depends: $S_{ij} = \|\partial h_i / \partial e_j\|_F$.

    h is the residual stream behind a layer, e the embeddings of tokens.

    "exact": from D products for each position. "probes": $\mathbb E\, \|J_{ij}^\top v\|^2 = \|J_{ij}\|_F^2$ for signs v,
    `num` of them for each position; with v scaled by $1 / \sqrt D$ it would be the root mean square over units, and no
    Frobenius norm. $S = \sqrt{\text{mean}}$, with the standard error of the mean square over $2 S$: a little low by that
    error's square; nan for a single probe. layer: -1 is the last. chunk_size: products that are made together.

    Raises ValueError for a family that is not described, for a layer that is not there, and for inputs without `input_ids` or
    (but for BERT) with `token_type_ids`.

    >>> import torch, funcscope as fs
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = fs.functional(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=4, n_head=2, vocab_size=9, n_positions=8)))
    >>> found = position_jacobian(net, net.params, {"input_ids": torch.tensor([[1, 2, 3]])}, key=fs.key(0))
    >>> found.values.shape, float(found.values[0, 0, 2])                  # nothing depends on what comes later
    (torch.Size([1, 3, 3]), 0.0)
    """
    check_choice("method", method, ("exact", "probes"))
    check_key(key)
    check_count("num", num)
    check_count("chunk_size", chunk_size)
    w = Weights(net, params, "embeddings")
    attributed_ids(w.body, inputs)
    if not -w.num_layers <= layer < w.num_layers:
        raise ValueError(f"`layer` must be one of 0 to {w.num_layers - 1}, or -1 for the last, got {layer}.")
    layer %= w.num_layers
    site = f"resid_post.{layer}"
    with torch.no_grad():
        seen = trace(net, params, inputs, ["tok_embed"])
    shift = torch.zeros_like(seen["tok_embed"])
    out, pull = vjp(lambda d: apply_with(net, params, inputs, {"tok_embed": lambda x: x + d}, [site])[1][site], shift)
    (_, length, size), exact = out.shape, method == "exact"
    eye = torch.eye(size, dtype=out.dtype, device=out.device)
    draws = [] if exact else [rademacher(fold_in(key, i), out[0]) for i in range(num)]
    rows = []
    for query in range(length):
        probes = eye if exact else torch.stack([each[query] for each in draws])
        squares = torch.cat([_squares(pull, out, query, part) for part in probes.split(chunk_size)])
        rows.append((squares.sum(0).sqrt(), torch.zeros_like(squares[0])) if exact else _root_mean(squares))
    values, errors = (torch.stack(each, 1) for each in zip(*rows, strict=True))
    there = seen.mask[:, :, None] & seen.mask[:, None]
    values, errors = (torch.where(there, x, math.nan).cpu() for x in (values, errors))
    return PositionJacobian(values, errors, method, 0 if exact else num, layer, length * (size if exact else num))


def _root_mean(squares: Float[Tensor, "m b t"]) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"]]:
    """With its error to first order: 0 where every square is 0."""
    value, num = squares.mean(0).sqrt(), len(squares)
    spread = squares.std(0) if num > 1 else torch.full_like(value, math.nan)
    return value, torch.where(value == 0, 0.0, spread / num**0.5 / (2 * value))


def _squares(pull: Callable[[Tensor], tuple[Tensor]], out: Tensor, query: int, probes: Float[Tensor, "m D"]) -> Tensor:
    """Squared norms (m, b, t) of what probes at one position pull back to every other."""
    place = (torch.arange(out.shape[1], device=out.device) == query).to(out)
    made = vmap(pull)(probes[:, None, None] * place[:, None].expand_as(out)[None])[0]
    return made.to(wide(out.device)).square().sum(-1)


def _pull(w: Weights, params: Params, inputs: Inputs, device: torch.device) -> tuple[Pull, torch.Size]:
    """From the last residual stream to those before every layer, position by position."""
    net, num = w.net, w.num_layers
    names = [f"rot_{x}" if w.rotates else x for x in "qk"]
    with torch.no_grad():
        seen = trace(net, params, inputs, [names[1], "v", "resid_pre.0"])
    last = f"resid_post.{num - 1}"

    def stream(*shifts: Tensor) -> Tensor:
        edits: dict[str, Edit] = {"resid_pre.0": lambda x: x + shifts[0]}
        for layer in range(num):
            fixed = seen[f"{names[1]}.{layer}"], seen[f"v.{layer}"]
            edits |= _own_position(layer, names, *fixed, seen.kernels[layer])
            if layer < num - 1:
                edits[f"resid_post.{layer}"] = lambda x, d=shifts[layer + 1]: x + d
        return apply_with(net, params, inputs, edits, [last])[1][last]

    zeros = torch.zeros_like(seen["resid_pre.0"]).to(device)
    out, pull = vjp(stream, *[zeros] * num)
    return pull, out.shape


def _own_position(layer: int, names: list[str], keys: Tensor, values: Tensor, kernel: Kernel) -> dict[str, Edit]:
    """Edits that hold keys and values fixed for every query but that of their own position. They change no value."""
    live: dict[str, Tensor] = {}

    def hold(name: str, instead: Tensor | None) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            live[name] = x
            return x if instead is None else instead

        return edit

    def own(key: Tensor) -> Float[Tensor, "b h t"]:
        query = live["q"]
        made = (query * _for_queries(key, query)).sum(-1) * kernel.scaling
        capped = made if kernel.softcap is None else kernel.softcap * torch.tanh(made / kernel.softcap)
        return capped.transpose(1, 2)

    def scores(x: Tensor) -> Tensor:
        return x + torch.diag_embed(own(live["k"]) - own(keys))

    def z(x: Tensor) -> Tensor:
        on_itself = live["pattern"].diagonal(dim1=-2, dim2=-1).transpose(1, 2)[..., None]
        return x + on_itself * _for_queries(live["v"] - values, x)

    edits: dict[str, Edit] = {f"{names[0]}.{layer}": hold("q", None), f"{names[1]}.{layer}": hold("k", keys)}
    edits |= {f"v.{layer}": hold("v", values), f"scores.{layer}": scores}
    return edits | {f"pattern.{layer}": hold("pattern", None), f"z.{layer}": z}


def _for_queries(x: Float[Tensor, "b t g d"], query: Float[Tensor, "b t h e"]) -> Float[Tensor, "b t h d"]:
    return x.repeat_interleave(query.shape[2] // x.shape[2], 2)


def _exact(pull: Pull, shape: torch.Size, weight: Tensor, chunk_size: int) -> Sums:
    """Rows i of the derivatives, from the unit vector i at every position."""
    eye, parts = torch.eye(shape[-1], device=weight.device), []
    for units in eye.split(chunk_size):
        made = _pulled(pull, units[:, None, None].expand(-1, *shape))
        each = torch.einsum("lmbtj,bt->lbmj", made, weight.to(made))
        parts.append(Sums(each.sum(1), _weighted(each, weight), each.square().sum((1, 2, 3))))
    total, weighted, square = zip(*parts, strict=True)
    return Sums(torch.cat(total, 1), torch.cat(weighted, 1), torch.stack(square).sum(0))


def _probed(pull: Pull, shape: torch.Size, weight: Tensor, keys: list[Key], num: int, chunk_size: int) -> Sums:
    """v (J'v)' with signs of their own at every position: a sequence and a layer at a time, as each is D x D."""
    like = torch.zeros(shape[1:], device=weight.device)
    signs = torch.stack([torch.stack([rademacher(fold_in(key, i), like) for key in keys]) for i in range(num)])
    made = torch.cat([_pulled(pull, each) for each in signs.split(chunk_size)], 1)
    layers = []
    for layer in made:
        rows = [(signs[:, i].to(made) * w.to(made)[:, None]).flatten(0, 1).T @ layer[:, i].flatten(0, 1) / num
                for i, w in enumerate(weight)]  # fmt: skip
        weighted = sum(w.sum() * row for w, row in zip(weight.to(made), rows, strict=True))
        layers.append(Sums(sum(rows), weighted, sum(row.square().sum() for row in rows)))  # type: ignore[arg-type]
    return Sums(*(torch.stack(each) for each in zip(*layers, strict=True)))


def _weighted(each: Float[Tensor, "L b m D"], weight: Float[Tensor, "b t"]) -> Float[Tensor, "L m D"]:
    return torch.einsum("lbmj,b->lmj", each, weight.sum(1).to(each))


def _pulled(pull: Pull, cotangents: Float[Tensor, "m b t D"]) -> Float[Tensor, "L m b t D"]:
    return torch.stack(vmap(pull)(cotangents)).to(wide(cotangents.device))
