"""Is the loss a function of theta? Evaluated on one batch before anything is differentiated, once per objective."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import grad

from .batches import Filled, tensors
from .criterion import Criterion
from .forward import WRITES
from .model import Functional
from .softmax import Labels, check_classes
from .substitute import LeafFn, immovable

if TYPE_CHECKING:
    from .objective import Loss

DENSE_UP_TO = 2**26
"""Larger models are moved leaf by leaf: a second set of weights might not fit."""


def check_function(loss: Loss) -> None:
    r"""$L$ depends on theta, and on nothing that happened before.

    On the smallest batch, the model is called at the net's own parameters and then at moved ones, and a fresh copy at the
    moved ones at once. Random numbers, counters, and caches that hold what was made of other parameters make the two
    differ, the first call of a model included. Three forward passes, no gradient.

    Equal up to the unit roundoff of the model's dtype, or 1e-5 in float32: kernels may sum in another order at each call.

    Raises ValueError where they differ, where a buffer was written to, where weights of losses depend on the output, where
    labels are no classes, and where a loss of weight 0 has derivatives that are not finite.
    """
    net = loss.net
    batch = min(loss.batches, key=lambda pair: sum(x.numel() for x in tensors(pair)))
    fresh = replace(net, buffers={name: value.clone() for name, value in net.buffers.items()})
    versions = {name: value._version for name, value in net.buffers.items() if not value.is_inference()}
    with torch.no_grad(), torch.random.fork_rng(devices=[net.device] if net.device.type == "cuda" else []):
        first = _output(net, lambda _, value: value, batch[0])
        _check_labels(loss, first)
        later, alone = _output(net, _moved, batch[0]), _output(fresh, _moved, batch[0])
        for name, version in versions.items():
            if net.buffers[name]._version != version:
                raise ValueError(
                    f"the forward pass writes to the buffer `{name}`, and is no function of theta. {WRITES}"
                )
        sums, weight = loss.criterion.scored(later, batch[1])
        _check_same(sums * weight, _product(loss.criterion, alone, batch[1]), net.unit_roundoff)
        _check_weights(loss.criterion, first, weight, batch[1])
    if isinstance(loss.criterion.token_loss, Filled):
        for inputs, targets in loss.batches:
            with torch.no_grad():
                out = _output(net, lambda _, value: value, inputs)
            _check_filled(loss.criterion, out, targets)
    elif not loss.criterion.positionwise:
        _check_slopes(loss.criterion, first, batch[1])


def _output(net: Functional, leaf: LeafFn, inputs: Any) -> Tensor:
    if net.layout.num > DENSE_UP_TO and immovable(net._skeleton, net.params) is None:
        return net.apply_leaves(leaf, inputs)
    return net.apply({name: leaf(name, value) for name, value in net.params.items()}, inputs)


def _moved(_: str, value: Tensor) -> Tensor:
    """A hundredth of itself in another order is added; a leaf of zeros becomes one of hundredths."""
    if not bool(value.any()):
        return value + 0.01
    return torch.add(value, value.flip(0) if value.ndim else value, alpha=0.01)


def _product(criterion: Criterion, out: Tensor, targets: Any) -> Tensor:
    losses, weight = criterion.scored(out, targets)
    return losses * weight


def _check_same(later: Tensor, alone: Tensor, roundoff: float) -> None:
    later, alone = (
        later.flatten(1).sum(1) if later.ndim > 1 else later,
        alone.flatten(1).sum(1) if alone.ndim > 1 else alone,
    )
    tolerance = max(roundoff, min(1e-5, 1e6 * roundoff))
    finite = later.isfinite() & alone.isfinite()
    scale = float(alone[finite].abs().amax()) if bool(finite.any()) else 0.0
    other = (later != alone) & ~(later.isnan() & alone.isnan())
    if bool((other & ~((later - alone).abs() <= tolerance * scale)).any()):
        raise ValueError(
            f"the same parameters and batch score {float(later.double().sum()):.8g} at one call and "
            f"{float(alone.double().sum()):.8g} at another: the model's forward pass changes something (a buffer, a cache, "
            "dynamic position embeddings) or draws random numbers, and is no function of theta. Take that out, or switch "
            "it off by the module's own `training` flag: the model runs in eval mode."
        )


def _check_weights(criterion: Criterion, out: Tensor, other: Tensor, targets: Any) -> None:
    if not criterion.positionwise and not torch.equal(criterion.token_loss(out, targets)[1], other):
        raise ValueError(
            f"the weights that {criterion!r} returns depend on the model's output, and weights are constants here: make them "
            "of the targets alone, and put a factor that depends on the output into the loss."
        )


def _check_labels(loss: Loss, out: Tensor) -> None:
    for _, targets in loss.batches:
        if isinstance(targets, Labels) and loss.criterion.positionwise and out.ndim == targets.index.ndim + 1:
            check_classes(targets, out.shape[-1])


def _check_filled(criterion: Criterion, out: Tensor, targets: Any) -> None:
    """What takes the place of missing targets reaches no other loss, and all derivatives are finite."""
    plain, weight = criterion.token_loss.token_loss(out, targets)  # type: ignore[attr-defined]
    scored = weight != 0
    if not torch.equal(plain[scored], criterion.token_loss(out, targets)[0][scored]):
        raise ValueError(
            f"a target that is not finite and weighs 0 changes other losses of {criterion!r}: replace it by a number before, "
            "and take the weights from a mask among the targets."
        )
    _check_slopes(criterion, out, targets)


def _check_slopes(criterion: Criterion, out: Tensor, targets: Any) -> None:
    """A loss of weight 0 is not looked at, and neither are its derivatives: 0 * nan would be nan."""
    losses, weight = criterion.scored(out, targets)
    if bool((weight != 0).all()) or not bool(losses.isfinite().all()):
        return
    if not bool(grad(lambda z: _product(criterion, z, targets).sum())(out).isfinite().all()):
        raise ValueError(
            f"{criterion!r} has a derivative that is not finite where the weight is 0, and 0 times that is nan: give the "
            "loss a finite argument there, such as `torch.where(mask, out, 1)` before a logarithm, and a number for "
            "a missing target."
        )
