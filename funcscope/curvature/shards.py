"""One operator, or one Gram matrix, over data that several processes share: each has some of the sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.batches import UNSCORED, num_rows, parts_between
from ..core.checks import check_instance
from ..core.content import of_bits, of_tensors, of_tree
from ..core.objective import Loss, Theta, per_sequence
from ..core.processes import Processes, share_of
from ..core.sharded_objective import ShardedLoss
from ..linalg.matvec import Matvec
from .agreement import check_cuts, check_same_loss, check_vector
from .fisher import empirical_fisher, exact_fisher, fisher_mc
from .gram import Grams, gram
from .hessian import ggn, hessian
from .parameter_shards import of_shares

OPERATORS: dict[str, Callable[..., Matvec]] = {
    each.__name__: each for each in (hessian, ggn, exact_fisher, fisher_mc, empirical_fisher)
}
Part = tuple[Any, Any, slice | None]


@dataclass(frozen=True, eq=False)
class Shard:
    """The sequences that one rank has, and what they are of the whole."""

    ranks: Processes
    losses: list[Loss | None]
    """Of every rank; None where nothing of its data is scored."""
    weights: list[Float[Tensor, " n"]]
    """Per rank and sequence, in float64 on the CPU."""

    @property
    def loss(self) -> Loss | None:
        return self.losses[self.ranks.rank]

    @property
    def first(self) -> int:
        """The number of its first sequence."""
        return sum(map(len, self.weights[: self.ranks.rank]))

    @property
    def shares(self) -> list[float]:
        """Of every rank, of the weight of all data."""
        each = [float(weights.sum()) for weights in self.weights]
        return [one / sum(each) for one in each]

    @property
    def shares_of_sequences(self) -> list[float]:
        """The same of the sequences that have a scored position."""
        each = [int((weights != 0).sum()) for weights in self.weights]
        return [one / sum(each) for one in each]


def sharded(operator: Callable[..., Matvec], loss: Loss, theta: Theta, ranks: Processes, **settings: Any) -> Matvec:
    r"""`operator(loss, theta, **settings)` over the ranks: each differentiates its own sequences, one sum makes the product.

    $$A v = \sum_r \frac{W_r}{W} A_r v,$$

    W_r the weight of the positions that rank r has (for `empirical_fisher` of sequences, their number). operator: `hessian`,
    `ggn`, `exact_fisher`, `fisher_mc` (the labels that one rank would draw) or `empirical_fisher`. All ranks make the same
    `loss` of all data; rank r of n keeps the sequences from floor(r N / n) to floor((r + 1) N / n): any number of sequences
    over any number of ranks. Parameters are whole on every rank; or, with a loss of `sharded_objective`, spread over them:
    theta, v and the product are then this rank's shares, and `hessian` is not checked by differences of the loss.

    All ranks ask for the same products in the same order, as algorithms with the same key do: the sum has the same bits on
    all of them. It is in the dtype of v, in float32 at least. Beside one rank's product sums over sequences are in another
    order: equal to rounding, 1e-12 in float64 and 1e-6 in float32, not in bits.

    Bytes: `core.processes.bytes_per_product`, 2 (n - 1) / n (P s + 24) from and to each rank, s bytes an entry, and nothing
    that grows with the data; `ranks.moved` adds them up. Time: the slowest rank's share of the sequences, and the sum.

    Raises ValueError on all ranks where theta, frozen parameters, buffers, the data (numbers and names among inputs, too),
    their order or the settings differ, before any work; where the loss of the first scored sequence at theta differs by more
    than rounding, as it does for other functions of one name; where sequences of a batch that is cut see each other; where a
    bit of v differs. RuntimeError on all others where one rank fails or ends. What all ranks refuse leaves them as they were.
    Products are constants to autograd, and of one vector: no `vmap`.

    >>> import torch.distributed as dist, funcscope as fs
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> net, square = fs.functional(torch.nn.Linear(2, 1, bias=False)), fs.custom(lambda out, y: (out - y) ** 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], square)
    >>> sharded(fs.hessian, loss, net.theta, fs.processes())(torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    >>> dist.destroy_process_group()
    """
    name = getattr(operator, "__name__", repr(operator))
    if OPERATORS.get(name) is not operator:
        raise ValueError(f"`operator` must be one of {', '.join(OPERATORS)}, got {name}: others take one rank.")
    if isinstance(loss, ShardedLoss):
        return of_shares(operator, loss, theta, ranks, **settings)
    shard = shard_of(loss, theta, ranks, operator=name, **settings)
    theta = Loss.vector(loss, theta)
    by_sequences = name == "empirical_fisher" and settings.get("unit", "sequence") == "sequence"
    share = (shard.shares_of_sequences if by_sequences else shard.shares)[ranks.rank]
    if name == "fisher_mc":
        settings["first"] = shard.first
    made: list[Matvec] = []

    def make() -> None:
        if shard.loss is not None:
            made.append(operator(shard.loss, theta, **settings))

    ranks.together(f"making `{name}`", make)
    return _summed(ranks, made, share, theta, f"a product with `{name}`")


def _summed(ranks: Processes, made: list[Matvec], share: float, theta: Tensor, what: str) -> Matvec:
    """v -> the sum over ranks of their share of it."""

    def matvec(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        with ranks.step(what):
            check_vector(v, len(theta))
            wide = torch.promote_types(v.dtype, torch.float32)
            with torch.no_grad():
                own = made[0](v).to(wide) * share if made else torch.zeros_like(v, dtype=wide)
            ranks.note(of_bits(v))
        return ranks.sum(own, what).to(v.dtype)

    return matvec


def sharded_gram(
    loss: Loss, theta: Theta, ranks: Processes, *, by: str = "layer", unit: str = "sequence", chunk_size: int = 64
) -> Grams:
    r"""`gram(loss, theta)` over the ranks, whole on every rank: each takes its own sequences against half of the others'.

    Rank r makes the blocks $K_{rs}$ for s = r and the next n / 2 ranks around. No gradient is sent: the sequences of the
    other ranks go through the model here, too, so that passes over the data are some n / 2 + 1 of its share instead of 1
    (half of all data for many ranks) and contractions $1 / n$ of all. Bytes from each rank: its blocks, some
    8 B N^2 / (2 n) for B blocks of parameters and N sequences, to n - 1 others.

    Arguments as of `gram`, with names of partitions only. Raises as `sharded` and `gram` do.

    >>> import torch.distributed as dist, funcscope as fs
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = fs.custom(lambda out, y: (out - y)[:, 0] ** 2 / 2)
    >>> loss = fs.objective(net, [(torch.eye(2), torch.zeros(2, 1))], half_square)
    >>> sharded_gram(loss, torch.tensor([3.0, 4.0]), fs.processes(), by="none").total.diagonal().tolist()
    [9.0, 16.0]
    >>> dist.destroy_process_group()
    """
    if not isinstance(by, str):
        raise ValueError(f"`by` must be the name of a partition where ranks share the data, got a {type(by).__name__}.")
    options: dict[str, Any] = {"by": by, "unit": unit, "chunk_size": chunk_size}
    shard = shard_of(loss, theta, ranks, operator="gram", **options)

    def make(step: int) -> Grams | None:
        one, two = shard.loss, shard.losses[(ranks.rank + step) % ranks.num]
        if one is None or two is None or (2 * step == ranks.num and ranks.rank >= step):
            return None
        return gram(one, theta, other=None if step == 0 else two, **options)

    steps = [ranks.together("a block of the Gram", lambda step=step: make(step)) for step in range(ranks.num // 2 + 1)]
    blocks = {(r, (r + step) % ranks.num): block for step, row in enumerate(steps) for r, block in enumerate(row)}
    return _assembled({at: block for at, block in blocks.items() if block is not None}, shard, unit)


def _assembled(blocks: dict[tuple[int, int], Grams], shard: Shard, unit: str) -> Grams:
    """One Gram of its blocks by pairs of ranks; gradients of a rank without a scored position are 0."""
    unscored = [len(weights) if unit == "sequence" else 0 for weights in shard.weights]
    sizes = [blocks[r, r].values.shape[1] if (r, r) in blocks else num for r, num in enumerate(unscored)]
    places = [slice(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(len(sizes))]
    like = next(iter(blocks.values()))
    values = like.values.new_zeros(len(like.blocks), sum(sizes), sum(sizes))
    for (r, s), block in blocks.items():
        values[:, places[r], places[s]] = block.values.to(values)
        values[:, places[s], places[r]] = block.values.to(values).mT
    passes, by_rows = sum(each.num_passes for each in blocks.values()), {n for b in blocks.values() for n in b.by_rows}
    return Grams(values, like.unit, passes, sorted(by_rows), like.blocks)


def shard_of(loss: Loss, theta: Theta, ranks: Processes, **settings: Any) -> Shard:
    """This rank's part of the data, once all ranks are known to have the same of everything; raises as `sharded` does."""
    check_instance("ranks", ranks, Processes, "`fs.processes()`")
    ranks.check_same(lambda: _facts(loss, Loss.vector(loss, theta), settings))
    check_same_loss(loss, theta, loss.batches, ranks)
    every = _all_parts(loss, ranks)
    losses = [_kept(loss, parts) for parts in every]

    def weigh() -> Tensor:
        mine = losses[ranks.rank]
        check_cuts(loss, theta, (cut for cut in every[ranks.rank] if cut[2] is not None))
        return torch.zeros(0, dtype=torch.float64) if mine is None else _weights(mine, theta)

    weights = ranks.together("weighing the data", weigh)
    if not float(sum(each.sum() for each in weights)):
        raise ValueError(UNSCORED)
    if any(bool(each.any()) and not float(each.sum()) for each in weights):
        raise ValueError("the weights of one rank's data add up to 0, and are not all 0: use another number of ranks.")
    return Shard(ranks, [one if bool(w.any()) else None for one, w in zip(losses, weights, strict=True)], weights)


def _facts(loss: Loss, theta: Tensor, settings: dict[str, Any]) -> dict[str, str]:
    """What must be the same on every rank, and its sum."""
    net = loss.net
    return {
        "theta": of_tensors([theta]),
        "the names and shapes of parameters": str(loss.layout.shapes),
        "frozen parameters": of_tensors(net.frozen[name] for name in sorted(net.frozen)),
        "buffers": of_tensors(net.buffers[name] for name in sorted(net.buffers)),
        "the data or their order": of_tree(loss.batches),
        "the criterion": loss.criterion.name,
        "the settings": str(sorted((name, repr(value)) for name, value in settings.items())),
    }


def _all_parts(loss: Loss, ranks: Processes) -> list[list[Part]]:
    """What each rank has."""
    num = sum(num_rows(pair) for pair in loss.batches)
    return [parts_between(loss.batches, *share_of(num, rank, ranks.num)) for rank in range(ranks.num)]


def _kept(loss: Loss, parts: list[Part]) -> Loss | None:
    return replace(loss, batches=tuple(part for part, *_ in parts), _verdicts=set(loss._verdicts)) if parts else None


def _weights(loss: Loss, theta: Theta) -> Tensor:
    """Per sequence; by a forward pass for criteria whose targets do not say."""
    with torch.no_grad():
        if loss.criterion.positionwise:
            weights = torch.cat([per_sequence(targets.weight) for _, targets in loss.batches])
        else:
            weights = loss.terms(theta)[1]
    return weights.double().cpu()
