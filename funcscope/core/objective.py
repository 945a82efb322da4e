"""The loss as a function of theta: the exact token-weighted mean over a fixed list of batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .apart import check_apart
from .batches import Prepared, divided, num_rows, prepared, tensors, with_finite_targets
from .checks import check_device, check_finite_loss, check_flat, check_params
from .criterion import Criterion
from .estimate import wide
from .layout import Layout, Params
from .model import Functional, Inputs, LeafFn, RowsFn
from .progress import tick
from .purity import check_function, why_not_mapped
from .substitute import NOT_LEAF_BY_LEAF
from .tables import counted

Theta = Tensor | Params
T = TypeVar("T")


@dataclass(frozen=True, eq=False, repr=False)
class Loss:
    """`loss(theta)`: sum of weighted token losses over sum of weights. Made by `objective`.

    Works on a flat vector or a dict of parameters, under `grad`, `jvp`, `vjp` and `vmap`. Sums are accumulated in
    float64 (float32 where the device has none).
    """

    net: Functional
    batches: Prepared
    criterion: Criterion
    _verdicts: set[str] = field(default_factory=set)
    """What was checked and is right ("function"), names of parameters that the model does not use, and what was said."""

    def __repr__(self) -> str:  # short: torch's vmap takes the repr of its function at every call
        return f"Loss({self.criterion.name}, {counted(len(self.batches), 'batch', 'batches')}, {self.net!r})"

    @property
    def layout(self) -> Layout:
        return self.net.layout

    def __call__(self, theta: Theta) -> Float[Tensor, ""]:
        params = self.params(theta)
        return self._mean(lambda inputs: self.net.apply(params, inputs))

    def at_leaves(self, leaf: LeafFn) -> Float[Tensor, ""]:
        """The loss with each parameter replaced by `leaf(name, value)` when it is used; see `Functional.apply_leaves`."""
        return _ratio(self._parts_at_leaves(leaf))

    def terms_at_leaves(self, leaf: LeafFn, rows: RowsFn) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """`terms` where `at_leaves` has the loss, large matrices some rows at a time."""
        sums, weights = zip(*self._parts_at_leaves(leaf, rows), strict=True)
        return torch.cat(sums), torch.cat(weights)

    def _parts_at_leaves(self, leaf: LeafFn, rows: RowsFn | None = None) -> list[tuple[Tensor, Tensor]]:
        used = set()

        def asked(function: Callable[[str, Tensor], T]) -> Callable[[str, Tensor], T]:
            def call(name: str, value: Tensor) -> T:
                used.add(name)
                return function(name, value)

            return call

        by_rows = None if rows is None else asked(rows)
        parts = self._parts(lambda inputs: self.net.apply_leaves(asked(leaf), inputs, by_rows))
        if unused := set(self.layout.names) - used - self._verdicts:
            self._check_unused(unused)
        return parts

    def check_function(self) -> None:
        """Raises where the loss is no function of theta, before its first use by an operator or a metric."""
        if "function" not in self._verdicts:
            check_function(self)
            self._verdicts.add("function")

    def is_mapped(self) -> bool:
        """Whether `vmap` over parameters takes this model, tried on one batch, once; says so where it does not."""
        if not {"mapped", "looped"} & self._verdicts:
            reason = why_not_mapped(self)
            self._verdicts.add("looped" if reason else "mapped")
            if reason:
                self.say_once(f"points are evaluated one at a time, as `vmap` refuses this model ({reason}).")
        return "mapped" in self._verdicts

    def say_once(self, text: str) -> None:
        """A warning that this objective gives once."""
        if text not in self._verdicts:
            self._verdicts.add(text)
            warnings.warn(text, stacklevel=2)

    def _check_unused(self, names: set[str]) -> None:
        """A parameter that was not asked for makes no difference: not even nan in its place does."""
        lost = {**self.net.params, **{name: torch.full_like(self.net.params[name], torch.nan) for name in names}}
        with torch.no_grad():
            for inputs, _ in self.batches:
                one, other = self.net.apply(self.net.params, inputs), self.net.apply(lost, inputs)
                if not torch.equal(one.nan_to_num(), other.nan_to_num()):
                    raise ValueError(
                        f"`{min(names)}` or another parameter is used past torch's Python, {NOT_LEAF_BY_LEAF}"
                    )
        self._verdicts.update(names)

    def terms(self, theta: Theta) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Per sequence, in the order of the batches: the weighted sum of its token losses, and the sum of its weights.

        The loss is the ratio of their totals.
        """
        params = self.params(theta)
        sums, weights = zip(*self._parts(lambda inputs: self.net.apply(params, inputs)), strict=True)
        return torch.cat(sums), torch.cat(weights)

    def params(self, theta: Theta) -> Params:
        """The dict of parameters that `theta` stands for; a dict is passed through."""
        return theta if isinstance(theta, Mapping) else self.layout.unravel(theta)

    def vector(self, theta: Theta, name: str = "theta") -> Float[Tensor, " p"]:
        """theta as one vector of shape (P,), in float32 at least: a constant to whoever differentiates later.

        Raises TypeError or ValueError for what is no point of this loss, by `name`, and where the loss is no function of
        theta; `Loss.vector(loss, theta)` where `loss` may be anything.
        """
        check_shapes(self, theta, name)
        dtype = torch.promote_types(theta.dtype if isinstance(theta, Tensor) else self.layout.dtype, torch.float32)
        return (theta.to(dtype) if isinstance(theta, Tensor) else self.layout.ravel(theta, dtype)).detach()

    def leaves(self, theta: Theta) -> Params:
        """The parameters in theta's own dtype: to be moved before they are rounded to the dtype that they are used in."""
        return theta if isinstance(theta, Mapping) else self.layout.unravel(theta, cast=False)

    def wide_leaves(self, theta: Theta, name: str = "theta") -> Params:
        """`leaves` as constants in float32 at least, in the order of the layout; raises as `vector` does."""
        check_shapes(self, theta, name)
        leaves = self.leaves(theta)
        each = {key: leaves[key].detach() for key in self.layout.names}
        return {key: value.to(torch.promote_types(value.dtype, torch.float32)) for key, value in each.items()}

    def baseline(self, theta: Theta) -> float:
        """The loss at theta, from which others are subtracted. Raises ValueError where it is not finite."""
        check_shapes(self, theta)
        with torch.no_grad():
            value = float(self(theta))
        check_finite_loss(value, self.leaves(theta))
        return value

    def with_buffers(self, buffers: Params) -> Loss:
        """The same loss of the net with these buffers; see `Functional.with_buffers`."""
        return replace(self, net=self.net.with_buffers(buffers))

    @property
    def batch_size(self) -> int:
        """Sequences of the largest batch, as far as batches say how many they have."""
        return max((num_rows(pair) for pair in self.batches), default=1)

    def split(self, size: int) -> Loss:
        """The same loss in batches of at most `size` sequences: the same terms in the same order, in less memory.

        Raises ValueError where sequences have other losses in smaller batches: `core.apart.check_apart`.
        """
        check_apart(self, size)
        return replace(self, batches=divided(self.batches, size), _verdicts=set(self._verdicts))

    def tensors(self) -> Iterable[Tensor]:
        """Every tensor of the batches."""
        return tensors(self.batches)

    def _mean(self, outputs: Callable[[Inputs], Tensor]) -> Tensor:
        return _ratio(self._parts(outputs))

    def _parts(self, outputs: Callable[[Inputs], Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [self.scored(outputs, *batch) for batch in self.batches]

    def over_ranks(self, x: float) -> float:
        """The sum of a number over all that have a part of the data: of one, itself."""
        return x

    def scored(self, outputs: Callable[[Inputs], Tensor], inputs: Inputs, targets: Any) -> tuple[Tensor, Tensor]:
        """Sums and weights per sequence of one batch, from what the model makes of its inputs."""
        tick("forward")
        loss, weight = self.criterion.scored(outputs(inputs), targets)
        return per_sequence(loss * weight), per_sequence(weight)


def objective(net: Functional, batches: Iterable[Any], criterion: Criterion) -> Loss:
    """The mean loss of `net` over `batches`, weighted by scored tokens: the same however the data are batched.

    batches: a list of batches, a `DataLoader`, or one mapping, tensor or tuple: one batch; each as the criterion's
    `prepare` takes it, of tensors or numpy arrays. They are fixed here: every evaluation sees the same data. A batch
    without a sequence is left out.

    Targets that are not finite are missing ones where the criterion gives them weight 0: neither the loss nor its
    derivatives look at them.

    Raises ValueError for an empty list, for batches on another device than the parameters, and where no position is
    scored at all; TypeError for a net, criterion or batches of another kind. What takes a forward pass to see is raised at
    the first use by an operator or a metric (core/purity.py).

    >>> from funcscope.core.criterion import classification
    >>> from funcscope.core.model import functional
    >>> net = functional(torch.nn.Linear(3, 2))
    >>> loss = objective(net, [(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))], classification)
    >>> round(float(loss({name: 0 * value for name, value in net.params.items()})), 4)      # ln 2
    0.6931
    """
    if not isinstance(net, Functional):
        raise TypeError(f"`net` must be what `functional` returns, got a {type(net).__name__}: `functional(model)`.")
    if not isinstance(criterion, Criterion):
        raise TypeError(
            f"`criterion` must be a criterion such as `fs.classification`, got a {type(criterion).__name__}: a function of "
            "(output, targets) without reduction becomes one by `fs.custom(function)`."
        )
    if hasattr(net, "shares"):
        raise ValueError(
            "`net` has its parameters on several ranks: take `fs.sharded_objective(net, batches, criterion)`."
        )
    pairs = prepared(net, batches, criterion)
    return Loss(net, pairs, with_finite_targets(criterion, pairs))


def check_point(loss: Any, theta: Any, name: str = "theta") -> None:
    """The door of whatever takes a loss and theta: they are what they should be, and the loss is a function of theta."""
    if not isinstance(loss, Loss):
        raise TypeError(
            f"`loss` must be what `objective` returns, got a {type(loss).__name__}: "
            "`objective(functional(model), batches, criterion)`."
        )
    if not isinstance(theta, (Tensor, Mapping)):
        raise TypeError(
            f"`{name}` must be a flat tensor or a dict of parameters, got a {type(theta).__name__}: `net.theta`, "
            "`net.params`, `dict(model.named_parameters())`, or `torch.as_tensor` of an array."
        )
    if isinstance(theta, Tensor):
        check_device(name, theta.device, "the model", loss.net.device)
    loss.check_function()


def check_shapes(loss: Any, theta: Any, name: str = "theta") -> None:
    """`check_point`, and theta has the length, or the names and shapes, of the layout."""
    check_point(loss, theta, name)
    if isinstance(theta, Tensor):
        check_flat(name, theta, loss.layout.num)
    else:
        check_params(theta, loss.layout.shapes, name)


def _ratio(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    total = torch.stack([sums.sum() for sums, _ in parts]).sum()
    return total / torch.stack([weights.sum() for _, weights in parts]).sum()


def per_sequence(x: Tensor) -> Tensor:
    """Sums over all but the first dimension."""
    return x.flatten(1).sum(1, dtype=wide(x.device)) if x.ndim > 1 else x.to(wide(x.device))
