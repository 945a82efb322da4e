"""Operators of parameters that are spread over the ranks of a process group: v and A v are shares on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_flat
from ..core.objective import Loss, Theta
from ..core.processes import STATE, Processes
from ..core.sharded_objective import ShardedLoss
from ..linalg.matvec import Matvec
from .rows import coupled, tolerance


def of_shares(
    operator: Callable[..., Matvec], loss: ShardedLoss, theta: Theta, ranks: Processes, **settings: Any
) -> Matvec:
    """`operator` of this rank's sequences at its rows of theta; every gathering and summing up is inside of the model."""
    name = operator.__name__
    if ranks is not loss.ranks:
        raise ValueError("`ranks` must be those that the functional was made with: `net.ranks`.")
    device, what = loss.net.device, f"a product with `{name}`"
    num = loss.layout.num

    def facts() -> dict[str, str]:
        _check_settings(settings)
        if isinstance(theta, Tensor):
            check_flat("theta", theta, num)
        return {"the settings": f"{name} {sorted((key, repr(value)) for key, value in settings.items())}"}

    ranks.check_same(facts)
    admitted = replace(loss, admitted=True)
    _check_apart(admitted, theta)
    if name == "hessian":
        settings["check"] = False
    if name == "fisher_mc":
        settings["first"] = loss.first
    made = operator(admitted, theta, **settings)

    def matvec(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        try:
            _check_vector(v, num)
        except Exception:
            ranks.check_trail(True, device, what)
            raise
        ranks.check_trail(False, device, what)
        with torch.no_grad():
            out = made(v)
        ranks.check_trail(False, device, what)
        return out

    return matvec


def bytes_per_product(num_gathered: int, itemsize: int, num_ranks: int, passes: int = 6, num_batches: int = 1) -> float:
    """Bytes that each rank sends (and receives) in one product: every parameter gathered, or a sum cut into its rows, again
    and again.

    (n - 1) / n (B k U s + 96): U entries are gathered by one forward pass (`net.num_gathered`: P, tied parameters once per
    use), of s bytes, for each of B batches per rank; a gathering and a sum that is cut move (n - 1) / n of it each. k:

    - 6 for `hessian` (3 gatherings and at most 3 sums: those whose input has no derivative are left out),
    - 9 with keep=False (6 and 3),
    - 5 for `ggn` and the Fishers (3 and 2), 6 with keep=False (5 and 1),
    - with `remat="layer"` at most 11, 16, 9 and 9 in their places.

    96 bytes say before and after whether all ranks have done the same. Beside that, an inner product of two vectors moves
    16 bytes. Sums are in float32 at least; gloo, which has no cut sum, moves its part twice.

    >>> bytes_per_product(1000, 4, 2)
    12048.0
    """
    return (num_ranks - 1) / num_ranks * (num_batches * passes * num_gathered * itemsize + 4 * STATE)


def _check_vector(v: Tensor, num: int) -> None:
    check_flat("v", v, num)
    if torch._C._functorch.is_functorch_wrapped_tensor(v) or (v.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            "`v` must be a plain vector: products over several ranks are neither mapped nor differentiated. Give one "
            "vector at a time, detached or under `torch.no_grad()`."
        )


def _check_apart(loss: ShardedLoss, theta: Theta) -> None:
    """The sequences of a batch that is cut have the losses that they have in the whole of it; once per loss."""
    if "apart" in loss._verdicts:
        return
    theta, off = Loss.vector(loss, theta), False
    for part, whole, at in loss.cuts:
        with torch.no_grad():
            alone, beside = (replace(loss, batches=(pair,)).terms(theta)[0] for pair in (part, whole))
        if at is not None:
            same = len(alone) == at.stop - at.start
            most = float((alone - beside[at]).abs().max()) if same else float("inf")
            off |= most > tolerance(loss) * float(beside.abs().max())

    def refuse() -> None:
        if off:
            raise ValueError(f"sequences of one rank have other losses without those of the next: {coupled()}")

    loss.ranks.together("comparing parts of batches", refuse)
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
