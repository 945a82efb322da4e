"""Intrinsic dimension at several scales: from farther neighbours, and from the covariance of neighbourhoods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_count, check_flag
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from .nearest import LEAST, Cloud, Nearest, cloud, dimension_notes, nearest, overlap_stderr
from .sequences import check_rows, sequence_index
from .similarity import check_share


class DimensionByScale(Result):
    """The intrinsic dimension by how far neighbours reach: a dimension of the set is one that does not change with it."""

    dimension: Float[Tensor, " s"] = quantity("dimension", per="neighbours", stderr="dimension_stderr")
    dimension_stderr: Float[Tensor, " s"]
    distance: Float[Tensor, " s"] = quantity("mean distance to the farthest neighbour", per="neighbours")
    neighbours: tuple[int, ...]
    method: str
    num_points: int
    num_duplicates: int
    num_sequences: int = internal()
    within: bool
    """Whether neighbours may be of the same sequence."""

    @property
    def coords(self) -> dict[str, tuple[int, ...]]:
        return {"neighbours": self.neighbours}

    @property
    def head(self) -> str:
        return f"intrinsic dimension of {counted(self.num_points, 'point')} by {self.method}"

    @property
    def notes(self) -> list[str]:
        num_rows = self.num_points + self.num_duplicates
        return dimension_notes(self.num_points, num_rows, self.num_sequences, self.within, self.dimension)


def gride(
    x: Float[Tensor, "n d"], groups: Tensor | None = None, *, neighbours: Sequence[int] = (2, 4, 8, 16, 32, 64),
    within: bool = False,
) -> DimensionByScale:  # fmt: skip
    r"""Intrinsic dimension by Gride: from the ratio of the distances to neighbours n2 = 2 n1 and n1, at growing scales.

    Where the density is even over these, $\mu = r_{n_2} / r_{n_1}$ has the density

    $$f(\mu) = \frac{d\, (\mu^d - 1)^{n_2 - n_1 - 1}}{B(n_2 - n_1, n_1)\, \mu^{d (n_2 - 1) + 1}},$$

    and $\hat d$ is its maximum of the likelihood over all points: `two_nn`, but for its factor (N - 1) / N, at n2 = 2.

    neighbours: n2 of each scale, even. Other arguments, errors and limits as of `two_nn`. Noise makes small scales
    high-dimensional, and curvature and boundaries bias large ones, which have small errors: of 200 keys on a torus of 1,000
    points the 95 % interval held the dimension for 95 % at n2 = 2, 4, 8 and for 89 % at 16.

    Raises ValueError as `two_nn`, and where a number of neighbours is odd. nan where there are not so many neighbours.

    Denti et al. (2022), doi:10.1038/s41598-022-20991-1.

    >>> import torch, funcscope as fs
    >>> gride(fs.normal(fs.key(0), torch.zeros(400, 2)), neighbours=[4, 8]).dimension.round()
    tensor([2., 2.], dtype=torch.float64)
    """
    neighbours = check_even(neighbours)
    return _by_scale("Gride", x, groups, neighbours, within, lambda _, near, n: _gride_mle(near.distances, n))


def levina_bickel(
    x: Float[Tensor, "n d"], groups: Tensor | None = None, *, neighbours: Sequence[int] = (5, 10, 20),
    within: bool = False,
) -> DimensionByScale:  # fmt: skip
    r"""Intrinsic dimension by Levina and Bickel, with inverse dimensions averaged over points as MacKay and Ghahramani do.

    $$\hat d_k = \frac{N (k - 1) - 1}{\sum_i \sum_{j < k} \log (r_k(i) / r_j(i))}:$$

    the maximum of the likelihood of all points together but for the - 1, which makes its mean d for independent terms, and
    `two_nn` at k = 2. The mean of the points' own estimates, (k - 1) / (k - 2) times too large, is not taken.

    neighbours: k of each scale. Other arguments, errors and limits as of `two_nn`.

    Raises ValueError as `two_nn`. nan where there are not so many neighbours.

    Levina, Bickel (2004), NeurIPS 17; MacKay, Ghahramani (2005), Comments on it.

    >>> import torch, funcscope as fs
    >>> levina_bickel(fs.normal(fs.key(0), torch.zeros(400, 2)), neighbours=[10]).dimension.round()
    tensor([2.], dtype=torch.float64)
    """

    def pooled(_: Cloud, near: Nearest, k: int) -> tuple[Tensor, Tensor]:
        r, num = near.distances, len(near.distances)
        logs = (r[:, k - 1 : k] / r[:, : k - 1]).log().sum(1)
        dimension = (num * (k - 1) - 1) / logs.sum()
        return dimension, dimension * (1 - dimension * logs / (k - 1)) / num

    return _by_scale("Levina-Bickel", x, groups, _checked(neighbours), within, pooled)


def local_pca(
    x: Float[Tensor, "n d"], groups: Tensor | None = None, *, neighbours: Sequence[int] = (10, 20, 40),
    variance: float = 0.95, within: bool = False,
) -> DimensionByScale:  # fmt: skip
    r"""Local dimension by principal components: how many hold `variance` of each point's neighbourhood, on average.

    The neighbourhood is the k nearest points, centred on their mean. It is at most k - 1, so that k must be well above the
    dimension; noise counts as dimensions, and curvature does at large k.

    Arguments and errors as of `two_nn`.

    Raises ValueError as `two_nn`. nan where there are not so many neighbours.

    Fukunaga, Olsen (1971), doi:10.1109/T-C.1971.223208.

    >>> import torch, funcscope as fs
    >>> plane = fs.normal(fs.key(0), torch.zeros(100, 2)) @ fs.normal(fs.key(1), torch.zeros(2, 9))
    >>> local_pca(plane, neighbours=[10], variance=1.0).dimension
    tensor([2.], dtype=torch.float64)
    """
    check_share("variance", variance)

    def mean(points: Cloud, near: Nearest, k: int) -> tuple[Tensor, Tensor]:
        counts = _components(points, near, k, variance)
        return counts.mean(), counts / len(counts)

    return _by_scale("local PCA", x, groups, _checked(neighbours), within, mean)


def _by_scale(
    method: str, x: Tensor, groups: Tensor | None, neighbours: tuple[int, ...], within: bool,
    estimate: Callable[[Cloud, Nearest, int], tuple[Tensor, Tensor]],
) -> DimensionByScale:  # fmt: skip
    """estimate: from points, their neighbours and how many of these, the dimension and what each point moves it by."""
    check_flag("within", within)
    rows = check_rows("x", x)
    points = cloud(rows, sequence_index(groups, rows), within)
    near = nearest(points, max(neighbours))
    values = torch.full((2, len(neighbours)), math.nan, dtype=torch.float64)
    for i, k in enumerate(neighbours if len(points.x) >= LEAST else ()):
        if bool(near.distances[:, k - 1].isfinite().all()):
            dimension, moves = estimate(points, near, k)
            values[:, i] = torch.stack([dimension, overlap_stderr(moves, points, near, k)]).cpu()
    return _result(method, points, near, neighbours, values)


def _result(
    method: str, points: Cloud, near: Nearest, neighbours: tuple[int, ...], values: Float[Tensor, "2 s"]
) -> DimensionByScale:
    farthest = torch.stack([near.distances[:, n - 1].mean() for n in neighbours])
    dimension, stderr = values
    return DimensionByScale(
        dimension, stderr, farthest.where(farthest.isfinite(), torch.nan).cpu(), neighbours, method, len(points.x),
        points.num_duplicates, int(points.sequence.max()) + 1, points.within,
    )  # fmt: skip


def _gride_mle(distances: Float[Tensor, "n m"], num: int) -> tuple[Tensor, Tensor]:
    """The root of the likelihood's slope, which falls, by bisection between bounds; and slopes over the curvature there."""
    half = num // 2
    logs = (distances[:, num - 1] / distances[:, half - 1]).log()
    total, one = logs.sum(), torch.ones_like(logs)
    if not total > 0:
        return total.new_tensor(math.nan), torch.full_like(logs, math.nan)

    def slopes(d: Tensor) -> Tensor:
        terms = torch.where(logs > 0, logs / -torch.expm1(-d * logs.where(logs > 0, one)), 1 / d)
        return 1 / d + (half - 1) * terms - (num - 1) * logs

    high = len(logs) / total  # each of the terms lies between log mu and log mu + 1 / d
    low = high / half
    while float(high / low) > 1 + 1e-13:
        middle = (low * high).sqrt()
        if middle in (low, high):
            break
        low, high = (middle, high) if slopes(middle).sum() > 0 else (low, middle)
    root = (low * high).sqrt()
    fall = (slopes(root * (1 - 1e-5)) - slopes(root * (1 + 1e-5))).sum() / (2e-5 * root)
    return root, slopes(root) / fall


