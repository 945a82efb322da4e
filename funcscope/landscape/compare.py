"""Two models along the same random directions: paired differences with intervals, a signed-rank test, effect sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from ..core.estimate import Crossed, Estimate, interval, p_value
from ..core.keys import Key
from ..core.result import Derived, Result, derived, internal, quantity
from ..core.tables import Entry
from . import paired, statistics
from .caveats import large_step
from .directional_result import DirectionalLosses
from .resolution import without_error
from .sequences import crossed
from .statistics import Samples, Signs

OfMoments = Callable[[Tensor, Tensor], Tensor]
"""A statistic as a function of mean and variance."""


class Pairs(Result):
    """What is known, over directions and the data being fixed, of a quantity that every direction has of its own."""

    correlation: Estimate = quantity("correlation of the two models' samples")
    """Pearson's r: what pairing takes out of the difference."""
    wilcoxon: float = quantity("smaller signed rank sum")
    """The smaller of the two signed rank sums."""
    p_value: float = quantity("p of the signed-rank test", name="wilcoxon_p_value")
    """Wilcoxon's, over directions alone."""
    rank_biserial: Estimate = quantity("rank-biserial correlation")
    cohen_dz: Estimate = quantity("difference over its sd")
    signs: Signs = internal()
    """How many differences are above and below 0, and the exact binomial p value."""

    @derived("sign test", name="*")
    def sign_test(self) -> dict[str, float]:
        return dict(zip(("n_above", "n_below", "sign_p_value"), self.signs, strict=True))


class Difference(Result):
    """One statistic of two models, and its difference, second - first, over the pairs that are finite in both.

    Where terms per sequence are known, the three are `Crossed`: with an error over sequences, too, paired in the difference.
    """

    first: Estimate = quantity("first")
    second: Estimate = quantity("second")
    difference: Estimate = quantity("difference")
    interval: tuple[float, float] = internal()
    """From the error over directions and sequences together; from that over directions where the other is not known."""
    num_lost: int = quantity("pairs left out", name="n_lost", shown=False)
    """Pairs left out because the quantity is not finite in one of the two, or in both."""
    pairs: Pairs | None = internal()
    """None for the statistics that are no means over directions."""

    @derived("ends of the interval", name="*")
    def ends(self) -> dict[str, float]:
        return dict(zip(("difference_low", "difference_high"), self.interval, strict=True))

    @derived("pairs", name="n_pairs", shown=False)
    def num_pairs(self) -> int:
        return self.difference.num

    @derived("p of Student's t test")
    def p_value(self) -> float:
        """Two-sided, of Student's t test that the difference is 0; its error is that of `interval`."""
        return p_value(self.difference)

    @property
    def has_data_error(self) -> bool:
        return isinstance(self.difference, Crossed) and bool(self.difference.stderr_data.isfinite())

    @derived("gain by pairing")
    def pairing_gain(self) -> float:
        """Variance of the difference if the two were sampled apart, over that of the paired one; inf where that is 0.

        So many times the directions would be needed without pairing; nan where both variances are 0 or undefined.
        """
        apart = self.first.stderr.square() + self.second.stderr.square()
        return float(apart / self.difference.stderr.square())

    def without_error(self) -> Difference:
        """The same without errors and tests."""
        pairs, nan = self.pairs, math.nan
        if pairs is not None:
            pairs = replace(pairs, p_value=nan, signs=pairs.signs._replace(p_value=nan))
        return replace(self, difference=without_error(self.difference), interval=(nan, nan), pairs=pairs)

    def entries(self) -> Iterator[Entry]:
        """With those of the pairs; the test is about means."""
        of_pairs = () if self.pairs is None else self.pairs.entries()
        own = (entry for entry in super().entries() if self.pairs is not None or entry.name != "p_value")
        return chain(own, of_pairs)


def _per_statistic(label: str, column: Callable[[Difference], Any]) -> Derived[list[Any]]:
    """A column of a comparison's table."""
    return derived(label, per="statistic")(lambda comparison: list(map(column, comparison.differences.values())))


