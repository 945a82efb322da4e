"""Usable information by layer, and what of each layer follows from the one before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.result import Result, quantity
from ..core.tables import counted
from .held_out import (
    ONE_LABEL,
    check_probe,
    check_rows,
    folds_of,
    frequencies,
    notes_of,
    over_groups,
    ratio_over_groups,
    told,
)


class InformationProfile(Result):
    """Usable information of layers, and how much of each the one before it determines linearly: `information_profile`."""

    information: Float[Tensor, " l"] = quantity(
        "usable information", unit="nats", per="layer", stderr="information_stderr"
    )
    information_stderr: Float[Tensor, " l"]
    accuracy: Float[Tensor, " l"] = quantity("held-out accuracy", per="layer", stderr="accuracy_stderr")
    accuracy_stderr: Float[Tensor, " l"]
    reconstruction: Float[Tensor, " l"] = quantity(
        "held-out R² from the layer before", per="layer", stderr="reconstruction_stderr"
    )
    """nan for the first."""
    reconstruction_stderr: Float[Tensor, " l"]
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
    r"""Usable information layer by layer, and how well each layer follows linearly from the one before it, out of fold.

    $I_V(h_l; Y)$ of `usable_information`, and

    $$R^2_l = 1 - \frac{\sum_i \lVert h_l(i) - \hat h_l(i) \rVert^2}{\sum_i \lVert h_l(i) - \bar h_l \rVert^2}$$

    of ridge regressions from $h_{l-1}$ and of the mean, both of the other folds' rows. Usable information may rise with
    depth: a layer makes it easier to read, which is no contradiction to the data processing inequality.

    layers: by name, in order, values at the same rows. Errors are over groups; the rest, and what is raised, is as for
    `usable_information`, also where names have other numbers of rows.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(60, 2))
    >>> found = information_profile({"a": x, "b": 2 * x}, (x[:, 0] > 0).long(), key=fs.key(1))
    >>> round(float(found.reconstruction[1]), 3)
    1.0
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
    values = list(layers.values())
    pairs = [_reconstructed(a, b, groups, folds, key) for a, b in pairwise(values)]
    nothing = Estimate.of(torch.full((1,), math.nan))
    columns = (
        [over_groups(each.log_prob - frequency.log(), groups) for each in made],
        [over_groups(each.correct, groups) for each in made],
        [nothing, *pairs],
    )
    names = ("information", "accuracy", "reconstruction")
    vectors: dict[str, Any] = {}
    for name, each in zip(names, columns, strict=True):
        vectors[name] = torch.stack([estimate.value for estimate in each]).double()
        vectors[f"{name}_stderr"] = torch.stack([estimate.stderr for estimate in each]).double()
    return InformationProfile(
        **vectors,
        entropy=-float(frequency.log().mean()),
        names=list(layers),
        num_groups=len(groups.unique()),
        num_absent=sum(each.num_absent for each in made),
        num_unconverged=sum(each.num_unconverged for each in made),
        key=key,
    )


def _reconstructed(x: Tensor, y: Tensor, groups: Tensor, folds: int, key: Key) -> Estimate:
    """Held-out R²."""
    from sklearn.linear_model import RidgeCV

    a, b = (each.detach().cpu().double().numpy() for each in (x, y))
    rest, total = torch.empty(len(a), dtype=torch.float64), torch.empty(len(a), dtype=torch.float64)
    for train, test in folds_of(groups, folds, key):
        made = RidgeCV(np.logspace(-6, 6, 13)).fit(a[train], b[train]).predict(a[test])
        rest[test] = torch.from_numpy(((b[test] - made.reshape(b[test].shape)) ** 2).sum(1))
        total[test] = torch.from_numpy(((b[test] - b[train].mean(0)) ** 2).sum(1))
    unexplained = ratio_over_groups(rest, total, groups)
    return Estimate(1 - unexplained.value, unexplained.stderr, unexplained.num)
