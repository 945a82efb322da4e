"""How few units of a layer carry its activations: Hoyer's measure, Gini's coefficient, the share of active ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.checks import check_number
from ..core.estimate import wide
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from .overlap_moments import mean_abs_coordinate
from .sequence_sums import Ratios


def gini(x: Float[Tensor, "*m d"]) -> Float[Tensor, "*m"]:
    r"""Gini's coefficient of the magnitudes of d numbers: 0 where all are alike, (d - 1) / d where one alone is not 0.

    $$G = \frac{\sum_i (2 i - d - 1)\, |x|_{(i)}}{d \sum_i |x_i|},$$

    along the last dimension, magnitudes in ascending order. Independent normal numbers have
    $G \to \sqrt 2 - 1 \approx 0.414$: what is called concentrated must lie above that. nan where all are 0.

    Gini (1912); Hurley, Rickard (2009), arXiv:0811.4706.

    >>> gini(torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]]))
    tensor([0.0000, 0.7500], dtype=torch.float64)
    """
    size, num = x.to(wide(x.device)).abs().sort(-1).values, x.shape[-1]
    rank = torch.arange(1, num + 1, device=x.device).to(size)
    return ((2 * rank - num - 1) * size).sum(-1) / (num * size.sum(-1))


def hoyer(x: Float[Tensor, "*m d"]) -> Float[Tensor, "*m"]:
    r"""Hoyer's sparsity of d > 1 numbers: 0 where all magnitudes are alike, 1 where one alone is not 0.

    $$\frac{\sqrt d - \|x\|_1 / \|x\|_2}{\sqrt d - 1},$$

    along the last dimension. Independent normal numbers have $1 - \sqrt{2 / \pi} \approx 0.202$ for large d
    (`hoyer_reference`). nan where all are 0.

    Hoyer (2004), Journal of Machine Learning Research 5, 1457.

    Raises ValueError for a single number.

    >>> hoyer(torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 5.0]]))
    tensor([0., 1.], dtype=torch.float64)
    """
    if (num := x.shape[-1]) < 2:
        raise ValueError(f"`x` must have at least 2 numbers along its last dimension, got {num}.")
    x = x.to(wide(x.device))
    return (num**0.5 - x.abs().sum(-1) / x.norm(dim=-1)) / (num**0.5 - 1)


def gini_reference(num: int) -> float:
    r"""Gini's coefficient of d independent normal numbers: $(\sqrt 2 - 1)(d - 1) / d$, to first order in 1 / d.

    >>> round(gini_reference(1000), 3)
    0.414
    """
    return (2**0.5 - 1) * (num - 1) / num


def hoyer_reference(num: int) -> float:
    r"""The mean of Hoyer's sparsity over directions of d dimensions, which is that of independent normal numbers.

    $(\sqrt d - d\, \mathbb E |u_1|) / (\sqrt d - 1)$ with u uniform on the sphere; exact.

    >>> round(hoyer_reference(10**6), 3)
    0.202
    """
    return (num**0.5 - num * mean_abs_coordinate(num)) / (num**0.5 - 1)


class SparsitySums(NamedTuple):
    """Of one layer, over tokens and sequences; made by `sparsity_sums`, and additive."""

    ratios: Ratios
    """Hoyer, Gini, share of active units."""
    num_zero: int
    """Tokens whose activations are all 0."""
    num_units: int

    def merge(self, other: SparsitySums) -> SparsitySums:
        """Of the sequences of both."""
        return SparsitySums(self.ratios.merge(other.ratios), self.num_zero + other.num_zero, self.num_units)


class Sparsity(Result):
    """How sparse the activations of a token are, by layer: means over tokens."""

    hoyer: Float[Tensor, " l"] = quantity("Hoyer sparsity", per="layer", stderr="hoyer_stderr")
    hoyer_stderr: Float[Tensor, " l"]
    hoyer_reference: Float[Tensor, " l"] = quantity("Hoyer sparsity of a Gaussian vector", per="layer")
    gini: Float[Tensor, " l"] = quantity("Gini coefficient", per="layer", stderr="gini_stderr")
    gini_stderr: Float[Tensor, " l"]
    gini_reference: Float[Tensor, " l"] = quantity("Gini coefficient of a Gaussian vector", per="layer")
    active: Float[Tensor, " l"] = quantity("share of active units (L0 / d)", per="layer", stderr="active_stderr")
    active_stderr: Float[Tensor, " l"]
    num_zero: Int[Tensor, " l"] = quantity("tokens whose activations are all 0", per="layer")
    """Hoyer and Gini are not defined for these, and are means over the others."""
    num_tokens: int
    num_sequences: int
    tau: float
    layers: list[str] = internal()

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"layer": self.layers}

    @property
    def head(self) -> str:
        over = f"{counted(self.num_tokens, 'token')} of {counted(self.num_sequences, 'sequence')}"
        return f"sparsity of activations over {over} (active: |a| > {self.tau:g} rms of the token)"

    @property
    def notes(self) -> list[str]:
        made = ["There is one sequence, and no error over sequences."] if self.num_sequences < 2 else []
        if bool((self.num_zero > 0).any()):
            made.append("Hoyer and Gini are over the tokens with an activation that is not 0.")
        if not bool(self.active.isfinite().all()):
            made.append("Activations of a layer are not finite, and what is made of them undefined: check the weights.")
        return made


def sparsity_sums(values: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"], *, tau: float = 1e-2) -> SparsitySums:
    """The sums of a batch of one layer. mask: which positions hold a token.

    Raises ValueError for another shape of the mask, and for a single unit.

    >>> a = torch.tensor([[[1.0, 1.0], [0.0, 3.0]]])
    >>> sparsity_sums(a, torch.ones(1, 2, dtype=torch.bool)).ratios.value
    tensor([0.5000, 0.2500, 0.7500], dtype=torch.float64)
    """
    check_number("tau", tau, 0.0)
    if mask.shape != values.shape[:2]:
        raise ValueError(f"`mask` must have the shape {tuple(values.shape[:2])} of `values`, got {tuple(mask.shape)}.")
    a = torch.where(mask[..., None], values.to(wide(values.device)), 0.0)
    some = mask & (a != 0).any(-1)
    rms = a.square().mean(-1, keepdim=True).sqrt()
    active = ((a.abs() > tau * rms) & mask[..., None]).to(a).mean(-1)
    each = torch.stack([
        torch.where(some, hoyer(a), 0.0), torch.where(some, gini(a), 0.0),
        torch.where(a.isfinite().all(-1), active, math.nan),  # what is no number is not above any threshold
    ])  # fmt: skip
    counts = torch.stack([some, some, mask]).to(a)
    return SparsitySums(Ratios.of(each.sum(-1), counts.sum(-1)), int((mask & ~some).sum()), values.shape[-1])


def sparsity_of(sums: Mapping[str, SparsitySums], *, tau: float = 1e-2) -> Sparsity:
    """The result of the sums of every layer, by name. tau: what they were made with.

    Raises ValueError where there is no token.
    """
    layers = list(sums.values())
    if not layers or any(not bool(x.ratios.denominators[2] > 0) for x in layers):
        raise ValueError("there is no token: nothing can be said of its activations.")
    values, errors = (torch.stack([getattr(x.ratios, name).cpu() for x in layers]) for name in ("value", "stderr"))
    references = [
        torch.tensor([f(x.num_units) for x in layers], dtype=torch.float64) for f in (hoyer_reference, gini_reference)
    ]
    return Sparsity(
        hoyer=values[:, 0], hoyer_stderr=errors[:, 0], hoyer_reference=references[0],
        gini=values[:, 1], gini_stderr=errors[:, 1], gini_reference=references[1],
        active=values[:, 2], active_stderr=errors[:, 2], num_zero=torch.tensor([x.num_zero for x in layers]),
        num_tokens=int(layers[0].ratios.denominators[2]), num_sequences=int(layers[0].ratios.num[2]),
        tau=tau, layers=list(sums),
    )  # fmt: skip


def sparsity(layers: Mapping[str, Float[Tensor, "b t _"]], mask: Bool[Tensor, "b t"], *, tau: float = 1e-2) -> Sparsity:
    r"""How few units carry the activations of a token, for every layer: Hoyer, Gini, and L0 / d.

    Means over tokens of `hoyer`, `gini` and the share of units with $|a_j| > \tau \sqrt{\overline{a^2}}$ (the root mean
    square of that token), with errors over sequences, and what a vector of independent normal numbers has. A corpus streams
    by `sparsity_sums` of its batches, merged, and `sparsity_of`.

    layers: activations by name. mask: which positions hold a token. Raises ValueError as `sparsity_sums`.

    >>> from funcscope.core.keys import key, normal
    >>> found = sparsity({"a": normal(key(0), torch.zeros(2, 50, 400))}, torch.ones(2, 50, dtype=torch.bool))
    >>> round(float(found.gini), 2), round(float(found.hoyer), 2), round(float(found.active), 3)
    (0.41, 0.21, 0.992)
    """
    return sparsity_of({name: sparsity_sums(x, mask, tau=tau) for name, x in layers.items()}, tau=tau)