class Comparison(Result):
    """Two models along the same directions; made by `compare_directional`, whose docstring says what the numbers mean.

    `differences` has one entry per statistic, by its documented name; the columns `first` to `rank_biserial` are theirs, nan
    where a statistic has no such test.
    """

    names: tuple[str, str] = internal()
    level: float
    differences: dict[str, Difference] = internal()
    baseline_losses: tuple[float, float] = internal()
    num_directions: int = quantity("directions", name="n_directions", shown=False)
    normalize: str
    distribution: str
    span: float
    key: Key
    num_sequences: int = quantity("sequences", name="n_sequences", shown=False, default=0)
    relative_step: float = math.nan
    """The larger of the two."""
    truncation: Estimate | None = quantity(
        "what the step adds to the difference of mean curvatures", name="curvature_mean_truncation", default=None
    )
    """What the step does to the difference of the mean curvatures; None for exact ones."""
    step_notes: tuple[str | None, str | None] = internal(default=(None, None))
    """What each result says of its step and its curvatures."""

    first = _per_statistic("first model", lambda each: each.first)
    second = _per_statistic("second model", lambda each: each.second)
    difference = _per_statistic("second - first, with its whole error", lambda each: each.difference)
    over_directions = _per_statistic("its error over directions", lambda each: float(each.difference.stderr))
    low = _per_statistic("lower end of its interval", lambda each: each.interval[0])
    high = _per_statistic("upper end of its interval", lambda each: each.interval[1])
    p_value = _per_statistic("p of Student's t test", lambda each: each.p_value if each.pairs else math.nan)
    rank_biserial = _per_statistic(
        "rank-biserial correlation", lambda each: float(each.pairs.rank_biserial.value) if each.pairs else math.nan
    )

    @derived("p values", name="n_tests", shown=False)
    def num_tests(self) -> int:
        """How many p values there are, none of them corrected for the others."""
        return sum(difference.pairs is not None for difference in self.differences.values())

    @property
    def coords(self) -> dict[str, list[str]]:
        return {"statistic": list(self.differences)}

    def asdict(self) -> dict[str, Any]:
        """A flat dictionary: `delta_mean_first`, `..._second`, `..._difference`, each with `_stderr`, and so on.

        Plain numbers and strings; statistics that one of the two results does not have are absent.
        """
        values = {name: value for name, value in super().asdict().items() if not isinstance(value, list)}
        for which, name, loss in zip(("first", "second"), self.names, self.baseline_losses, strict=True):
            values |= {f"name_{which}": name, f"baseline_loss_{which}": loss}
        for statistic, difference in self.differences.items():
            values |= {f"{statistic}_{name}": value for name, value in difference.asdict().items()}
        return values

    @property
    def head(self) -> str:
        first, second = self.names
        return (
            f"{second} (second) - {first} (first), paired over {self.num_directions} {self.normalize}-normalised "
            f"{self.distribution} directions at span {self.span:g}, {self.key!r}; {100 * self.level:g} % intervals"
        )

    @property
    def notes(self) -> list[str]:
        every = self.differences.items()
        listed = {
            "Wilcoxon's signed-rank test, over directions on these data alone": [
                f"{name} {each.pairs.p_value:.2g}" for name, each in every if each.pairs
            ],
            "no error over directions, and with it no interval and no p": [
                name for name, each in every if each.difference.stderr.isnan()
            ],
            "no error over sequences is known, interval and p are about these data alone": [
                name for name, each in every if not each.has_data_error
            ],
            "not told from 0 by their intervals; signs over directions": self._signs(),
            "pairs lost to non-finite values": [f"{name} {each.num_lost}" for name, each in every if each.num_lost],
        }
        return [
            "p and interval: Student's t, from the errors over directions and over sequences together; not corrected for "
            f"{self.num_tests} quantities tested.",
            *(f"{what}: {', '.join(names)}" for what, names in listed.items() if names),
            *(f"{name}: {note}" for name, note in zip(self.names, self.step_notes, strict=True) if note),
            *filter(None, [large_step(self.relative_step)]),
        ]

    def _signs(self) -> list[str]:
        """How many differences are on either side, of quantities whose interval holds 0."""
        return [
            "{} {} up, {} down (p = {:.2g})".format(name, *each.pairs.signs)
            for name, each in self.differences.items()
            if each.pairs is not None and each.interval[0] <= 0 <= each.interval[1] and each.pairs.signs.p_value < 1
        ]


