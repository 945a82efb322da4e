"""Is the loss a function of theta? Evaluated on one batch before anything is differentiated, once per objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from .batches import Filled, tensors
from .criterion import Criterion
from .forward import WRITES, is_unmapped
from .leaf_rows import Part, rows_of
from .model import Functional
from .softmax import Labels, check_classes
from .substitute import immovable

if TYPE_CHECKING:
    from .objective import Loss

DENSE_UP_TO = 2**24
"""Larger models are moved leaf by leaf: a second set of weights might not fit."""


def check_function(loss: Loss) -> None:
    r"""$L$ depends on theta, and on nothing that happened before.

    On the smallest batch, the model is called at two points near the net's own parameters, and a fresh copy of it at the
    second of them at once. Random numbers, counters, and caches that hold what was made of other parameters make the two
    differ, the first call of a model included. Three forward passes, no gradient; the caller's parameters are not handed on.

    Equal up to the unit roundoff of the model's dtype, or 1e-5 in float32: kernels may sum in another order at each call.

    Raises ValueError where they differ, where a buffer was written to, where weights of losses depend on the output, where
    labels are no classes, and where a loss of weight 0 has derivatives that are not finite.
    """
    net, criterion = loss.net, loss.criterion
    inputs, targets = _smallest(loss)
    fresh = replace(net, buffers={name: value.clone() for name, value in net.buffers.items()})
    versions = {name: value._version for name, value in net.buffers.items() if not value.is_inference()}
    with torch.no_grad(), torch.random.fork_rng(devices=[net.device] if net.device.type == "cuda" else []):
        out = output_nearby(net, -0.01, inputs)
        _check_labels(loss, out)
        other = criterion.scored(output_nearby(net, 0.01, inputs), targets)
        alone = criterion.scored(output_nearby(fresh, 0.01, inputs), targets)
        _check_same(other[0] * other[1], alone[0] * alone[1], net.unit_roundoff)
        for name, version in versions.items():
            if net.buffers[name]._version != version:
                raise ValueError(
                    f"the forward pass writes to the buffer `{name}`, and is no function of theta. {WRITES}"
                )
        if criterion.positionwise:
            return
        losses, weight = criterion.scored(out, targets)
        _check_weights(criterion, weight, other[1])
    if isinstance(criterion.token_loss, Filled):
        _check_filled(loss)
    elif bool((weight == 0).any()) and bool(losses.isfinite().all()):
        _check_slopes(criterion, out, targets)


def why_not_mapped(loss: Loss) -> str | None:
    """What torch says where `vmap` over parameters refuses the model or the criterion; None where it takes them."""
    inputs, targets = _smallest(loss)
    try:
        with torch.no_grad():
            one = {name: value[None] for name, value in loss.net.params.items()}
            vmap(lambda params: loss.criterion.scored(loss.net.apply(params, inputs), targets)[0])(one)
    except RuntimeError as err:
        if is_unmapped(err):
            return str(err).split("\n", 1)[0].split(", which ")[0][:120]
        raise
    return None


def _smallest(loss: Loss) -> tuple[Any, Any]:
    return min(loss.batches, key=lambda pair: sum(x.numel() for x in tensors(pair)))


def output_nearby(net: Functional, step: float, inputs: Any) -> Tensor:
    """What the model makes at its own parameters, each moved by some of itself, so that none of them is 0 throughout."""

    def leaf(_: str, value: Tensor) -> Tensor:
        return _moved(value, value, step)

    if net.layout.num > DENSE_UP_TO and immovable(net._skeleton, net.params) is None:
        return net.apply_leaves(leaf, inputs, partial(_moved_rows, net, step))
    return net.apply({name: leaf(name, value) for name, value in net.params.items()}, inputs)


def moved(theta: Tensor) -> Tensor:
    """A vector of parameters nearby, at which a loss is not at its least by construction."""
    return _moved(theta, theta, 0.01)


def _moved(value: Tensor, mirror: Tensor, step: float) -> Tensor:
    """A small part of itself in another order is added to a leaf; a leaf of zeros becomes one of small numbers."""
    if not bool(value.any()):
        return value + step
    other = mirror.flip(0) if value.ndim else value.clone()
    return other.mul_(step).add_(value)  # in one new tensor: leaves may be large


def _moved_rows(net: Functional, step: float, name: str, value: Tensor) -> Iterator[Part]:
    for rows, part in rows_of(value, net.layout.by_name[name]):
        yield Part(rows, _moved(part, value[len(value) - rows.stop : len(value) - rows.start], step))


def _check_same(other: Tensor, alone: Tensor, roundoff: float) -> None:
    """Sums over sequences, one by one."""
    other, alone = (x.flatten(1).sum(1) if x.ndim > 1 else x for x in (other, alone))
    tolerance = max(roundoff, min(1e-5, 1e6 * roundoff))
    finite = other.isfinite() & alone.isfinite()
    scale = float(alone[finite].abs().amax()) if bool(finite.any()) else 0.0
    differ = (other != alone) & ~(other.isnan() & alone.isnan())
    if bool((differ & ~((other - alone).abs() <= tolerance * scale)).any()):
        raise ValueError(
            f"the same parameters and batch score {float(alone.double().sum()):.8g} at one call and "
            f"{float(other.double().sum()):.8g} at the next: the model's forward pass changes something (a buffer, a cache, "
            "dynamic position embeddings) or draws random numbers, and is no function of theta. Take that out, or switch "
            "it off by the module's own `training` flag: the model runs in eval mode."
        )


def _check_weights(criterion: Criterion, weight: Tensor, other: Tensor) -> None:
    if not torch.equal(weight, other):
        raise ValueError(
            f"the weights that {criterion!r} returns depend on the model's output, and weights are constants here: make them "
            "of the targets alone, and put a factor that depends on the output into the loss."
        )


def _check_labels(loss: Loss, out: Tensor) -> None:
    for _, targets in loss.batches:
        if isinstance(targets, Labels) and loss.criterion.positionwise and out.ndim == targets.index.ndim + 1:
            check_classes(targets, out.shape[-1])


def _check_filled(loss: Loss) -> None:
    """What takes the place of missing targets reaches no other loss, and all derivatives are finite."""
    criterion = loss.criterion
    for inputs, targets in loss.batches:
        with torch.no_grad():
            out = output_nearby(loss.net, 0.01, inputs)
            plain, weight = criterion.token_loss.token_loss(out, targets)  # type: ignore[attr-defined]
            losses = criterion.scored(out, targets)[0]
        if not torch.equal(plain[weight != 0], losses[weight != 0]):
            raise ValueError(
                f"a target that is not finite and weighs 0 changes other losses of {criterion!r}: replace it by a number "
                "before, and take the weights from a mask among the targets."
            )
        if bool(losses.isfinite().all()):
            _check_slopes(criterion, out, targets)


def _check_slopes(criterion: Criterion, out: Tensor, targets: Any) -> None:
    """A loss of weight 0 is not looked at, and neither are its derivatives: 0 * nan would be nan."""

    def total(z: Tensor) -> Tensor:
        losses, weight = criterion.scored(z, targets)
        return (losses * weight).sum()

    if not bool(grad(total)(out).isfinite().all()):
        raise ValueError(
            f"{criterion!r} has a derivative that is not finite where the weight is 0, and 0 times that is nan: give the "
            "loss a finite argument there, such as `torch.where(mask, out, 1)` before a logarithm, and a number where a "
            "target is missing."
        )
