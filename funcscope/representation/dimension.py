"""Intrinsic dimension from the two nearest neighbours of every point."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.checks import check_flag, check_number
from ..core.estimate import Estimate
from ..core.result import Result, internal, quantity
from ..core.tables import counted
from .nearest import LEAST, cloud, dimension_notes, nearest, overlap_stderr
from .sequences import check_layers, check_rows, sequence_index

ESTIMATORS = ("mle", "censored", "fit")


class TwoNN(Result):
    """The intrinsic dimension by TwoNN, in three ways that agree where the density is even and the dimension one."""

    mle: Estimate = quantity("dimension, all ratios")
    censored: Estimate = quantity("dimension, largest ratios censored")
    fit: Estimate = quantity("dimension, fit without the largest ratios")
    discard: float
    num_points: int
    num_duplicates: int
    within: bool
    """Whether neighbours may be of the same sequence."""

    @property
    def head(self) -> str:
        return f"intrinsic dimension of {counted(self.num_points, 'point')}"

    @property
    def notes(self) -> list[str]:
        num_rows = self.num_points + self.num_duplicates
        return dimension_notes(self.num_points, num_rows, self.mle.num, self.within, self.mle.value[None])


class LayerDimensions(Result):
    """The intrinsic dimension of each layer by TwoNN."""

    mle: Float[Tensor, " l"] = quantity("dimension, all ratios", per="layer", stderr="mle_stderr")
    mle_stderr: Float[Tensor, " l"]
    censored: Float[Tensor, " l"] = quantity(
        "dimension, largest ratios censored", per="layer", stderr="censored_stderr"
    )
    censored_stderr: Float[Tensor, " l"]
    fit: Float[Tensor, " l"] = quantity("dimension, fit without the largest ratios", per="layer", stderr="fit_stderr")
    fit_stderr: Float[Tensor, " l"]
    num_points: Float[Tensor, " l"] = quantity("distinct rows", per="layer")
    layers: tuple[str, ...]
    discard: float
    num_rows: int
    num_sequences: int = internal()
    within: bool

    @property
    def coords(self) -> dict[str, tuple[str, ...]]:
        return {"layer": self.layers}

    @property
    def head(self) -> str:
        return f"intrinsic dimensions of {counted(self.num_rows, 'token')} in {counted(self.num_sequences, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        return dimension_notes(self.num_points, self.num_rows, self.num_sequences, self.within, self.mle)


def two_nn(
    x: Float[Tensor, "n d"], groups: Tensor | None = None, *, discard: float = 0.1, within: bool = False
) -> TwoNN:
    r"""Intrinsic dimension by TwoNN: from the ratio of the distances to the second and the first neighbour of each point.

    Where the density is even over these, $\mu = r_2 / r_1$ has $P(\mu > r) = r^{-d}$ (proofs/two_nn.py). With N ratios:

    $$\hat d = \frac{N - 1}{\sum_i \log \mu_i}, \qquad
      \hat d_{\mathrm{cens}} = \frac{m - 1}{\sum_{i \le m} \log \mu_{(i)} + (N - m) \log \mu_{(m)}},$$

    the maximum of the likelihood but for the - 1, which makes its mean d for independent ratios; and that of the m smallest
    ratios, of which the N - m others are known to be larger: without that term (trimming) it would be too large. The fit is
    the slope through the origin of $-\log(1 - F)$ on $\log \mu$, F = i / N, without the largest share `discard`.

    x: rows; equal ones are left out but for one, and counted. groups: the sequence of each row; neighbours are rows of other
    sequences unless `within`: those beside each other on a path have the dimension of the path. The error is over
    sequences (`nearest.overlap_stderr`): about 1.2 to 1.4 d / sqrt N for independent points, since they share neighbours,
    and $d / \sqrt N$ would be too small. The 95 % interval held d for 92 to 94 % of 200 keys on a torus of 400 points;
    bodies with boundaries (a 5-cube gives 4.7) and curvature have a bias that it does not have.

    nan below 20 distinct points. In high dimensions N points resolve no dimension above about 2 log10 N: 1,000 Gaussian
    points in 1,000 dimensions give 175. `notes` says so.

    Raises ValueError where rows or groups are not as said, or `discard` is not from 0 to below 1.

    Facco et al. (2017), doi:10.1038/s41598-017-11873-y; Eckmann, Ruelle (1992), doi:10.1016/0167-2789(92)90023-G.

    >>> import torch, funcscope as fs
    >>> line = fs.normal(fs.key(0), torch.zeros(400, 1)) * torch.ones(100)
    >>> found = two_nn(line)
    >>> abs(float(found.mle.value) - 1) < 3 * float(found.mle.stderr)
    True
    """
    check_number("discard", discard, 0.0, 1.0)
    if discard == 1:
        raise ValueError("`discard` must be from 0 to below 1, got 1.")
    check_flag("within", within)
    rows = check_rows("x", x)
    points = cloud(rows, sequence_index(groups, rows), within)
    num = int(points.sequence.max()) + 1
    values = errors = rows.new_full((3,), math.nan)
    if len(points.x) >= LEAST:
        near = nearest(points, 2)
        values, moves = _estimates(near.distances, discard)
        errors = overlap_stderr(moves, points, near, 2)
    mle, censored, fit = (Estimate(value, error, num) for value, error in zip(values.cpu(), errors.cpu(), strict=True))
    return TwoNN(mle, censored, fit, discard, len(points.x), points.num_duplicates, within)


def layer_dimensions(
    layers: Mapping[str, Tensor], groups: Tensor | None = None, *, discard: float = 0.1, within: bool = False
) -> LayerDimensions:
    """`two_nn` of every layer. layers: by name, values (n, d) of the same n tokens.

    Raises ValueError as `two_nn`.

    >>> import torch, funcscope as fs
    >>> x = fs.normal(fs.key(0), torch.zeros(100, 2))
    >>> layer_dimensions({"0": x, "1": x[:, :1]}).mle.round()
    tensor([2., 1.], dtype=torch.float64)
    """
    rows = check_layers("layers", layers)
    made = [two_nn(x, groups, discard=discard, within=within) for x in rows.values()]
    like = next(iter(rows.values()))
    numbers: dict[str, Tensor] = {}
    for name in ESTIMATORS:
        each = [getattr(one, name) for one in made]
        numbers |= {name: torch.stack([x.value for x in each]), f"{name}_stderr": torch.stack([x.stderr for x in each])}
    num_points = torch.tensor([one.num_points for one in made], dtype=torch.float64)
    return LayerDimensions(
        **numbers, num_points=num_points, layers=tuple(rows), discard=discard, num_rows=len(like),
        num_sequences=int(sequence_index(groups, like).max()) + 1, within=within,
    )  # fmt: skip


def _estimates(distances: Float[Tensor, "n 2"], discard: float) -> tuple[Float[Tensor, "3"], Float[Tensor, "n 3"]]:
    """The three, and to first order by what each point moves them."""
    logs, order = (distances[:, 1] / distances[:, 0]).log().sort()
    num, few = len(logs), len(logs) - int(discard * len(logs))
    if not bool(distances.isfinite().all()) or not float(logs[few - 1]) > 0:
        return logs.new_full((3,), math.nan), logs.new_full((num, 3), math.nan)
    cut, observed = logs.clamp(max=logs[few - 1]), (torch.arange(num, device=logs.device) < few).to(logs)
    fit, by_fit = _fit(logs, min(few, num - 1))  # the last point is at infinity
    mle, censored = (num - 1) / logs.sum(), (few - 1) / cut.sum()
    moves = torch.stack([
        mle * (1 - mle * logs) / num, censored * (observed - censored * cut) / few, by_fit,
    ], 1)  # fmt: skip
    return torch.stack([mle, censored, fit]), torch.zeros_like(moves).index_copy(0, order, moves)


def _fit(logs: Float[Tensor, " n"], few: int) -> tuple[Float[Tensor, ""], Float[Tensor, " n"]]:
    """Slope through the origin, and what each ratio moves it by: by its own place, and by the share below all larger ones."""
    num = len(logs)
    below = torch.arange(1, num + 1, device=logs.device).to(logs) / num
    x, y = logs[:few], -torch.log1p(-below[:few])
    slope = (x @ y) / (x @ x)
    own = torch.nn.functional.pad(x * (y - slope * x), (0, num - few))
    raised = torch.nn.functional.pad(x / (1 - below[:few]), (0, num - few)).flip(0).cumsum(0).flip(0) / num
    return slope, (own + raised - raised.mean()) / (x @ x)