def compare_directional(
    first: DirectionalLosses,
    second: DirectionalLosses,
    *,
    names: tuple[str, str] = ("first", "second"),
    level: float = 0.95,
) -> Comparison:
    r"""How the loss around one model differs from that around another, direction by direction: second - first.

    Both results come from `directional_losses` with one key, so that sample i of the one and sample i of the other
    belong to the same draw, and the scatter over directions that the two have in common cancels. With `filter` and
    `layer` normalisation the draw is scaled to each model's own weights: the same relative step. With `global` it is the
    same vector. `actual_span` may differ, where `relative_span` makes it.

    For $x_i, y_i$ = loss, loss change at +span (`delta_mean`), mean change of both sides $(L_i^+ + L_i^-)/2 - L_0$
    (`delta_two_sided_mean`), slope (`dir_grad_mean`) and curvature, as far as both results have them, with
    $d_i = y_i - x_i$ over the n pairs that are finite in both:

    $$\bar d \pm t_\nu \sqrt V, \qquad V = \frac{s_d^2}{n} + V_S - V_I, \qquad d_z = \frac{\bar d}{s_d}, \qquad
      r = \frac{R^+ - R^-}{n (n + 1) / 2}.$$

    $V_S$ is the variance over sequences of the mean difference (from the differences of every sequence's own terms: the
    same data in both results), $V_I$ the part of it that the scatter over directions has already, $\nu$ by Satterthwaite
    (`core.estimate.Crossed`). Interval and `Difference.p_value` (Student's t) are about other directions and other sequences
    from where these come from; where terms per sequence are not known (exact curvatures along a model without forward
    derivatives, slopes of one side, a single sequence) they are about directions alone, $V = s_d^2 / n$.

    `pairs` is about directions, the data being fixed. $R^\pm$ are the sums of the ranks of |d| over positive and negative
    differences; `pairs.p_value` is that of Wilcoxon's signed-rank test, two-sided (scipy: exact up to 50 pairs, up to 13
    where there are zeros or ties; else normal with continuity correction). A difference of exactly 0 is ranked and then left
    out of both sums (Pratt). r is the matched-pairs rank-biserial correlation, the favourable share of all ranks minus the
    unfavourable one: +1 where the second is larger along every direction; zeros pull it towards 0. That test asks whether d
    lies symmetrically around 0, the interval where its mean lies: for skewed d they may disagree. `pairing_gain` is
    $(s_x^2 + s_y^2) / s_d^2$.

    For `loss_std`, `landscape_roughness` and `curvature_std`, which are no means over directions, the standard error of
    the difference is a paired jackknife: direction i is left out of both. Its t interval is approximate, and there is no
    test. `pairs.signs` counts signs, whatever the tails. Errors of r and $d_z$ are jackknives over pairs; that of r is 0, and
    says nothing, where all signs are equal.

    What it does not say. An interval is about these two sets of weights: it says nothing about other training seeds. The data
    error takes the sequences for a random sample and is rough for fewer than 20 or so. Several quantities are tested, and the
    p values are not corrected for that. They are not independent either: `loss_mean` and `delta_mean` differ by the constant
    difference of the baselines, and a curvature by difference is 2 / h^2 times the two-sided change. The
    document's Mann-Whitney test is for samples that are not paired: it throws the pairing away, and most of the power
    with it. That both have one architecture and one list of batches is for the caller to see to.

    nan: errors, intervals, tests and effect sizes below 2 pairs, jackknife errors and the correlation below 3; $d_z$, its
    error and `pairing_gain` where 0 is divided by 0. Where every difference is 0, Wilcoxon's statistic is 0, p is 1 (all
    assignments of signs give that statistic) and r is 0.

    Raises ValueError for results that are not paired: another key, number, span, normalisation, distribution,
    `relative_span` or `global_renorm`, or a curvature by difference in the one and exact in the other; for a level
    outside (0, 1), and for names that are not two different ones.

    Wilcoxon (1945), doi:10.2307/3001968. Pratt (1959), doi:10.1080/01621459.1959.10501526. Kerby (2014),
    doi:10.2466/11.IT.3.1. $d_z$: Cohen (1988), Statistical power analysis for the behavioral sciences, section 2.3.5.

    >>> import torch
    >>> from funcscope.core import criterion, keys, model, objective
    >>> from funcscope.landscape.directional import directional_losses
    >>> net = model.functional(torch.nn.Linear(2, 1, bias=False))
    >>> half_square = criterion.custom(lambda out, y: (out - y) ** 2 / 2)
    >>> loss = objective.objective(net, [(torch.eye(2) * 2**0.5, torch.zeros(2, 1))], half_square)    # L = |theta|^2 / 2
    >>> near, far = (directional_losses(loss, scale * torch.tensor([3.0, 4.0]), key=keys.key(0), n_samples=6, span=0.1,
    ...              compute_curvature=True, curvature="exact") for scale in (1, 2))
    >>> found = compare_directional(near, far).differences["curvature_mean"]        # |theta|^2 along every direction
    >>> round(float(found.first.value), 3), round(float(found.second.value), 3), found.pairs.p_value   # 2 / 2^6
    (25.0, 100.0, 0.03125)
    """
    paired.check(first, second, names, level)
    shared = {
        name: _Pair.of(first, second, name)
        for name in _QUANTITIES
        if name in first.columns.keys() & second.columns.keys()
    }
    differences = {f"{name}_mean": _of_means(pair, level) for name, pair in shared.items()}
    for name, column, estimate, of_moments in _SPREADS:
        if column in shared:
            differences[name] = _of_spreads(shared[column], estimate, of_moments, level)
    if first.resolution_note and second.resolution_note:
        exact = first.exact_curvatures is not None
        differences = {
            name: each
            if (name.startswith("dir_grad") or (exact and name.startswith("curvature")))
            else each.without_error()
            for name, each in differences.items()
        }
    return Comparison(
        names=names,
        level=level,
        differences=differences,
        baseline_losses=(first.baseline_loss, second.baseline_loss),
        num_directions=len(first.losses),
        normalize=first.normalize,
        distribution=first.distribution,
        span=first.span,
        key=first.key,
        num_sequences=0 if first.residuals is None else first.residuals.num,
        relative_step=max(first.relative_step, second.relative_step),
        truncation=_truncation(first, second),
        step_notes=(first.resolution_note or first.step_note, second.resolution_note or second.step_note),
    )


