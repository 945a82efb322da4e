"""The loss as a function of theta: the exact token-weighted mean over a fixed list of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .checks import check_device
from .criterion import Criterion
from .estimate import wide
from .layout import Layout, Params
from .model import Functional, Inputs, LeafFn
from .progress import tick

Theta = Tensor | Params


@dataclass(frozen=True, eq=False, repr=False)
class Loss:
    """`loss(theta)`: sum of weighted token losses over sum of weights. Made by `objective`.

    Works on a flat vector or a dict of parameters, under `grad`, `jvp`, `vjp` and `vmap`. Sums are accumulated in
    float64 (float32 where the device has none).
    """

    net: Functional
    batches: tuple[tuple[Inputs, Any], ...]
    criterion: Criterion

    def __repr__(self) -> str:  # short: torch's vmap takes the repr of its function at every call
        return f"Loss({self.criterion.name}, {len(self.batches)} batches, {self.net!r})"

    @property
    def layout(self) -> Layout:
        return self.net.layout

    def __call__(self, theta: Theta) -> Float[Tensor, ""]:
        params = self.params(theta)
        return self._mean(lambda inputs: self.net.apply(params, inputs))

    def at_leaves(self, leaf: LeafFn) -> Float[Tensor, ""]:
        """The loss with each parameter replaced by `leaf(name, value)` when it is used; see `Functional.apply_leaves`."""
        return self._mean(lambda inputs: self.net.apply_leaves(leaf, inputs))

    def terms(self, theta: Theta) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Per sequence, in the order of the batches: the weighted sum of its token losses, and the sum of its weights.

        The loss is the ratio of their totals.
        """
        params = self.params(theta)
        parts = [self.scored(lambda inputs: self.net.apply(params, inputs), *batch) for batch in self.batches]
        sums, weights = zip(*parts, strict=True)
        return torch.cat(sums), torch.cat(weights)

    def params(self, theta: Theta) -> Params:
        """The dict of parameters that `theta` stands for; a dict is passed through."""
        return theta if isinstance(theta, Mapping) else self.layout.unravel(theta)

    def leaves(self, theta: Theta) -> Params:
        """The same in theta's own dtype: to be moved before they are rounded to the dtype that they are used in."""
        return theta if isinstance(theta, Mapping) else self.layout.unravel(theta, cast=False)

    def with_buffers(self, buffers: Params) -> Loss:
        """The same loss of the net with these buffers; see `Functional.with_buffers`."""
        return replace(self, net=self.net.with_buffers(buffers))

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor of the batches."""
        return _tensors(self.batches)

    def _mean(self, outputs: Callable[[Inputs], Tensor]) -> Tensor:
        parts = [self.scored(outputs, *batch) for batch in self.batches]
        total = torch.stack([sums.sum() for sums, _ in parts]).sum()
        return total / torch.stack([weights.sum() for _, weights in parts]).sum()

    def scored(self, outputs: Callable[[Inputs], Tensor], inputs: Inputs, targets: Any) -> tuple[Tensor, Tensor]:
        """Sums and weights per sequence of one batch, from what the model makes of its inputs."""
        tick("forward")
        loss, weight = self.criterion.scored(outputs(inputs), targets)
        return per_sequence(loss * weight), per_sequence(weight)


def objective(net: Functional, batches: Iterable[Any], criterion: Criterion) -> Loss:
    """The mean loss of `net` over `batches`, weighted by scored tokens: the same however the data are batched.

    batches: a list of batches (or one mapping, tensor or tuple: one batch), each as the criterion's `prepare` takes
    it. They are fixed here: every evaluation sees the same data.

    Raises ValueError for an empty list, for batches on another device than the parameters, and where no position is
    scored at all.

    >>> from funcscope.core.criterion import classification
    >>> from funcscope.core.model import functional
    >>> net = functional(torch.nn.Linear(3, 2))
    >>> loss = objective(net, [(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))], classification)
    >>> round(float(loss({name: 0 * value for name, value in net.params.items()})), 4)      # ln 2
    0.6931
    """
    one = isinstance(batches, (Mapping, Tensor)) or (isinstance(batches, tuple) and isinstance(batches[0], Tensor))
    listed = [batches] if one else list(batches)
    if not listed:
        raise ValueError("`batches` is empty: a mean over nothing is undefined.")
    for tensor in _tensors(listed):
        check_device("the batch", tensor.device, "the model", net.device)
    prepared = tuple((_checked(net.prepare(inputs)), targets) for inputs, targets in map(criterion.prepare, listed))
    weights = [targets.weight for _, targets in prepared if hasattr(targets, "weight")]
    if weights and not any(bool(weight.any()) for weight in weights):
        raise ValueError(
            "no position is scored: every label is -100 or masked. "
            "Check `labels` and `attention_mask`; the mean over no token is undefined."
        )
    return Loss(net, prepared, criterion)


def _checked(inputs: Inputs) -> Inputs:
    """Negative ids would be taken from the end of the embedding."""
    for name, ids in inputs.items() if isinstance(inputs, Mapping) else ():
        if name in ("input_ids", "decoder_input_ids") and isinstance(ids, Tensor) and bool((ids < 0).any()):
            raise ValueError(f"`{name}` holds the negative id {int(ids.min())}: -100 belongs into `labels` only.")
    return inputs


def per_sequence(x: Tensor) -> Tensor:
    """Sums over all but the first dimension."""
    return x.flatten(1).sum(1, dtype=wide(x.device)) if x.ndim > 1 else x.to(wide(x.device))


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _tensors(value)
