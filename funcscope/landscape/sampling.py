"""How the loss is sampled along random directions: settings of directional losses, flatness and studies; loss at theta.

The loss at theta has the plan and the kernels of the losses around it, from which it is subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import (
    check_choice,
    check_count,
    check_device,
    check_finite_loss,
    check_flag,
    check_flat,
    check_names,
    check_positive,
)
from ..core.directions import Direction, Normalize, directions, stack
from ..core.keys import Distribution, Key, check_key
from ..core.layout import Params
from ..core.model import Functional
from ..core.objective import Loss, Theta, check_point
from ..core.restrict import restrict
from .directional_result import Plan
from .evaluator import mapped
from .residuals import num_groups, residuals
from .terms import PerSequence


class Arguments(NamedTuple):
    """What a caller calls them, for messages."""

    num: str = "n_samples"
    length: str = "span"
    relative: str = "relative_span"
    each: str = "span"


DIRECTIONAL = Arguments()


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What is sampled; the docstrings of `directional_losses` and `flatness` say what each means.

    `check` has the messages for values of the wrong kind, so that fields of `Any` are not checked before.
    """

    key: Any
    num: int
    lengths: tuple[float, ...]
    """Of the steps: the span, or the epsilons."""
    normalize: Any = "filter"
    distribution: Any = "normal"
    relative: Any = False
    unit_norm: bool = False
    """`global_renorm`."""
    two_sided: Any = True
    slope: Any = None
    """How slopes are had ("auto", "gradient", "jvp"); None: not at all."""
    curvature: Any = None
    """How curvatures are had ("difference", "exact"); None: not at all."""
    chunk: int | None = None
    lazy: Any = None
    arguments: Arguments = DIRECTIONAL

    def check(self, loss: Loss, theta: Theta) -> None:
        """Raises ValueError for whatever does not fit, by the name that the caller has for it."""
        check_point(loss, theta)
        check_key(self.key)
        check_choice("normalize", self.normalize, get_args(Normalize))
        check_choice("distribution", self.distribution, get_args(Distribution))
        check_count(self.arguments.num, self.num)
        for length in self.lengths:
            check_positive(self.arguments.each, length)
        check_choice("curvature", self.curvature or "difference", ("difference", "exact"))
        check_choice("slope", self.slope or "auto", ("auto", "gradient", "jvp"))
        check_flag("two_sided", self.two_sided)
        check_flag(self.arguments.relative, self.relative)
        check_flag("lazy", bool(self.lazy) if self.lazy is None else self.lazy)
        if self.chunk is not None:
            check_count("chunk", self.chunk)
        if isinstance(theta, Mapping):
            check_names(theta, loss.layout.names, "theta")
        else:
            check_flat("theta", theta, loss.layout.num)
        tensor = theta if isinstance(theta, Tensor) else next(iter(theta.values()))
        check_device("theta", tensor.device, "the model", loss.net.device)

    def drawn(self, net: Functional, base: Params, common: CommonDirections | None = None) -> tuple[Direction, ...]:
        """The directions; the first of the common ones where there are any."""
        if common is not None:
            return common.first(net, self)
        return directions(
            net,
            key=self.key,
            num=self.num,
            normalize=self.normalize,
            distribution=self.distribution,
            unit_norm=self.unit_norm and self.normalize != "global",
            base=base,
        )

    def steps(self, direction: Direction, param_norm: float) -> list[float]:
        """The coefficients of the directions that make the lengths."""
        if not self.relative:
            return [float(length) for length in self.lengths]
        if param_norm == 0:
            raise ValueError(
                f"`{self.arguments.relative}` makes `{self.arguments.length}` a share of ||theta||, which is 0 here: "
                "leave it out."
            )
        return [length * param_norm / direction.norm for length in self.lengths]


