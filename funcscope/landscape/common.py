"""Directions that are drawn once and kept, for many checkpoints of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..core.directions import Direction, Normalize, directions, stack
from ..core.keys import Key
from ..core.model import Functional


@dataclass(frozen=True, eq=False, repr=False)
class CommonDirections:
    """Unit directions that are drawn and kept, for many checkpoints of one model; made by `common_directions`."""

    key: Key
    dirs: tuple[Direction, ...]
    rows: Float[Tensor, "n p"]

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


def drawn(
    net: Functional, base: Any, key: Key, num: int, normalize: Normalize, common: CommonDirections | None
) -> tuple[Direction, ...]:
    """The first of the common directions, where they fit what is asked for; else new ones."""
    if common is None:
        return directions(net, key=key, num=num, normalize=normalize, base=base)
    if normalize != "global":
        raise ValueError(
            f"`directions` are for `normalize='global'`, got {normalize!r}: there norms are those of theta's groups, and "
            "differ between checkpoints. Leave `directions` out."
        )
    if common.key != key:
        raise ValueError(f"`directions` were drawn with {common.key!r}, got the key {key!r}: use the same.")
    if common.dirs[0].scales.layout.shapes != net.layout.shapes:
        raise ValueError("`directions` are of another net: its parameters differ. Draw them from `loss.net`.")
    if num > len(common.dirs):
        raise ValueError(
            f"`n_directions` is {num}, and `directions` has {len(common.dirs)}: draw more, or ask for fewer."
        )
    return common.dirs[:num]