_QUANTITIES = ("loss", "delta", "delta_two_sided", "dir_grad", "curvature")


class _Pair(NamedTuple):
    """Samples of a quantity along the directions where both are finite, with the rows of their sequences."""

    samples: tuple[Tensor, Tensor]
    rows: tuple[Tensor | None, Tensor | None]
    num_lost: int

    @classmethod
    def of(cls, first: DirectionalLosses, second: DirectionalLosses, name: str) -> _Pair:
        x, y = (result.columns[name] for result in (first, second))
        both = x.isfinite() & y.isfinite()
        one, other = (None if (rows := result.rows(name)) is None else rows[both] for result in (first, second))
        if one is None or other is None or one.shape != other.shape:
            one = other = None
        return cls((x[both], y[both]), (one, other), int((~both).sum()))


def _of_means(pair: _Pair, level: float) -> Difference:
    (x, y), d = pair.samples, pair.samples[1] - pair.samples[0]
    difference = crossed(lambda x, y: statistics.mean(y - x), pair.samples, pair.rows)
    statistic, p = paired.signed_rank_test(d)
    effects = (paired.rank_biserial(d), paired.standardised_mean(d), statistics.signs(d))
    pairs = Pairs(statistics.correlation(x, y), statistic, p, *effects)
    return _difference(statistics.mean, pair, difference, level, pairs)


def _of_spreads(
    pair: _Pair, estimate: Callable[[Samples], Estimate], of_moments: OfMoments, level: float
) -> Difference:
    def gap(x: Tensor, y: Tensor) -> Estimate:
        left_out = lambda: of_moments(*statistics.left_out(y)) - of_moments(*statistics.left_out(x))  # noqa: E731
        return paired.jackknifed(estimate(y).value - estimate(x).value, left_out, x)

    return _difference(estimate, pair, crossed(gap, pair.samples, pair.rows), level, None)


def _difference(
    estimate: Callable[[Samples], Estimate], pair: _Pair, difference: Estimate, level: float, pairs: Pairs | None
) -> Difference:
    first, second = (crossed(estimate, [x], [rows]) for x, rows in zip(pair.samples, pair.rows, strict=True))
    return Difference(first, second, difference, interval(difference, level), pair.num_lost, pairs)


def _truncation(first: DirectionalLosses, second: DirectionalLosses) -> Estimate | None:
    """Of the difference of mean curvatures, along the directions that both have at shorter steps."""
    one, other = first.truncation, second.truncation
    if one is None or other is None or len(one.whole) != len(other.whole):
        return None
    return Estimate.of(4 / 3 * (other.whole - other.half - one.whole + one.half))


_SPREADS: tuple[tuple[str, str, Callable[[Samples], Estimate], OfMoments], ...] = (
    ("loss_std", "loss", statistics.spread, lambda _, v: v.sqrt()),
    ("landscape_roughness", "loss", statistics.variation, lambda m, v: v.sqrt() / m.abs()),
    ("curvature_std", "curvature", statistics.spread, lambda _, v: v.sqrt()),
)