def _components(points: Cloud, near: Nearest, k: int, variance: float) -> Float[Tensor, " n"]:
    """Of every neighbourhood, from the inner products of its points."""
    counts = []
    for part in near.indices[:, :k].split(max(1, 2**22 // (k * points.x.shape[1]))):
        around = points.x[part]
        around = around - around.mean(1, keepdim=True)
        values = torch.linalg.eigvalsh(around @ around.transpose(1, 2)).flip(1).clamp_min(0)
        before = values.cumsum(1) - values
        counts.append((before < variance * values.sum(1, keepdim=True) * (1 - 1e-12)).sum(1).to(values))
    return torch.cat(counts)


def check_even(neighbours: Sequence[int]) -> tuple[int, ...]:
    """Numbers of neighbours for `gride`. Raises ValueError for others."""
    neighbours = _checked(neighbours)
    if odd := [n for n in neighbours if n % 2]:
        raise ValueError(f"`neighbours` must be even, twice the nearer neighbour, got {odd[0]}.")
    return neighbours


def _checked(neighbours: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(neighbours, Sequence) or isinstance(neighbours, str) or not neighbours:
        raise ValueError(f"`neighbours` must have numbers of neighbours in a list, one at least, got {neighbours!r}.")
    for each in neighbours:
        check_count("neighbours", each, 2)
    return tuple(neighbours)
