"""Sums over batches of J' M J: the shape of every operator here, with the graph of J kept or built for each product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp, vjp

from ..core.checks import check_flat
from ..core.objective import Loss, Theta
from ..linalg.matvec import Matvec
from .outputs import Outputs, Outs

AtOutputs = Callable[[Outputs, Outs, Outs], Outs]
"""(batch, outputs, tangent) -> cotangent: a symmetric linear map of the tangent."""


def flat(loss: Loss, theta: Theta) -> Float[Tensor, " p"]:
    """Theta as one vector, in float32 at least: a constant to whoever differentiates later."""
    if isinstance(theta, Tensor):
        check_flat("theta", theta, loss.layout.num)
        return theta.detach()
    return loss.layout.ravel(theta, torch.promote_types(loss.layout.dtype, torch.float32)).detach()


def sandwich(
    loss: Loss, theta: Float[Tensor, " p"], batches: list[Outputs], middle: AtOutputs, scale: float, keep: bool
) -> Matvec:
    """v -> scale * sum over batches of J' middle(J v), J the Jacobian of a batch's outputs at theta."""
    maps = [(_kept if keep else _rebuilt)(loss, theta, batch, middle) for batch in batches]

    def matvec(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        check_flat("v", v, len(theta))
        return summed(maps, v, scale)

    return matvec


def summed(maps: list[Matvec], v: Tensor, scale: float) -> Tensor:
    """The sum of what the maps make of one vector, times the scale."""
    v = v if scale == 1 else v * scale
    out = maps[0](v)
    for other in maps[1:]:
        out = out + other(v)
    return out


def _kept(loss: Loss, theta: Tensor, batch: Outputs, middle: AtOutputs) -> Matvec:
    """J' u is the pullback; J v is the pullback of u -> J' u, which is linear: both graphs are made once."""
    with torch.enable_grad():
        outs, pull = vjp(lambda t: batch.of(loss.params(t)), theta)
        _, push = vjp(lambda *u: pull(u)[0], *(torch.zeros_like(out) for out in outs))
    return lambda v: pull(middle(batch, outs, push(v)))[0]


def _rebuilt(loss: Loss, theta: Tensor, batch: Outputs, middle: AtOutputs) -> Matvec:
    def matvec(v: Tensor) -> Tensor:
        def of(t: Tensor) -> Outs:
            return batch.of(loss.params(t))

        with torch.enable_grad():  # the graph of the pullback, whatever the caller's mode
            outs, pull = vjp(of, theta)
            _, moved = jvp(of, (theta,), (v,))
        return pull(middle(batch, outs, moved))[0]

    return matvec


@contextmanager
def named_if_missing(loss: Loss, needs: str, remedy: str) -> Iterator[None]:
    """A derivative that torch does not have becomes an error that says what to do."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as err:
        reason = str(err).splitlines()[0]
        if "derivative" not in reason and "forward AD" not in reason:
            raise
        raise ValueError(
            f"{needs}, and torch has none for a kernel of this model ({reason[:150]}): {loss!r} was made with "
            f"attention={loss.net.attention!r}. {remedy}"
        ) from err
