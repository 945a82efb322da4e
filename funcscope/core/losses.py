"""Criteria beside those of language models: `mse`, `binary_cross_entropy`, `cross_entropy` with its options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .criterion import Criterion, classes, pair
from .forward import Inputs
from .keys import Key, normal, uniform
from .softmax import Labels, cross_entropy_of, draw_labels, softmax_hessian


def cross_entropy(*, weight: Tensor | None = None, label_smoothing: float = 0.0) -> Criterion:
    r"""`classification` with a weight per class and smoothed labels: the value of `torch.nn.functional.cross_entropy`.

    $$L = \frac{\sum_i \big[(1 - \epsilon)\, w_{y_i} \ell_{i y_i} + \tfrac{\epsilon}{C} \sum_c w_c\, \ell_{ic}\big]}
      {\sum_i w_{y_i}}, \qquad \ell_{ic} = -\log \mathrm{softmax}(z_i)_c.$$

    weight: (C,), above 0, or 0 for classes that are not scored where labels are not smoothed. label_smoothing: eps in [0, 1].

    A smoothed loss is no log-likelihood, so that it has a Gauss-Newton matrix and no Fisher information (`sample` is None).

    >>> criterion = cross_entropy(weight=torch.tensor([1.0, 3.0]))
    >>> _, labels = criterion.prepare((torch.zeros(2, 1), torch.tensor([0, 1])))
    >>> labels.weight.tolist()
    [1.0, 3.0]
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` must be a number from 0 to 1, got {label_smoothing!r}.")
    if weight is not None:
        _check_class_weights(weight, label_smoothing)
    if weight is None and not label_smoothing:
        return Criterion(
            "cross_entropy", classes, cross_entropy_of, softmax_hessian, draw_labels, positionwise=True, unit="nats"
        )

    def prepare(batch: Any) -> tuple[Inputs, Labels]:
        inputs, labels = classes(batch)
        if weight is None:
            return inputs, labels
        if labels.index.numel() and int(labels.index.max()) >= len(weight):
            raise ValueError(f"`weight` holds {len(weight)} classes, and `labels` hold {int(labels.index.max())}.")
        return inputs, labels._replace(weight=labels.weight * weight.to(labels.weight)[labels.index])

    def token_loss(out: Tensor, targets: Labels) -> tuple[Tensor, Tensor]:
        if weight is not None and out.shape[-1] != len(weight):
            raise ValueError(f"`weight` holds {len(weight)} classes, and the model's output {out.shape[-1]}.")
        plain, scored = cross_entropy_of(out, targets)
        if not label_smoothing:
            return plain, scored
        wide = out.to(plain.dtype)
        each = wide.logsumexp(-1, keepdim=True) - wide
        spread = each.mean(-1) if weight is None else (each * _per_own(weight, targets, each)).mean(-1)
        return (1 - label_smoothing) * plain + label_smoothing * spread, scored

    def output_hessian(out: Tensor, targets: Labels, v: Tensor) -> Tensor:
        if not label_smoothing or weight is None:
            return softmax_hessian(out, targets, v)
        share = _per_own(weight, targets, targets.weight).mean(-1)
        return softmax_hessian(out, Labels(targets.index, targets.weight * (1 + label_smoothing * (share - 1))), v)

    sample = None if label_smoothing else draw_labels
    return Criterion("cross_entropy", prepare, token_loss, output_hessian, sample, positionwise=True, unit="nats")


def _per_own(weight: Tensor, targets: Labels, like: Tensor) -> Tensor:
    """Every class's weight over that of the label, (..., C)."""
    weight = weight.to(like)
    return weight / weight[targets.index][..., None]


def _check_class_weights(weight: Tensor, label_smoothing: float) -> None:
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not weight.is_floating_point():
        got = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
        raise ValueError(f"`weight` must be a floating-point tensor of shape (classes,), got {got}.")
    least = float(weight.min())
    if not bool(weight.isfinite().all()) or least < 0 or (label_smoothing and not least):
        raise ValueError(
            f"`weight` must be finite and at least 0, and above 0 where labels are smoothed, got a least one of {least:g}: "
            "mark examples that are not scored by the label -100."
        )


def _regression(batch: Any) -> tuple[Inputs, Tensor]:
    inputs, targets = pair(batch)
    if not isinstance(targets, Tensor):
        raise TypeError(f"the targets must be a tensor of the output's shape, got a {type(targets).__name__}.")
    if not targets.is_floating_point():
        targets = targets.to(torch.get_default_dtype())
    if not bool(targets.isfinite().all()):
        raise ValueError(
            "the targets hold nan or infinite numbers: leave those rows out, or say that they are missing by "
            "`custom(lambda out, y: ((out - y).square(), y.isfinite().to(out.dtype)))`."
        )
    return inputs, targets


def _probabilities(batch: Any) -> tuple[Inputs, Tensor]:
    inputs, targets = _regression(batch)
    if targets.numel() and not (float(targets.min()) >= 0 and float(targets.max()) <= 1):
        raise ValueError(
            f"binary targets must lie between 0 and 1, got {float(targets.min()):g} to {float(targets.max()):g}: map labels "
            "of -1 and 1 by `(y + 1) / 2`; labels of several classes are `classification`."
        )
    return inputs, targets


def _alike(out: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Output and targets in one dtype of at least float32, where no broadcasting makes a table of the two."""
    if out.shape != targets.shape:
        column = " (`targets[:, None]`, or `output=lambda out: out[:, 0]` in `functional`)"
        raise ValueError(
            f"the model's output of shape {tuple(out.shape)} and the targets of shape {tuple(targets.shape)} must have one "
            f"shape: broadcasting would compare every output with every target{column if out.shape[1:] == (1,) else ''}."
        )
    wide = torch.promote_types(torch.promote_types(out.dtype, targets.dtype), torch.float32)
    return out.to(wide), targets.to(wide)


def _squares(out: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    out, targets = _alike(out, targets)
    return (out - targets).square(), torch.ones_like(targets)


def _twice(out: Tensor, targets: Tensor, v: Tensor) -> Tensor:
    _alike(out, targets)
    return 2 * v


def _logistic(out: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    out, targets = _alike(out, targets)
    return F.softplus(out) - targets * out, torch.ones_like(targets)


def _logistic_hessian(out: Tensor, targets: Tensor, v: Tensor) -> Tensor:
    p = _alike(out, targets)[0].sigmoid()
    return p * (1 - p) * v


def _draw_normal(out: Tensor, targets: Tensor, key: Key) -> Tensor:
    wide = _alike(out, targets)[0]
    return wide + normal(key, wide) * 0.5**0.5


def _draw_bernoulli(out: Tensor, targets: Tensor, key: Key) -> Tensor:
    p = _alike(out, targets)[0].double().sigmoid()
    return (uniform(key, p) < p).to(targets.dtype)


mse = Criterion("mse", _regression, _squares, _twice, _draw_normal)
r"""$(z - y)^2$ for every entry of the output, as `torch.nn.functional.mse_loss`; targets have the output's shape.

Up to a constant this is $-\log p(y)$ of a normal distribution around the output with variance 1/2, which `sample` draws
from: the Fisher information is the Gauss-Newton matrix, with a Hessian of 2 in every output.
"""

binary_cross_entropy = Criterion(
    "binary_cross_entropy", _probabilities, _logistic, _logistic_hessian, _draw_bernoulli, unit="nats"
)
r"""$\log(1 + e^z) - y z$ for every entry, the outputs being logits, as `binary_cross_entropy_with_logits`; nats.

Targets have the output's shape and lie between 0 and 1; booleans and integers are taken, too.
"""
