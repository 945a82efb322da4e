"""What changing one site after another does to a number per sequence: the shape of that, and passes side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.checks import check_count
from ..core.model import Functional
from ..core.result import Derived, Result, internal
from ..core.standard_errors import ratio_stderr
from ..core.tables import Quantity
from ..core.trace import AXES, Edit, sites_of

PLACES = {
    "heads": ("z", "head"), "attention": ("attn_out", "position"), "mlps": ("mlp_out", "position"),
    "residual": ("resid_post", "position"), "neurons": ("mlp_post", "unit"),
}  # fmt: skip
"""Sites by what they are called, and what a layer of them is per."""
Selection = Bool[Tensor, "l p"]
"""The places of every layer that are changed."""


def effect_per(label: str, *axes: str, unit: str = "") -> Derived[Any]:
    """`effects` of a result, where they are per these axes."""
    made: Derived[Any] = Derived(lambda result: result.shaped(result.means) if tuple(result.axes) == axes else None)
    made.quantity = Quantity(label, unit, axes, "effects", "effects_stderr", True)
    return made


class _SiteEffects(Result):
    """Changes of a number per sequence by site, over what they are measured in."""

    changes: Float[Tensor, "s n"] = internal()
    """Per site and sequence."""
    reference: Float[Tensor, " n"] = internal()
    axes: list[str] = internal()
    shape: list[int] = internal()
    sites: str

    @property
    def effects(self) -> Tensor:
        """Sum of changes over that of the reference, per site."""
        return self.shaped(self.means)

    @property
    def effects_stderr(self) -> Tensor:
        """Over sequences, paired."""
        return self.shaped(ratio_stderr(self.changes, self.reference))

    @property
    def means(self) -> Float[Tensor, " s"]:
        return self.changes.sum(1) / self.reference.sum()

    @property
    def coords(self) -> dict[str, Sequence[Any]]:
        return {axis: range(size) for axis, size in zip(self.axes, self.shape, strict=True)}

    def shaped(self, values: Tensor) -> Tensor:
        return values.view(self.shape)


def site_names(net: Functional, sites: str, allowed: Sequence[str]) -> list[str]:
    """The sites of all layers that a kind of places is in.

    Raises ValueError for an unknown kind, and where the model has no such sites.
    """
    if sites not in allowed:
        raise ValueError(f"`sites` must be one of {', '.join(map(repr, allowed))}, got {sites!r}.")
    kind = PLACES[sites][0]
    names = [each for each in sites_of(net) if each.rpartition(".")[0] == kind]
    if not names:
        raise ValueError(f"the parts of this model are not described: it has no site `{kind}` to change.")
    return names


def edits_where(names: Sequence[str], axis: str, chosen: Selection, values: Sequence[Tensor]) -> dict[str, Edit]:
    """The sites with their values replaced where places are chosen."""

    def edit(layer: int, name: str) -> Callable[[Tensor], Tensor]:
        axes = AXES[name.partition(".")[0]]
        shape = [-1 if each == axis else 1 for each in axes]
        return lambda x: torch.where(chosen[layer].view(shape), values[layer].to(x.dtype), x)

    return {name: edit(layer, name) for layer, name in enumerate(names)}


def one_by_one(
    f: Callable[[Selection], Float[Tensor, "..."]], chosen: Sequence[Tensor] | Tensor, chunk: int
) -> Float[Tensor, "s ..."]:
    """f of every selection, `chunk` of them side by side by `vmap`; one at a time with a chunk of 1."""
    check_count("chunk", chunk)
    rows = chosen if isinstance(chosen, Tensor) else torch.stack(list(chosen))
    with torch.no_grad():
        if chunk == 1:
            return torch.stack([f(each) for each in rows])
        return torch.cat([torch.func.vmap(f)(part) for part in rows.split(chunk)])


def every_place(num_layers: int, num_places: int, device: torch.device) -> Bool[Tensor, "s l p"]:
    """A selection of every single place, layer by layer."""
    num = num_layers * num_places
    return torch.eye(num, dtype=torch.bool, device=device).view(num, num_layers, num_places)
