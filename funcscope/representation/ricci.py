"""Ollivier-Ricci curvature: whether the neighbours of two neighbours are nearer to each other than these are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.checks import check_count, check_number
from ..core.keys import Key, check_key, uniform
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .sequences import check_rows, sequence_index


class RicciCurvature(Result):
    """Curvatures of edges between near points, and their mean."""

    mean: Float[Tensor, ""] = quantity("mean curvature", stderr="mean_stderr")
    mean_stderr: Float[Tensor, ""]
    """Over sequences, as the ends of edges; the points beside these are taken as they are."""
    curvature: Float[Tensor, " e"] = quantity("curvature", per="edge", shown=False)
    length: Float[Tensor, " e"] = quantity("length", per="edge", shown=False)
    ends: Int[Tensor, "e 2"] = internal()
    k: int
    alpha: float
    num_points: int
    num_groups: int
    num_edges: int
    """Of the whole graph."""
    key: Key | None

    @derived("standard deviation of the curvature")
    def spread(self) -> Float[Tensor, ""]:
        return self.curvature.std() if len(self.curvature) > 1 else self.curvature.sum() * math.nan

    @derived("share of edges with a negative curvature")
    def negative(self) -> float:
        return float((self.curvature < -1e-9).double().mean())

    @property
    def head(self) -> str:
        return (
            f"Ollivier-Ricci curvature of {counted(len(self.curvature), 'edge')} out of {self.num_edges:,} between "
            f"{counted(self.k, 'nearest neighbour')} of {counted(self.num_points, 'point')}"
        )

    @property
    def notes(self) -> list[str]:
        made = [
            "Curvature is of the points with these distances and neighbours: it changes with their number and with k."
        ]
        if bool(self.mean_stderr.isnan()):
            made.append("The edges are of too few sequences for an error.")
        return made


def wasserstein_1(a: Float[Tensor, " n"], b: Float[Tensor, " m"], cost: Float[Tensor, "n m"]) -> float:
    r"""The exact cost of moving the masses a to the masses b: $\min_\pi \langle \pi, C \rangle$, by linear programming.

    $\pi \ge 0$ with the sums a along rows and b along columns. No entropy is added, and nothing has to converge.

    Raises ValueError for masses that do not add up to the same, are negative or not finite, and for another shape of `cost`.

    >>> wasserstein_1(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.75]), torch.tensor([[0.0, 2.0], [2.0, 0.0]]))
    1.5
    """
    from scipy.optimize import linprog

    rows, columns, costs = (each.double().cpu().numpy() for each in (a, b, cost))
    if costs.shape != (len(rows), len(columns)) or not np.isfinite(costs).all():
        got = "nan or infinite entries" if costs.shape == (len(rows), len(columns)) else f"the shape {costs.shape}"
        raise ValueError(f"`cost` must be a finite matrix of {len(rows)} by {len(columns)}, got {got}.")
    if not (np.isfinite(rows).all() and np.isfinite(columns).all()):
        raise ValueError("`a` and `b` must be finite masses, got nan or infinite ones.")
    if rows.min() < 0 or columns.min() < 0 or abs(rows.sum() - columns.sum()) > 1e-9 * rows.sum():
        raise ValueError(f"`a` and `b` must be masses of one sum, got {rows.sum():g} and {columns.sum():g}.")
    n, m = costs.shape
    sums = np.concatenate([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    scale = float(costs.max()) or 1.0  # the solver's tolerances are absolute
    found = linprog(costs.ravel() / scale, A_eq=sums[:-1], b_eq=np.concatenate([rows, columns])[:-1], method="highs")
    if found.status != 0:
        raise RuntimeError(f"the linear program of a transport was not solved: {found.message}")
    return float(found.fun) * scale


def ollivier_ricci(
    x: Float[Tensor, "n d"], *, k: int = 5, alpha: float = 0.5, groups: Tensor | None = None,
    num: int | None = None, key: Key | None = None,
) -> RicciCurvature:  # fmt: skip
    r"""Ollivier-Ricci curvature of the edges between nearest neighbours of a cloud of points, with Euclidean distances.

    $$\kappa(x, y) = 1 - \frac{W_1(\mu_x, \mu_y)}{\|x - y\|}, \qquad
      \mu_x = \alpha\, \delta_x + (1 - \alpha)\, \mathrm{uniform}(\mathrm{kNN}(x)),$$

    for every pair of which one is among the k nearest of the other, with the exact optimal transport $W_1$ on at most 2 k + 2
    points. Above 0 the neighbours of x and y are nearer to each other than x and y; 0 is flat, below 0 they lie apart, as in
    a tree. 1 would mean that both have one measure.

    num, key: a random sample of so many edges (None: all of them). groups: which sequence each point is of (None: every one
    its own). With r the residuals of the curvatures, the error counts every pair of edges that share a sequence,
    $\mathrm{SE}^2 = \sum_{e \sim e'} r_e r_{e'} / E^2$: edges share their ends, and sd / sqrt(E) would take them as
    independent. It takes the neighbours around an edge as given.

    Ollivier (2009), doi:10.1016/j.jfa.2008.11.001; Aronow, Samii, Assenova (2015), doi:10.1093/pan/mpv018 (the error).

    Raises ValueError where rows or groups are not as said, for repeated points, for k that is not below the number
    of points, for alpha outside 0 to 1, and for one of `num` and `key` alone.

    >>> angle = torch.arange(12.0, dtype=torch.float64) * (2 * torch.pi / 12)
    >>> circle = torch.stack([angle.cos(), angle.sin()], 1)
    >>> found = ollivier_ricci(circle, k=2)                       # (1 - 1/2) (1 - cos 30 degrees): chords cut the bend short
    >>> round(float(found.mean), 6), round((1 - 3**0.5 / 2) / 2, 6)
    (0.066987, 0.066987)
    """
    check_count("k", k)
    check_number("alpha", alpha, 0.0, 1.0)
    if (num is None) != (key is None):
        raise ValueError("`num` and `key` go together: both for a sample of edges, neither for all.")
    x = check_rows("x", x).cpu().double()
    if k >= len(x):
        raise ValueError(f"`k` must be below the number of points, {len(x)}, got {k}.")
    group = sequence_index(groups, x)
    near = _nearest(x, k)
    edges = torch.stack([torch.arange(len(x)).repeat_interleave(k), near.flatten()], 1).sort(1).values.unique(dim=0)
    chosen = edges
    if num is not None and key is not None:
        check_count("num", num)
        check_key(key)
        chosen = edges[uniform(key, torch.zeros(len(edges), dtype=torch.float64)).argsort()[:num].sort().values]
    mass = torch.cat([torch.tensor([alpha]), torch.full((k,), (1 - alpha) / k)]).double()
    curvatures, lengths = [], []
    for i, j in chosen.tolist():
        one, two = (torch.cat([torch.tensor([at]), near[at]]) for at in (i, j))
        cost = (x[one][:, None] - x[two]).norm(dim=-1)
        lengths.append(float(cost[0, 0]))
        curvatures.append(1 - wasserstein_1(mass, mass, cost) / lengths[-1])
    curvature = torch.tensor(curvatures, dtype=torch.float64)
    return RicciCurvature(
        curvature.mean(), _dyadic_stderr(curvature, group[chosen]), curvature,
        torch.tensor(lengths, dtype=torch.float64), chosen, k, alpha, len(x), int(group.max()) + 1, len(edges), key,
    )  # fmt: skip


def graph_ricci(
    adjacency: Bool[Tensor, "n n"], *, alpha: float = 0.5, edges: Int[Tensor, "e 2"] | None = None
) -> Float[Tensor, " e"]:
    r"""Ollivier-Ricci curvature of the edges of a graph, with the number of steps for distance.

    As in `ollivier_ricci`, with $\mu_x$ on all neighbours of x and d = 1 along an edge. For $\alpha \ge 1 / (1 + \max(d_x,
    d_y))$ it is $(1 - \alpha)$ times Lin, Lu and Yau's: n / (n - 1) for the complete graph of n, 2 / n for the cube of n
    dimensions, 0 for a grid and a long circle, and $2 / d_x + 2 / d_y - 2$ for a tree. No sample, and no error.

    edges: those that are asked for (None: all, as `adjacency.triu().nonzero()`).

    Lin, Lu, Yau (2011), doi:10.2748/tmj/1325886283.

    Raises ValueError for a graph that is not symmetric or has loops, and for what is no edge.

    >>> [round(x, 6) for x in graph_ricci(~torch.eye(3, dtype=torch.bool)).tolist()]        # (1 - 1/2) 3/2
    [0.75, 0.75, 0.75]
    """
    from scipy.sparse.csgraph import shortest_path

    check_number("alpha", alpha, 0.0, 1.0)
    if (
        adjacency.shape[0] != adjacency.shape[1]
        or not torch.equal(adjacency, adjacency.T)
        or adjacency.diagonal().any()
    ):
        raise ValueError("`adjacency` must be a symmetric matrix without loops: `adjacency | adjacency.T`.")
    edges = adjacency.triu().nonzero() if edges is None else edges
    if not bool(adjacency[edges[:, 0], edges[:, 1]].all()):
        raise ValueError("`edges` must be pairs of neighbours in `adjacency`.")
    distance = torch.from_numpy(shortest_path(adjacency.cpu().numpy().astype(float), unweighted=True))
    made = []
    for i, j in edges.tolist():
        (one, mass), (two, other) = (_measure(adjacency, at, alpha) for at in (i, j))
        made.append(1 - wasserstein_1(mass, other, distance[one][:, two]))
    return torch.tensor(made, dtype=torch.float64)


def _measure(adjacency: Bool[Tensor, "n n"], at: int, alpha: float) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    near = adjacency[at].nonzero()[:, 0].cpu()
    rest = torch.full((len(near),), (1 - alpha) / len(near), dtype=torch.float64)
    return torch.cat([torch.tensor([at]), near]), torch.cat([torch.tensor([alpha], dtype=torch.float64), rest])


def _nearest(x: Float[Tensor, "n d"], k: int) -> Int[Tensor, "n k"]:
    """The k nearest others of every point."""
    from scipy.spatial import cKDTree

    tree: Any = cKDTree(x.numpy())
    distance, index = tree.query(x.numpy(), k + 1)
    if bool((distance[:, 1] == 0).any()):
        raise ValueError("`x` has a point twice, between which there is no direction: leave out repeated points.")
    return torch.from_numpy(index[:, 1:]).long()


def _dyadic_stderr(values: Float[Tensor, " e"], groups: Int[Tensor, "e 2"]) -> Float[Tensor, ""]:
    """Of the mean, where two values go together that have one of their groups in common; nan below three groups."""
    nan, num_groups = values.new_tensor(math.nan), len(groups.unique())
    if num_groups < 3:
        return nan
    rest, size = values - values.mean(), int(groups.max()) + 1
    within = groups[:, 0] == groups[:, 1]
    of_group = torch.zeros(size, dtype=values.dtype).index_add(0, groups[:, 0], rest)
    of_group = of_group.index_add(0, groups[~within, 1], rest[~within])
    pairs = groups[~within].sort(1).values
    _, pair = (pairs[:, 0] * size + pairs[:, 1]).unique(return_inverse=True)
    of_pair = torch.zeros(len(pairs), dtype=values.dtype).index_add(0, pair, rest[~within])
    variance = of_group.square().sum() - of_pair.square().sum()  # a pair of edges with both ends in common counts once
    return (num_groups / (num_groups - 1) * variance).sqrt() / len(values) if variance >= 0 else nan
