"""Sums over batches of J' M J: the shape of every operator here, with the graph of J kept or built for each product."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp, vjp

from ..core.checks import check_flat
from ..core.objective import Loss
from ..core.progress import tick
from ..linalg.matvec import Matvec
from .outputs import Outputs, Outs

ONE_AT_A_TIME = threading.RLock()
"""For products that run the model: its skeleton holds one set of values, and torch has one level of forward mode."""
_MISSING = ("is not implemented", "not implemented for", "does not support it", "Trying to use forward AD with")

AtOutputs = Callable[[Outs, Outs], Outs]
"""(outputs, tangent) -> cotangent: a symmetric linear map of the tangent."""


def unchanged(loss: Loss, theta: Tensor) -> Callable[[], None]:
    """A check that raises once theta, a frozen parameter or a batch was written to: the graph would mix old and new."""
    tensors = {"theta": [theta], "a frozen parameter": list(loss.net.frozen.values()), "a batch": list(loss.tensors())}
    seen = [(what, x, x._version) for what, xs in tensors.items() for x in xs if not x.is_inference()]

    def check() -> None:
        for what, x, version in seen:
            if x._version != version:
                raise RuntimeError(
                    f"{what} was changed in place since this operator was made, which holds it and a graph of what it was. "
                    "Make the operator again, or give it a clone."
                )

    return check


def operator(
    loss: Loss, theta: Float[Tensor, " p"], maps: Callable[[], list[Matvec]], scale: float, needs: str
) -> Matvec:
    """v -> scale * the sum of what every batch's map makes of it, in theta's dtype; `maps` makes their graphs, once."""
    check = unchanged(loss, theta)
    with named_if_missing(loss, needs):
        made = maps()

    def matvec(v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        check_flat("v", v, len(theta))
        check()
        with named_if_missing(loss, needs):
            return summed(made, v.to(theta.dtype), scale)

    return matvec


def sandwich(
    loss: Loss, theta: Float[Tensor, " p"], parts: list[tuple[Outputs, AtOutputs]], scale: float, keep: bool
) -> Matvec:
    """v -> scale * sum over batches of J' middle(J v), J the Jacobian of a batch's outputs at theta."""
    one = kept_sandwich if keep else _rebuilt

    def maps() -> list[Matvec]:
        return [one(theta, batch, middle) for batch, middle in parts]

    return operator(loss, theta, maps, scale, "J v and J'u need derivatives in both modes")


def summed(maps: list[Matvec], v: Tensor, scale: float) -> Tensor:
    """The sum of what the maps make of one vector, times the scale."""
    tick("product")
    out = maps[0](v)
    for other in maps[1:]:
        out = out + other(v)
    return out if scale == 1 else out * scale


def kept_gradient(f: Callable[[Any], Tensor], theta: Any) -> Callable[[Any], Any]:
    """v -> H v of one function of a vector or of leaves, the graph of its gradient made once."""
    with torch.enable_grad():  # without grad mode, torch takes formulas that have no derivative themselves (SiLU)
        _, pull = vjp(grad(f), theta)
    return lambda v: pull(v)[0]


def kept_sandwich(theta: Tensor, batch: Outputs, middle: AtOutputs) -> Matvec:
    """J' u is the pullback; J v is the pullback of u -> J' u, which is linear: both graphs are made once."""
    with torch.enable_grad():
        outs, pull = vjp(batch.of, theta)
        push = _push(outs, pull)
    return lambda v: pull(middle(outs, push(v)))[0]


def _push(outs: Outs, pull: Callable[..., tuple]) -> Callable[[Tensor], Outs]:
    return vjp(lambda *u: pull(u)[0], *(torch.zeros_like(out) for out in outs))[1]


def _rebuilt(theta: Tensor, batch: Outputs, middle: AtOutputs) -> Matvec:
    pushed = _forward_or_reverse(lambda v: jvp(batch.of, (theta,), (v,))[1], lambda v: _push(*vjp(batch.of, theta))(v))

    def matvec(v: Tensor) -> Tensor:
        with torch.enable_grad(), ONE_AT_A_TIME:  # the graph of the pullback, whatever the caller's mode
            outs, pull = vjp(batch.of, theta)
            moved = pushed(v)
        return pull(middle(outs, moved))[0]

    return matvec


def rebuilt_gradient(f: Callable[[Tensor], Tensor], theta: Tensor) -> Matvec:
    """v -> H v of one function, differentiated anew for every vector."""
    slope = grad(f)
    product = _forward_or_reverse(lambda v: jvp(slope, (theta,), (v,))[1], lambda v: vjp(slope, theta)[1](v)[0])

    def matvec(v: Tensor) -> Tensor:
        with torch.enable_grad(), ONE_AT_A_TIME:  # see `kept_gradient`
            return product(v)

    return matvec


def _forward_or_reverse(forward: Callable[[Tensor], Any], reverse: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The first of two ways to one product; the second from then on, with a warning, where a kernel has no forward mode."""
    missing: list[str] = []

    def product(v: Tensor) -> Any:
        if missing:
            return reverse(v)
        try:
            return forward(v)
        except NotImplementedError as err:
            if "forward AD" not in str(err):
                raise
            out = reverse(v)
            missing.append(str(err).splitlines()[0][:100])
        warnings.warn(
            f"no forward mode for a kernel of this model ({missing[0]}): every product is made in reverse mode, at the "
            "memory of both graphs. `keep=True` takes as much memory, and less time.",
            stacklevel=2,
        )
        return out

    return product


@contextmanager
def named_if_missing(loss: Loss, needs: str) -> Iterator[None]:
    """A derivative that torch does not have becomes an error that says what to do."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as err:
        reason = str(err).splitlines()[0]
        if not any(words in reason for words in _MISSING):
            raise
        raise ValueError(
            f"{needs}, and torch has none for a kernel of this model ({reason[:150]}): {loss!r} was made with "
            f'attention={loss.net.attention!r}. Pass `attention="eager"`, or take '
            "`hessian_difference`, which needs gradients only."
        ) from err
