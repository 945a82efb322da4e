"""How many points lie within a distance of a point: the dimension at every scale, and where it rises."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.checks import check_count
from ..core.keys import Key, check_key, fold_in, uniform
from ..core.result import Result, derived, internal, quantity
from ..core.tables import counted
from .sequences import check_rows, sequence_index


class VolumeGrowth(Result):
    """Counts of points around each centre by radius, and the slopes of their logarithms."""

    radii: Float[Tensor, "c r"] = quantity("radius", per=("centre", "radius"), shown=False)
    counts: Float[Tensor, "c r"] = quantity("points within the radius", per=("centre", "radius"), shown=False)
    slope_radii: Float[Tensor, "c s"] = quantity("radius of the slope", per=("centre", "scale"), shown=False)
    slopes: Float[Tensor, "c s"] = quantity(
        "local dimension", per=("centre", "scale"), stderr="slopes_stderr", shown=False
    )
    slopes_stderr: Float[Tensor, "c s"]
    """By the bootstrap over sequences; nan where resamples have no point within a radius."""
    increase: Float[Tensor, " c"] = quantity("largest rise of the local dimension", per="centre")
    """nan where no two slopes have an error. Noise alone makes one: see `increase_low`."""
    increase_low: Float[Tensor, " c"] = quantity("its lower end at 95 %, of all rises at once", per="centre")
    mean_slopes: Float[Tensor, " s"] = quantity("mean local dimension over centres", per="scale")
    num: int
    num_points: int
    num_groups: int
    key: Key
    centres: list[int] = internal()

    @derived("share of centres whose local dimension rises")
    def violations(self) -> float:
        """Where `increase_low` is above 0: about 1 in 20 do so by chance where no dimension rises."""
        known = self.increase_low[~self.increase_low.isnan()]
        return float((known > 0).double().mean()) if len(known) else math.nan

    @property
    def coords(self) -> dict[str, list[int]]:
        return {"centre": self.centres}

    @property
    def head(self) -> str:
        points = f"{counted(len(self.centres), 'point')} among {self.num_points:,}"
        return f"growth of volume around {points} of {counted(self.num_groups, 'sequence')}"

    @property
    def notes(self) -> list[str]:
        made = []
        if bool(self.slopes_stderr.isnan().any()):
            made.append(
                "Slopes without an error hang on the points of too few sequences: resamples leave no point within a radius."
            )
        return [*made, "The largest rise is the largest of noisy ones: its lower end says whether there is one."]


def volume_growth(
    x: Float[Tensor, "n d"], centres: Int[Tensor, " c"], *, key: Key, groups: Tensor | None = None,
    num_radii: int = 32, least: int = 10, window: int = 5, num: int = 200,
) -> VolumeGrowth:  # fmt: skip
    r"""The growth of the number of points within r of a point, and its local slope: the dimension at the scale r.

    $$V(r) = \#\{j \ne i : \|x_j - x_i\| \le r\}, \qquad \frac{d \log V}{d \log r},$$

    around each centre i, the point itself not counted. On a manifold with a smooth density the slope is constant for small r;
    for a fibre bundle it may fall from one scale to the next, but not rise: a rise contradicts both. The curve and its
    largest rise are here, $\max_{r < r'} (s(r') - s(r))$, and no p value of a trend test: slopes are made of cumulative
    counts, each of which holds the ones before.

    radii: `num_radii`, in equal ratios, from the distance of the `least`-th neighbour to that of the middle one. Slopes are
    least squares over `window` radii. Errors are by `num` resamples of sequences around the same centres. With $\hat\sigma$
    these errors of a rise, c the 95th percentile of the largest of $(\text{rise}^* - \text{rise}) / \hat\sigma$ over all
    pairs of scales, `increase_low` is the largest of $\text{rise} - c \hat\sigma$: it holds for all pairs at once, so that
    choosing the largest costs nothing. What is resampled is what is reported. Each centre has its own 5 %.

    x: points, repeated ones left out. centres: their rows. groups: which sequence each point is of (None: every one its own).

    Robinson, Dey, Chiang (2025), arXiv:2504.01002.

    Raises ValueError where rows or groups are not as said, for centres that are not there, repeated points around a
    centre, and fewer than 4 `least` points.

    >>> from funcscope.core.keys import key, uniform
    >>> square = uniform(key(0), torch.zeros(2000, 2, dtype=torch.float64))
    >>> middle = (square - 0.5).norm(dim=1).argmin()[None]
    >>> found = volume_growth(square, middle, key=key(1), num=50)
    >>> bool((found.slopes - 2).abs().mean() < 0.3), bool(found.increase_low < 0)
    (True, True)
    """
    check_key(key)
    for name, value, at_least in (
        ("num_radii", num_radii, 3), ("least", least, 2), ("window", window, 2), ("num", num, 20)
    ):  # fmt: skip
        check_count(name, value, at_least)
    if window >= num_radii:
        raise ValueError(f"`window` must be below `num_radii`, {num_radii}, got {window}.")
    x = check_rows("x", x).cpu().double()
    if len(x) < 4 * least:
        raise ValueError(f"`x` must have at least {4 * least} points, four times `least`, got {len(x)}.")
    if len(centres) == 0 or not 0 <= int(centres.min()) <= int(centres.max()) < len(x):
        raise ValueError(f"`centres` must be rows of `x`, 0 to {len(x) - 1}, got {centres.tolist()}.")
    group = sequence_index(groups, x)
    weights = _resampled(int(group.max()) + 1, key, num)
    rows = [_around(x, int(i), group, weights, num_radii, least, window) for i in centres]
    radii, counts, at, slopes, errors, rise, low = (torch.stack(each) for each in zip(*rows, strict=True))
    return VolumeGrowth(
        radii=radii, counts=counts, slope_radii=at, slopes=slopes, slopes_stderr=errors, increase=rise, increase_low=low,
        mean_slopes=slopes.mean(0), num=num, num_points=len(x), num_groups=weights.shape[1], key=key,
        centres=centres.tolist(),
    )  # fmt: skip


def _around(
    x: Float[Tensor, "n d"], centre: int, group: Int[Tensor, " n"], weights: Float[Tensor, "b g"], num_radii: int,
    least: int, window: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Radii, counts, radii of slopes, slopes, their errors, the largest rise and its lower end."""
    others = torch.arange(len(x)) != centre
    distance = (x[others] - x[centre]).norm(dim=1)
    ordered = distance.sort().values
    if ordered[0] == 0:
        raise ValueError(f"point {centre} of `x` is there twice: leave out repeated points.")
    first, last = ordered[least - 1].log(), ordered[len(ordered) // 2].log()
    radii = torch.linspace(0, 1, num_radii, dtype=x.dtype).mul(last - first).add(first).exp()
    radii = torch.cat([ordered[least - 1 : least], radii[1:]])  # the least-th neighbour itself counts
    cell = group[others] * (num_radii + 1) + torch.searchsorted(radii, distance)
    num_groups = weights.shape[1]
    by_group = torch.bincount(cell, minlength=num_groups * (num_radii + 1)).view(num_groups, -1)[:, :-1].cumsum(1)
    counts = by_group.sum(0).double()
    slopes, resampled = _slopes(counts, radii, window), _slopes(weights @ by_group.double(), radii, window)
    rise, low = _largest_rise(slopes, resampled)
    at = radii.log().unfold(0, window, 1).mean(1).exp()
    return radii, counts, at, slopes, resampled.std(0), rise, low


def _slopes(counts: Float[Tensor, "*b r"], radii: Float[Tensor, " r"], window: int) -> Float[Tensor, "*b s"]:
    """Least squares of log counts on log radii; nan where a count of the window is 0."""
    y, x = counts.log().unfold(-1, window, 1), radii.log().unfold(0, window, 1)
    beside = x - x.mean(-1, keepdim=True)
    made = (y * beside).sum(-1) / beside.square().sum(-1)
    return torch.where(made.isfinite(), made, math.nan)


def _largest_rise(slopes: Float[Tensor, " s"], resampled: Float[Tensor, "b s"]) -> tuple[Tensor, Tensor]:
    """Over all pairs of scales with errors, and its lower end by the largest standardised deviation of all pairs."""
    known = (~resampled.isnan().any(0)).nonzero()[:, 0]
    if len(known) < 2:
        nan = slopes.new_tensor(math.nan)
        return nan, nan
    i, j = torch.triu_indices(len(known), len(known), 1)
    rises, again = (y[..., known[j]] - y[..., known[i]] for y in (slopes, resampled))
    error = again.std(0).clamp_min(1e-12)
    worst = ((again - rises) / error).amax(1).quantile(0.95)
    return rises.max(), (rises - worst * error).max()


def _resampled(num_groups: int, key: Key, num: int) -> Float[Tensor, "b g"]:
    """How often each sequence is drawn, in every resample."""
    like = torch.zeros(num_groups, dtype=torch.float64)
    drawn = ((uniform(fold_in(key, i), like) * num_groups).long() for i in range(num))
    return torch.stack([torch.bincount(each, minlength=num_groups) for each in drawn]).double()
