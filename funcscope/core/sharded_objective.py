"""The loss of a model whose parameters are on several ranks: each rank has some of the sequences, and all make one mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .batches import Filled, Prepared, num_rows, parts_between, prepared, with_finite_targets
from .checks import check_instance
from .content import of_tree
from .criterion import Criterion
from .model import Functional, Inputs
from .objective import Loss
from .processes import Processes, share_of
from .purity import check_function
from .sharded_model import ShardedFunctional
from .shares import Total

ONE_RANK = (
    "this loss is one of parameters on several ranks, which only its operators take: `fs.sharded(operator, loss, theta, "
    "ranks)` with `hessian`, `ggn` or a Fisher, and `hutchinson_trace`, `eigenpairs` and `spectral_density` of those. For "
    "other metrics make the functional by `fs.functional`, with whole parameters."
)


@dataclass(frozen=True, eq=False, repr=False)
class ShardedLoss(Loss):
    """`loss(theta)` of this rank's rows: the mean over the sequences of all ranks. Made by `sharded_objective`.

    Called by all ranks together; `grad(loss)(net.theta)` is this rank's share of the gradient, and so on at every order.
    """

    first: int = 0
    """The number of this rank's first sequence."""
    cuts: tuple[tuple[Any, Any, slice | None], ...] = ()
    """(part, its whole batch, rows of it) where a batch is cut; on every rank as many, with others that are not."""
    common: Prepared = ()
    """All data, the same on every rank."""
    admitted: bool = False
    """For an operator that knows of ranks."""

    @property
    def ranks(self) -> Processes:
        assert isinstance(self.net, ShardedFunctional)
        return self.net.ranks

    def check_function(self) -> None:
        """Raises for algorithms that would take this rank's share for the whole; else as for one rank."""
        if not self.admitted:
            raise ValueError(ONE_RANK)
        if "function" not in self._verdicts:
            check_function(self)
            self._verdicts.add("function")

    def over_ranks(self, x: float) -> float:
        return float(self.net.shares.summed(torch.tensor(x, dtype=torch.float64)))  # type: ignore[attr-defined]

    def _mean(self, outputs: Callable[[Inputs], Tensor]) -> Tensor:
        parts = [self.scored(outputs, *batch) for batch in self.batches]
        total, weight = (torch.stack([one.sum() for one in each]).sum() for each in zip(*parts, strict=True))
        return Total.apply(total, self.ranks) / Total.apply(weight.detach(), self.ranks)


def sharded_objective(net: Functional, batches: Iterable[Any], criterion: Criterion) -> ShardedLoss:
    """`objective(net, batches, criterion)` for parameters on several ranks: the same value on all of them.

    All ranks pass the same batches; rank r of n keeps the sequences from floor(r N / n) to floor((r + 1) N / n). Every rank
    runs the model as often as all others do, since each forward pass gathers parameters of all: one with fewer batches runs
    a sequence of weight 0.

    `loss(theta)` takes this rank's share of theta, is called by all ranks together, and composes with `grad`, `jvp` and
    `vjp`. For operators: `sharded`.

    Raises ValueError on all ranks as `objective` does, and where data, their order or the criterion's name differ between
    ranks; whether its function does is seen by the first operator.

    >>> import torch.distributed as dist, funcscope as fs
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> net = fs.sharded_functional(torch.nn.Linear(3, 2), fs.processes())
    >>> loss = sharded_objective(net, [(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))], fs.classification)
    >>> round(float(loss(0 * net.theta)), 4)      # ln 2
    0.6931
    >>> dist.destroy_process_group()
    """
    if not isinstance(net, ShardedFunctional):
        raise ValueError(f"`net` must be what `sharded_functional` returns, got a {type(net).__name__}.")
    check_instance("criterion", criterion, Criterion, "`fs.classification`, or `fs.custom(function)`")
    made: list[tuple[Prepared, Criterion]] = []

    def make() -> None:
        pairs = prepared(net, batches, criterion)
        made.append((pairs, with_finite_targets(criterion, pairs)))

    net.ranks.together("making the objective", make)
    ((pairs, finite),) = made
    net.ranks.check_same(lambda: {"the data or their order": of_tree(pairs), "the criterion": criterion.name})
    return _own_part(net, pairs, finite)


def _own_part(net: ShardedFunctional, pairs: Prepared, criterion: Criterion) -> ShardedLoss:
    """This rank's sequences, in as many batches as all others have, and as many batches that are cut."""
    num, ranks = sum(num_rows(pair) for pair in pairs), net.ranks
    every = [parts_between(pairs, *share_of(num, r, ranks.num)) for r in range(ranks.num)]
    cuts = [[cut for cut in parts if cut[2] is not None] for parts in every]
    own, one = [part for part, *_ in every[ranks.rank]], parts_between(pairs, 0, 1)[0][0]
    idle, uneven = max(map(len, every)) - len(own), len(set(map(len, every))) > 1
    mine = cuts[ranks.rank] + [(one, one, None)] * (max(map(len, cuts)) - len(cuts[ranks.rank]))
    if uneven and not criterion.positionwise:
        pairs = tuple((x, (1.0, y)) for x, y in pairs)
        mine = [((x, (1.0, y)), (whole[0], (1.0, whole[1])), at) for (x, y), whole, at in mine]
    if uneven:
        own, criterion = _with_idle(own, [one] * idle, criterion)
    first = share_of(num, ranks.rank, ranks.num)[0]
    return ShardedLoss(net, tuple(own), criterion, first=first, cuts=tuple(mine), common=pairs)


def _with_idle(own: list[Any], idle: list[Any], criterion: Criterion) -> tuple[list[Any], Criterion]:
    """The batches, and others that weigh nothing, in a criterion that knows it."""
    if criterion.positionwise:
        return own + [(x, y._replace(weight=torch.zeros_like(y.weight))) for x, y in idle], criterion
    return [(x, (1.0, y)) for x, y in own] + [(x, (0.0, y)) for x, y in idle], _weighed(criterion)


def _weighed(criterion: Criterion) -> Criterion:
    """The same for targets beside a factor of their weights; missing targets are filled by the outermost."""
    if isinstance(filled := criterion.token_loss, Filled):
        weighed = _weighed(replace(criterion, token_loss=filled.token_loss))
        return replace(weighed, token_loss=Filled(weighed.token_loss))
    hessian, sample = criterion.output_hessian, criterion.sample

    def token_loss(out: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
        loss, weight = criterion.token_loss(out, targets[1])
        return loss, weight * targets[0]

    return replace(
        criterion,
        token_loss=token_loss,
        output_hessian=hessian and (lambda out, targets, v: hessian(out, targets[1], v) * targets[0]),
        sample=sample and (lambda out, targets, key: (targets[0], sample(out, targets[1], key))),
    )
