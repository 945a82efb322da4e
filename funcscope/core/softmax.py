"""The cross-entropy of labels, with its second derivative and its distribution in closed form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .keys import Key, uniform

ROWS_ENTRIES = 2**16
"""Entries of the logits that are worked on at a time in closed forms: 256 KiB of float32."""


class Labels(NamedTuple):
    """One class per position, aligned with the model's output, and the weight of each (0: not scored)."""

    index: Int[Tensor, "..."]  # type: ignore[assignment]
    weight: Float[Tensor, "..."]


def cross_entropy_of(out: Tensor, targets: Labels) -> tuple[Tensor, Tensor]:
    """-log softmax(out)[label] in at least float32, nats."""
    _check_positions(out, targets)
    logits = out.to(torch.promote_types(out.dtype, torch.float32))
    try:
        chosen = logits.gather(-1, targets.index[..., None])[..., 0]
    except RuntimeError:
        check_classes(targets, out.shape[-1])
        raise
    return logits.logsumexp(-1) - chosen, targets.weight


def check_classes(targets: Labels, num: int) -> None:
    """Every scored label is one of the output's classes."""
    if targets.index.numel() and (largest := int(targets.index.max())) >= num:
        raise ValueError(
            f"`labels` hold {largest}, and the model's output has {num} classes, 0 to {num - 1}: mark what is not scored by "
            "-100, and check the labels or the size of the last layer."
        )


def _check_positions(out: Tensor, targets: Labels) -> None:
    if out.shape[:-1] != targets.index.shape:
        raise ValueError(
            f"the model's output of shape {tuple(out.shape)} must be labels of shape {tuple(targets.index.shape)} "
            "with one more dimension of classes; choose another criterion, or another `output` in `functional`."
        )


def softmax_hessian(out: Tensor, targets: Labels, v: Tensor) -> Tensor:
    """weight * (diag p - p p') v, the second derivative of the cross-entropy in the logits, whatever the label.

    A few rows at a time: what lies between the logits and the result stays in the cache.
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    classes = out.shape[-1]
    rows = max(1, ROWS_ENTRIES // classes)
    parts = []
    for z, dz, weight in zip(
        out.reshape(-1, classes).split(rows),
        v.reshape(-1, classes).split(rows),
        targets.weight.reshape(-1, 1).split(rows),
        strict=True,
    ):
        p = z.to(wide).softmax(-1)
        moved = p * dz
        parts.append(torch.addcmul(moved, p, moved.sum(-1, keepdim=True), value=-1) * weight)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(v.shape)


def draw_labels(out: Tensor, targets: Labels, key: Key) -> Labels:
    """Labels drawn from softmax(out) by inversion of the distribution function, at the same positions and weights."""
    cumulative = out.double().softmax(-1).cumsum(-1)
    unit = uniform(key, cumulative[..., 0]) * cumulative[..., -1]
    index = torch.searchsorted(cumulative, unit[..., None], right=True)[..., 0].clamp(max=out.shape[-1] - 1)
    return Labels(index, targets.weight)
