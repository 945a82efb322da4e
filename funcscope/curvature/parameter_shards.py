"""Operators of parameters that are spread over the ranks of a process group: v and A v are shares on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_flat
from ..core.objective import Theta, check_shapes
from ..core.processes import STATE, Processes
from ..core.sharded_objective import ShardedLoss
from ..linalg.matvec import Matvec
from .agreement import check_cuts, check_same_loss, check_vector


def of_shares(
    operator: Callable[..., Matvec], loss: ShardedLoss, theta: Theta, ranks: Processes, **settings: Any
) -> Matvec:
    """`operator` of this rank's sequences at its rows of theta; every gathering and summing up is inside of the model."""
    name = operator.__name__
    if ranks is not loss.ranks:
        raise ValueError("`ranks` must be those that the functional was made with: `net.ranks`.")
    what = f"a product with `{name}`"
    num = loss.layout.num

    def facts() -> dict[str, str]:
        _check_settings(settings)
        if isinstance(theta, Tensor):
            check_flat("theta", theta, num)
        return {"the settings": f"{name} {sorted((key, repr(value)) for key, value in settings.items())}"}

    ranks.check_same(facts)
    admitted = replace(loss, admitted=True)
    _check_values(admitted, theta)
    if name == "hessian":
        settings["check"] = False
    if name == "fisher_mc":
        settings["first"] = loss.first
    made: list[Matvec] = []
    ranks.together(f"making `{name}`", lambda: made.append(operator(admitted, theta, **settings)))

    def matvec(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        with ranks.step(what):
            check_vector(v, num)
            with torch.no_grad():
                out = made[0](v)
        ranks.check(what)
        return out

    matvec.space = loss.net.shares  # type: ignore[attr-defined]
    return matvec


def bytes_per_product(
    num_gathered: int, num_uses: int, itemsize: int, num_ranks: int, passes: int = 6, num_batches: int = 1
) -> float:
    """Bytes that each rank sends (and receives) in one product: every parameter gathered, or a sum cut into its rows, again
    and again.

    (n - 1) / n (B k (U s + 48 m) + 48): U entries are gathered by one forward pass (`net.num_gathered`: P, tied parameters
    once per use), of s bytes, in m gatherings (`net.num_uses`), for each of B batches per rank; a gathering and a sum that is
    cut move (n - 1) / n of it each. k:

    - 6 for `hessian` (3 gatherings and at most 3 sums: those whose input has no derivative are left out),
    - 9 with keep=False (6 and 3),
    - 5 for `ggn` and the Fishers (3 and 2), 6 with keep=False (5 and 1),
    - with `remat="layer"` at most 11, 16, 9 and 9 in their places.

    48 bytes say before each of them, and at the end, whether all ranks are there and have done the same. Beside that, an
    inner product of two vectors moves 64 bytes. Sums are in float32 at least; gloo, which has no cut sum, moves its part
    twice.

    >>> bytes_per_product(1000, 2, 4, 2)
    12312.0
    """
    return (
        (num_ranks - 1)
        / num_ranks
        * (num_batches * passes * (num_gathered * itemsize + 2 * STATE * num_uses) + 2 * STATE)
    )


def _check_values(loss: ShardedLoss, theta: Theta) -> None:
    """Once per loss."""
    if "apart" not in loss._verdicts:
        loss.ranks.together("checking the loss", lambda: check_shapes(loss, theta))
        check_same_loss(loss, theta, loss.common, loss.ranks)
        loss.ranks.together("comparing parts of batches", lambda: check_cuts(loss, theta, loss.cuts))
        loss._verdicts.add("apart")


def _check_settings(settings: dict[str, Any]) -> None:
    if settings.get("check"):
        raise ValueError(
            "`check=True` compares a product with the loss of one rank: take it with whole parameters, `fs.hessian` of a "
            "smaller model of the same kind."
        )
    if settings.get("head_chunk") is not None:
        raise ValueError(
            "`head_chunk` needs the whole weight of the head beside its logits: leave it out, or take smaller batches."
        )
