"""Directional losses over data that several processes share."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_options
from ..core.keys import Key
from ..core.objective import Loss, Theta
from ..core.processes import Processes
from ..curvature.shards import shard_of
from .directional import Sampling, directional_losses, prepare, settings_of
from .directional_result import DirectionalLosses, amounting
from .precision import is_half
from .residuals import in_groups

BLOCK = 8
"""Directions between two exchanges."""
_OF = {
    "residuals_losses": "losses",
    "residuals_losses_negative": "losses_negative",
    "residuals_curvatures": "curvatures",
}
"""Columns of residuals, and of what."""


def sharded_directional_losses(
    loss: Loss, theta: Theta, ranks: Processes, *, key: Key, **settings: Any
) -> DirectionalLosses:
    r"""`directional_losses(loss, theta, key=key, **settings)` over the ranks, whole on every rank.

    $$L_d = \sum_r \frac{W_r}{W} L_{rd}, \qquad \text{sequence } s \text{ of rank } r \text{ adds }
      \frac{W_r}{W} \rho_{ds} + (L_{rd} - L_d) \frac{w_s}{W},$$

    with $L_{rd}$ the mean over rank r's sequences, of weights $w_s$ that add up to $W_r$, and $\rho_{ds}$ what s adds to it
    there; the same for slopes, curvatures and the loss at theta. Directions are drawn on every rank from the key. All
    ranks make the same `loss` of all data, and keep their share of it, as for `sharded`.

    Samples, statistics and their errors are those of one rank to rounding. `plan` and the numbers of passes are those of the
    first rank that has data. Bytes from each rank: 8 N / n numbers per direction and side, to n - 1 others, eight directions
    at a time. Where there are so many sequences that they are summed in groups, groups are made within ranks.

    Raises as `sharded` and `directional_losses` do; ValueError for curvatures by difference in half precision, where rounding
    would have to be measured on all data: `functional(model, dtype=torch.float32)`.

    >>> import torch.distributed as dist, funcscope as fs
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> net = fs.functional(torch.nn.Linear(2, 1, bias=False).double())
    >>> half_square, x = fs.custom(lambda out, y: (out - y) ** 2 / 2), torch.eye(2, dtype=torch.float64)
    >>> loss = fs.objective(net, [(x * 2**0.5, 0 * x[:, :1])], half_square)                          # L = |theta|^2 / 2
    >>> result = sharded_directional_losses(loss, x[0] * 5, fs.processes(), key=fs.key(0), n_samples=4)
    >>> round(result.baseline_loss, 6), len(result.losses)
    (12.5, 4)
    >>> dist.destroy_process_group()
    """
    check_options("sharded_directional_losses", directional_losses, settings)
    asked = settings_of({**_defaults(), **settings, "key": key})
    shard = shard_of(loss, theta, ranks, operator="directional losses", key=key, **settings)
    if asked.curvature == "difference" and is_half(loss.layout):
        raise ValueError(
            'curvatures by difference over several ranks need full precision: pass `curvature="exact"`, or make the net '
            "with `functional(model, dtype=torch.float32)`."
        )
    mine: list[Sampling] = []

    def begin() -> Begun | None:
        if shard.loss is None:
            return None
        mine.append(prepare(shard.loss, theta, asked))
        return _begun(mine[0], shard.weights[ranks.rank])

    begun = [one for one in ranks.together("the loss at theta", begin) if one is not None]
    shares = [share for share in shard.shares if share]
    size = asked.chunk or BLOCK
    blocks = _blocks(mine[0], size) if mine else repeat(None)
    columns = []
    for _ in range(0, asked.num, size):
        each = ranks.together("directional losses", lambda: next(blocks))
        columns.append(_combined(shares, [row for row in each if row is not None], begun))
    return _whole(shares, columns, begun)


class Begun(NamedTuple):
    """What a rank knows before the first direction."""

    centre: Tensor
    weights: Tensor
    """Of the groups of sequences whose residuals are summed, as shares of the rank's."""
    scored: int
    refined: int
    settings: dict[str, Any]


def _begun(sampling: Sampling, weights: Tensor) -> Begun:
    request = sampling.request
    grouped = in_groups((weights / weights.sum())[request.scored.cpu()], request.groups)
    return Begun(sampling.centre, grouped, len(request.scored), request.refined, sampling.settings)


def _blocks(sampling: Sampling, size: int) -> Iterator[dict[str, Tensor]]:
    """Columns of so many directions at a time, whatever the rank's own chunks."""
    held: list[dict[str, Tensor]] = []
    for row in sampling.rows():
        held.append(row)
        if sum(len(each["losses"]) for each in held) >= size:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _combined(shares: list[float], rows: list[dict[str, Tensor]], begun: list[Begun]) -> dict[str, Tensor]:
    """Columns of all data from those of the ranks."""
    names = [name for name in rows[0] if name not in _OF]
    whole = {name: sum(share * row[name] for share, row in zip(shares, rows, strict=True)) for name in names}
    parts = list(zip(shares, rows, begun, strict=True))
    for name in rows[0].keys() & _OF.keys():
        of = _OF[name]
        whole[name] = torch.cat(
            [_beside(share, row[name], row[of] - whole[of], one.weights) for share, row, one in parts], dim=1
        )
    return whole  # type: ignore[return-value]


def _beside(share: float, own: Tensor, off: Tensor, weights: Tensor) -> Tensor:
    """Residuals of a rank's sequences beside the mean of all, from those beside their own, which is `off` from it."""
    return share * (own + off[..., None] * weights)


def _whole(shares: list[float], columns: list[dict[str, Tensor]], begun: list[Begun]) -> DirectionalLosses:
    own = [one.settings["baseline_loss"] for one in begun]
    baseline = sum(share * value for share, value in zip(shares, own, strict=True))
    centre = [
        _beside(share, one.centre, torch.tensor(value - baseline, dtype=torch.float64), one.weights)
        for share, one, value in zip(shares, begun, own, strict=True)
    ]
    settings = begun[0].settings | {"baseline_loss": baseline}
    return amounting(_joined(columns), torch.cat(centre), begun[0].refined, sum(one.scored for one in begun), settings)


def _defaults() -> dict[str, Any]:
    arguments = signature(directional_losses).parameters.items()
    return {name: each.default for name, each in arguments if each.default is not each.empty}