@dataclass(frozen=True, eq=False, repr=False)
class CommonDirections:
    """Unit directions that are drawn and kept, for many checkpoints of one model; made by `common_directions`."""

    key: Key
    dirs: tuple[Direction, ...]
    rows: Float[Tensor, "n p"]

    def first(self, net: Functional, settings: SamplingSettings) -> tuple[Direction, ...]:
        """As many as are asked for, where they are what is asked for."""
        if settings.normalize != "global":
            raise ValueError(
                f"`directions` are for `normalize='global'`, got {settings.normalize!r}: there norms are those of theta's "
                "groups, and differ between checkpoints. Leave `directions` out."
            )
        if self.key != settings.key:
            raise ValueError(f"`directions` were drawn with {self.key!r}, got the key {settings.key!r}: use the same.")
        if self.dirs[0].scales.layout.shapes != net.layout.shapes:
            raise ValueError("`directions` are of another net: its parameters differ. Draw them from `loss.net`.")
        if settings.num > len(self.dirs):
            raise ValueError(
                f"`n_directions` is {settings.num}, and `directions` has {len(self.dirs)}: draw more, or ask for fewer."
            )
        return self.dirs[: settings.num]

    def __repr__(self) -> str:
        return f"CommonDirections({len(self.dirs)} of {self.rows.shape[1]:,} parameters, {self.key!r})"


def common_directions(net: Functional, *, key: Key, num: int = 50) -> CommonDirections:
    r"""The `global` directions of `flatness`, drawn once: they do not depend on theta.

    $d_i = z_i / \|z_i\|$, z_i standard normal: the rows of (num, P), in theta's dtype; num x P numbers stay in memory.
    A `flatness` with this key takes the first `n_directions` of them, with the same result as without.
    Raises ValueError for fewer than one.

    >>> import torch
    >>> from funcscope.core import keys, model
    >>> common_directions(model.functional(torch.nn.Linear(3, 2)), key=keys.key(0), num=5)
    CommonDirections(5 of 8 parameters, Key(9020407baa472c7c3467b98d6ecdffca, seed=0))
    """
    dirs = directions(net, key=key, num=num, normalize="global")
    return CommonDirections(key, dirs, stack(dirs))


def copies(loss: Loss, plan: Plan, num: int, steps: int) -> int:
    """How many models are evaluated at once, at so many steps along each of `num` directions."""
    if not plan.lazy:
        return min(plan.chunk, num)
    return steps if loss.net.attention != "keep" and loss.is_mapped() else 1


def centre_at(
    loss: Loss, theta: Theta, plan: Plan, num: int, dirs: Sequence[Direction], steps: int, rows: Tensor | None = None
) -> tuple[float, Tensor, Tensor]:
    """The loss at theta by that plan, the residuals of its sequences for `num` values, and which of them are scored.

    As many copies at once as at the steps: mapped products round in another way, which small differences would have in them.
    Raises ValueError where the loss is not finite, or not the same twice.
    """
    params, per, many = loss.leaves(theta), PerSequence.of(loss), copies(loss, plan, len(dirs), steps)

    def at(of: Loss) -> Tensor:
        return of.at_leaves(lambda name, _: params[name]) if plan.lazy else of(theta)

    if many == 1:
        terms = at(per)
    elif plan.lazy:
        like = dirs[0].scales
        zeros = torch.zeros(many, dtype=like.dtype, device=like.device)
        terms = mapped(restrict(per, params, dirs[0], lazy=True), zeros, "lazy=False, chunk=1")[0]
    else:
        flat = theta if isinstance(theta, Tensor) else loss.layout.ravel(theta, dirs[0].scales.dtype)
        rows = stack(dirs[:many]) if rows is None else rows[:many]
        terms = mapped(lambda row: restrict(per, flat, row)(0.0), rows, "chunk=1")[0]
    return centred(terms, at(loss), loss, num)


def centred(terms: Tensor, again: Tensor, loss: Loss, num: int) -> tuple[float, Tensor, Tensor]:
    """The same from sums and weights per sequence, and the loss evaluated once more."""
    scored = terms[1].nonzero()[:, 0]
    value, centre = residuals(terms, scored, num_groups(len(scored), num))
    check_finite_loss(float(value), loss.net.params)
    check_baseline(float(value), float(again), loss.net.unit_roundoff)
    return float(value), centre, scored


def check_baseline(value: float, again: float, unit_roundoff: float) -> None:
    """The loss at theta, evaluated twice, is a function of theta."""
    if abs(again - value) > max(1e-5, unit_roundoff) * abs(value):  # bfloat16 kernels may sum in another order
        raise ValueError(
            f"the loss at theta is {value:.8g} at one call and {again:.8g} at the next: the model's forward pass changes "
            "something (a buffer, a cache, dynamic position embeddings) or draws random numbers, and is no function of theta."
        )
