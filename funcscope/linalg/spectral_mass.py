"""The share of a spectrum that lies between two values, and what a quadrature of few nodes leaves open in it."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.estimate import Estimate

CHECK = 2
"""Products that look whether a matrix is symmetric."""
TINY = 1e-10
"""A weight that a new copy of a node may have."""


class SpectralMass(Estimate):
    """A share of the eigenvalues: that of the quadratures' nodes, its error over probes, and the bracket of the steps.

    The share of the same probes in the whole spectrum is from `low` to `high`; `stderr`, what is left to chance in the
    probes, comes beside that. Where the bracket is wide, `value` says little, and its error nothing about that.
    """

    low: float
    """The mean over probes of the least share that agrees with their quadratures."""
    high: float
    """Of the largest."""
    resolved: bool
    """No end of the bracket is further from `value` than twice the standard error, or 0.01."""
    steps: int
    """Steps that it would take, if the bracket narrows as 1 / steps; those taken, where it is resolved."""

    @property
    def unresolved(self) -> list[str]:
        return [] if self.resolved else ["value"]

    def __str__(self) -> str:
        bracket = f"{self.low:.3g} to {self.high:.3g}"
        if self.resolved:
            return f"{super().__str__()}, the steps leave {bracket}"
        return f"{bracket}, not resolved: some {self.steps:,} steps would be needed"

    def named(self, name: str) -> dict[str, float]:
        return super().named(name) | {f"{name}_low": self.low, f"{name}_high": self.high}


def bracket(
    nodes: Float[Tensor, "n m"], weights: Float[Tensor, "n m"], at: float, near: float, exact: Bool[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    r"""The least and the largest part of each probe's spectrum that can lie below `at`; nodes ascending.

    Below the node $\theta_j$ of a Gauss quadrature lies at least $w_1 + \dots + w_{j-1}$, and up to it at most
    $w_1 + \dots + w_j$, of every distribution with these moments (Chebyshev, Markov, Stieltjes; Akhiezer 1965, The Classical
    Moment Problem): between two nodes the weights of both are open. Where the quadrature is `exact` none is.
    Without reorthogonalisation it is that of a matrix whose eigenvalues are those of A, each many times within rounding
    (Greenbaum 1989): what is within `near` of `at` counts for neither bound.

    >>> nodes, weights = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    >>> [float(x) for x in bracket(nodes, weights, 1.5, 0.01, torch.tensor([False]))]
    [0.25, 1.0]
    """
    if math.isinf(at):
        whole = weights.sum(1) * (at > 0)
        return whole, whole
    sums, open_ = torch.nn.functional.pad(weights.cumsum(1), (1, 0)), (~exact).long()
    least = (nodes < at - near).sum(1) - open_
    most = (nodes < at + near).sum(1) + open_
    at_least, at_most = least.clamp_min(0)[:, None], most.clamp_max(nodes.shape[1])[:, None]
    return sums.gather(1, at_least)[:, 0], sums.gather(1, at_most)[:, 0]


def ends(
    nodes: Float[Tensor, "n m"], weights: Float[Tensor, "n m"], edge: float, taken: int, steps: int, num_parameters: int
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n m"], Bool[Tensor, " n"]]:
    """Nodes and weights, those last that only fill a row; and which probes are exact, at the end of their Krylov space.

    A node that looks like a filling one may be a copy, which recurrences without reorthogonalisation make: then more products
    were `taken`. Where one has next to no weight, or a neighbour within `edge`, there are copies, too.
    """
    fills = (nodes == nodes[:, :1]) & (weights == 0)
    fills[:, 0] = False
    known = taken - int((~fills).sum()) in (0, CHECK)
    nodes, order = nodes.masked_fill(fills & known, math.inf).sort(dim=1, stable=True)
    weights, num = weights.gather(1, order), (~fills).sum(1)
    copies = (nodes.diff() <= edge) | (weights[:, 1:] < TINY) & nodes[:, 1:].isfinite()
    ended = (num < steps) | (num == num_parameters)
    return nodes, weights, ended & ~copies.any(1) & known
