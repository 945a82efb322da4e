"""Stochastic gradient Langevin dynamics: chains that sample weights around a point, with the loss where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..core.apart import check_apart
from ..core.batches import Prepared, rows
from ..core.estimate import wide
from ..core.keys import BLOCK, Key, drawn_on, fill, fold_in, normal, uniform
from ..core.objective import Loss

Evaluated = tuple[Float[Tensor, "c p"], Float[Tensor, " c"]]


class Chains(NamedTuple):
    """What is kept of chains that start at w*: losses at every step, none of the weights."""

    excess: Float[Tensor, "c t"]
    """L(w_t) - L(w*), of the data of that step; float64 on the CPU."""
    square_distance: Float[Tensor, "c t"]
    """||w_t - w*||^2."""
    pull: Float[Tensor, "c t"]
    """s g D, with the drift D = s g + gamma (w_t - w*): what the size of the steps adds to the losses is measured by it."""


def langevin_chains(
    loss: Loss,
    theta: Float[Tensor, " p"],
    *,
    key: Key,
    num_chains: int,
    num_steps: int,
    step_size: float,
    strength: float,
    localization: float,
    batch_size: int | None = None,
    chunk_size: int = 4,
) -> Chains:
    r"""Chains from w*, whose stationary distribution is $\exp(-s L(w) - \gamma/2\, \|w - w^*\|^2)$ for small steps.

    $$w_{t+1} = w_t - \tfrac{\varepsilon}{2} \big(s\, g(w_t) + \gamma (w_t - w^*)\big) + \sqrt\varepsilon\, \xi_t,$$

    s the `strength` (n beta), g the gradient of the loss, or of an unbiased estimate of it: of `batch_size` sequences,
    drawn at every step for every chain without replacement, their terms times the number of sequences over the batch's, so
    that tokens have the weight that they have in the loss. The excess of a minibatch is over what the same sequences have
    at w*: unbiased, and of less variance than over the loss. Noise is a function of key, chain and step.

    Sequences of batches that differ in shape are not drawn together: one shape is drawn by its number of sequences, and
    a minibatch is of that shape (and as large at most as all of these).

    chunk_size: chains whose gradients of the whole loss are made together by `vmap`, where the model takes it.
    """
    source = _whole(loss, theta, chunk_size) if batch_size is None else _parts(loss, theta, key, batch_size)
    noises = [fold_in(fold_in(key, "noise"), chain) for chain in range(num_chains)]
    moved = theta.new_zeros(num_chains, len(theta))
    excess, distance, pull = [], [], []
    for step in range(num_steps):
        gradients, values = source(moved, step)
        excess.append(values.cpu().double())
        distance.append(torch.linalg.vector_norm(moved, dim=1).cpu().double().square())
        noise = torch.stack([_normal(fold_in(each, step), theta) for each in noises])
        drift = strength * gradients + localization * moved
        pull.append(strength * (gradients * drift).sum(1, dtype=wide(drift.device)).cpu().double())
        moved = moved - step_size / 2 * drift + step_size**0.5 * noise
    return Chains(*(torch.stack(each, 1) for each in (excess, distance, pull)))


def _normal(key: Key, like: Tensor) -> Tensor:
    """`normal`; what is short is drawn here, as handing it to worker threads would take longer."""
    if like.numel() > BLOCK or drawn_on(key, like.device).type != "cpu":
        return normal(key, like)
    out = torch.empty(like.numel())
    fill(key, out, "normal")
    return out.to(like)


def _whole(loss: Loss, theta: Tensor, chunk_size: int) -> Callable[[Tensor, int], Evaluated]:
    """Gradients and excess of the loss itself."""
    evaluate = grad_and_value(loss)
    mapped = vmap(evaluate, chunk_size=chunk_size) if loss.is_mapped() else None
    with torch.no_grad():
        start = loss(theta).detach()

    def at(moved: Tensor, _: int) -> Evaluated:
        if mapped is not None:
            gradients, values = mapped(theta + moved)
        else:
            gradients, values = (torch.stack(each) for each in zip(*map(evaluate, theta + moved), strict=True))
        return gradients.detach(), values.detach() - start

    return at


def _parts(loss: Loss, theta: Tensor, key: Key, size: int) -> Callable[[Tensor, int], Evaluated]:
    """Gradients and excess of minibatches, each chain's its own."""
    check_apart(loss, 1)  # batches of one shape are joined, too
    pools, root = _pooled(loss.batches), fold_in(key, "batch")
    with torch.no_grad():
        before = [replace(loss, batches=(pool,)).terms(theta) for pool in pools]
    total = torch.stack([weights.sum() for _, weights in before]).sum()
    ends = torch.tensor([len(sums) for sums, _ in before], dtype=torch.float64).cumsum(0)

    def one(w: Tensor, draw: Key) -> tuple[Tensor, Tensor]:
        which = uniform(fold_in(draw, "pool"), ends[:1]) * ends[-1]
        index = int((which >= ends).sum())
        sums = before[index][0]
        order = uniform(fold_in(draw, "order"), torch.empty(len(sums), dtype=torch.float64)).argsort()
        chosen = order[:size].to(sums.device)
        part = replace(loss, batches=(_taken(pools[index], chosen, len(sums)),))
        scale = float(ends[-1]) / len(chosen) / total
        gradient, value = grad_and_value(lambda w: part.terms(w)[0].sum() * scale)(w)
        return gradient.detach(), value.detach() - sums[chosen].sum() * scale

    def at(moved: Tensor, step: int) -> Evaluated:
        made = [one(theta + each, fold_in(fold_in(root, chain), step)) for chain, each in enumerate(moved)]
        gradients, values = zip(*made, strict=True)
        return torch.stack(gradients), torch.stack(values)

    return at


def _pooled(batches: Prepared) -> list[Any]:
    """Batches of one shape joined along their sequences; those that hold what has no row per sequence stay apart."""
    groups: dict[Any, list[Any]] = {}
    for i, pair in enumerate(batches):
        leaves, tree = tree_flatten(pair)
        num = rows(pair)
        even = all(isinstance(x, Tensor) and x.ndim and len(x) == num for x in leaves)
        shape = (str(tree), tuple((tuple(x.shape[1:]), x.dtype) for x in leaves)) if even else i
        groups.setdefault(shape, []).append(pair)
    return [_joined(each) for each in groups.values()]


def _joined(pairs: list[Any]) -> Any:
    columns = zip(*map(tree_leaves, pairs), strict=True)
    return pairs[0] if len(pairs) == 1 else tree_unflatten(_cat(columns), tree_flatten(pairs[0])[1])


def _cat(columns: Iterable[tuple[Tensor, ...]]) -> list[Tensor]:
    return [torch.cat(column) for column in columns]


def _taken(pair: Any, chosen: Tensor, num: int) -> Any:
    """The chosen sequences; what has no row per sequence is every one's."""
    return tree_map(lambda x: x[chosen] if isinstance(x, Tensor) and x.ndim and len(x) == num else x, pair)
