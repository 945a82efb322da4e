"""Two models along the same random directions: paired differences with intervals, a signed-rank test, effect sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import statistics
from ..core.checks import check_instance
from ..core.estimate import Estimate, interval
from ..core.standard_errors import crossed
from ..core.statistics import Samples
from .compare_result import Comparison, Difference, Pairs
from .directional_result import DirectionalLosses

OfMoments = Callable[[Tensor, Tensor], Tensor]
"""A statistic as a function of mean and variance."""


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
    >>> change = compare_directional(near, far).differences["curvature_mean"]        # |theta|^2 along every direction
    >>> round(float(change.first.value), 3), round(float(change.second.value), 3), change.pairs.p_value   # 2 / 2^6
    (25.0, 100.0, 0.03125)
    """
    _check(first, second, names, level)
    shared = first.columns.keys() & second.columns.keys()
    differences = {
        name: _difference(first, second, column, statistic, of_moments, level)
        for name, (column, statistic, of_moments) in _STATISTICS.items()
        if column in shared
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


_STATISTICS: dict[str, tuple[str, Callable[[Samples], Estimate], OfMoments | None]] = {
    f"{name}_mean": (name, statistics.mean, None)
    for name in ("loss", "delta", "delta_two_sided", "dir_grad", "curvature")
} | {
    "loss_std": ("loss", statistics.spread, lambda _, v: v.sqrt()),
    "landscape_roughness": ("loss", statistics.variation, lambda m, v: v.sqrt() / m.abs()),
    "curvature_std": ("curvature", statistics.spread, lambda _, v: v.sqrt()),
}
"""By name: of which column, and for those that are no means, how they follow from mean and variance."""


def _difference(
    first: DirectionalLosses,
    second: DirectionalLosses,
    column: str,
    statistic: Callable[[Samples], Estimate],
    of_moments: OfMoments | None,
    level: float,
) -> Difference:
    """Over the directions where the column is finite in both, with the rows of their sequences where both have them."""
    both = torch.stack([result.columns[column] for result in (first, second)]).isfinite().all(0)
    samples = [result.columns[column][both] for result in (first, second)]
    rows = [None if (row := result.rows(column)) is None else row[both] for result in (first, second)]
    if rows[0] is None or rows[1] is None or rows[0].shape != rows[1].shape:
        rows = [None, None]

    def gap(x: Tensor, y: Tensor) -> Estimate:
        if of_moments is None:
            return statistics.mean(y - x)
        left_out = lambda: of_moments(*statistics.left_out(y)) - of_moments(*statistics.left_out(x))  # noqa: E731
        return statistics.jackknifed(lambda: statistic(y).value - statistic(x).value, left_out, x)

    one, other = (crossed(statistic, [x], [row]) for x, row in zip(samples, rows, strict=True))
    change, pairs = crossed(gap, samples, rows), _pairs(*samples) if of_moments is None else None
    difference = Difference(one, other, change, interval(change, level), int((~both).sum()), pairs)
    lost = column != "dir_grad" and first.lost(column) and second.lost(column)
    return difference.without_error() if lost else difference


def _pairs(x: Tensor, y: Tensor) -> Pairs:
    d = y - x
    effect, standardised, signs = statistics.rank_biserial(d), statistics.standardised_mean(d), statistics.signs(d)
    return Pairs(statistics.correlation(x, y), *statistics.signed_rank_test(d), effect, standardised, signs)


def _truncation(first: DirectionalLosses, second: DirectionalLosses) -> Estimate | None:
    """Of the difference of mean curvatures, along the directions that both have at shorter steps."""
    one, other = first.truncation, second.truncation
    if one is None or other is None or len(one.whole) != len(other.whole):
        return None
    return Estimate.of(4 / 3 * (other.whole - other.half - one.whole + one.half))


def _check(first: DirectionalLosses, second: DirectionalLosses, names: Any, level: Any) -> None:
    """Raises ValueError for results whose samples are no partners, for a level outside (0, 1), and for names that are one."""
    for name, result in (("first", first), ("second", second)):
        remedy = "what `directional_losses` returns for each model, with one `key`"
        check_instance(name, result, DirectionalLosses, remedy)
    settings = _partner_settings(second)
    for name, one in _partner_settings(first).items():
        other = settings[name]
        if one != other and None not in (one, other):
            raise ValueError(
                f"`{name}` must be the same in both results for sample i of the one to be the partner of sample i of the "
                f"other, got {one!r} and {other!r}: sample both models with one `{name}`."
            )
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1, got {level!r}: 0.95 for a 95 % interval.")
    if len(names) != 2 or names[0] == names[1]:
        raise ValueError(f"`names` must be two different names, got {names!r}: one for each result, in their order.")


def _partner_settings(result: DirectionalLosses) -> dict[str, Any]:
    """What makes samples partners; None for what was not asked for."""
    same = ("key", "span", "normalize", "distribution", "relative_span", "global_renorm")
    curvature = "difference" if result.exact_curvatures is None else "exact"
    own = {"n_samples": len(result.losses), "curvature": curvature if result.compute_curvature else None}
    return {name: getattr(result, name) for name in same} | own
