"""Usable information by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.keys import Key
from ..core.result import Result, quantity
from ..core.tables import counted
from .held_out import (
    ONE_LABEL,
    check_probe,
    check_rows,
    frequencies,
    notes_of,
    over_groups,
    told,
)


class InformationProfile(Result):
    """Usable information of layers; made by `information_profile`."""

    information: Float[Tensor, " l"] = quantity(
        "usable information", unit="nats", per="layer", stderr="information_stderr"
    )
    information_stderr: Float[Tensor, " l"]
    accuracy: Float[Tensor, " l"] = quantity("held-out accuracy", per="layer", stderr="accuracy_stderr")
    accuracy_stderr: Float[Tensor, " l"]
    entropy: float = quantity("entropy of the labels", unit="nats")
    names: list[str]
    num_groups: int
    num_absent: int
    num_unconverged: int
    key: Key

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"layer": self.names}

    @property
    def head(self) -> str:
        return f"usable information by layer over {counted(self.num_groups, 'group')}"

    @property
    def notes(self) -> list[str]:
        if self.entropy == 0:
            return [ONE_LABEL]
        return ["Layers are of the same rows: neither sums nor ratios of these bounds over layers mean anything.",
                *notes_of(self.num_absent, self.num_unconverged)]  # fmt: skip


def information_profile(
    layers: Mapping[str, Float[Tensor, "n _"]],
    labels: Int[Tensor, "..."],
    *,
    key: Key,
    groups: Int[Tensor, "..."] | None = None,
    folds: int = 5,
    pca: int | None = None,
    regularisation: float = 1.0,
) -> InformationProfile:
    r"""Usable information layer by layer: $I_V(h_l; Y)$ of `usable_information`, out of fold.

    It may rise with depth: a layer makes it easier to read, which is no contradiction to the data processing inequality.

    layers: by name, in order, values at the same rows. Errors are over groups; the rest, and what is raised, is as for
    `usable_information`, also where names have other numbers of rows.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(60, 2))
    >>> found = information_profile({"a": x, "b": 2 * x}, (x[:, 0] > 0).long(), key=fs.key(1))
    >>> found.names, bool(found.information[0] > 0)
    (['a', 'b'], True)
    """
    if not layers:
        raise ValueError("`layers` must hold a layer at least: a mapping from names to rows.")
    for name, x in layers.items():
        groups = check_rows(x, labels, groups, folds, key, f"layers[{name!r}]")
        check_probe(x, pca, regularisation)
    assert groups is not None
    made = [
        told(x, labels, groups, key=key, folds=folds, pca=pca, regularisation=regularisation) for x in layers.values()
    ]
    frequency = frequencies(labels)
    columns = (
        [over_groups(each.log_prob - frequency.log(), groups) for each in made],
        [over_groups(each.correct, groups) for each in made],
    )
    names = ("information", "accuracy")
    vectors: dict[str, Any] = {}
    for name, each in zip(names, columns, strict=True):
        vectors[name] = torch.stack([estimate.value for estimate in each]).double()
        vectors[f"{name}_stderr"] = torch.stack([estimate.stderr for estimate in each]).double()
    return InformationProfile(
        **vectors,
        entropy=abs(float(frequency.log().mean())),
        names=list(layers),
        num_groups=len(groups.unique()),
        num_absent=sum(each.num_absent for each in made),
        num_unconverged=sum(each.num_unconverged for each in made),
        key=key,
    )
