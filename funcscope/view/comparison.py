"""The page of two models on the same random directions: their losses and curvatures, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.store import Stored
from . import directional_methods, directional_sections, samples
from .numbers import number, with_error
from .page import Chart, Fact, Files, Section, Table, render
from .result import Column, Result, is_resolved, read, short
from .samples import Mark

_PAIRED = (
    "A dot is a direction. On the diagonal both models have the same value, above it the second has the larger one. "
)


class Comparison:
    """The stored comparison by its documented names, with the samples it is made of; undefined numbers are nan."""

    def __init__(self, stored: Stored):
        self.first, self.second = read(stored)
        self.values: dict[str, Any] = stored.meta["comparison"]

    @property
    def results(self) -> tuple[Result, Result]:
        return self.first, self.second

    @property
    def names(self) -> tuple[str, str]:
        return self.first.name, self.second.name

    @property
    def statistics(self) -> list[str]:
        return [name.removesuffix("_difference") for name in self.values if name.endswith("_difference")]

    @property
    def headline(self) -> str:
        """The mean change of both sides where it is there: its expectation is that of one side, its error smaller."""
        return next(name for name in ("delta_two_sided_mean", "delta_mean") if name in self.statistics)

    @property
    def level(self) -> str:
        return f"{100 * self.values['level']:g} % interval"

    def of(self, name: str) -> float:
        value = self.values.get(name)
        return math.nan if value is None else value

    def gap(self, statistic: str) -> Mark:
        """The difference, second - first, and its interval."""
        return Mark(*(self.of(f"{statistic}_difference{end}") for end in ("", "_low", "_high")))

    def said(self, name: str) -> str:
        return with_error(self.of(name), self.of(f"{name}_stderr"))

    def interval(self, statistic: str) -> str:
        found = self.gap(statistic)
        return f"{number(found.low)} to {number(found.high)}"


def rendered(stored: Stored, files: Files) -> str:
    """The page of a stored comparison, as HTML."""
    c = Comparison(stored)
    body = [
        changes(c),
        *([curvature(c)] if "curvature_mean" in c.statistics else []),
        table(c),
        reading(c),
        both(c),
        *([half] if (half := _half(c)) is not None else []),
        Section("How these numbers were made", [directional_methods.terms(stored, c.results), files]),
    ]
    kicker = f"{c.second.name} against {c.first.name}, on the same {c.values['n_directions']:,} random directions"
    return render(title(c), kicker, lede(c), strip(c, stored.meta["data"]), body)


def title(c: Comparison) -> str:
    """Whose loss rises less, and by how much; that the difference is not resolved, where it is not."""
    gap = c.gap(c.headline)
    if math.isnan(gap.value):
        return f"No loss at {c.first.step} is finite in both models"
    if not is_resolved(gap):
        return f"The loss changes of {c.first.name} and {c.second.name} at {c.first.step} cannot be told apart"
    first, second = (c.of(f"{c.headline}_{which}") for which in ("first", "second"))
    size = f"{number(abs(gap.value))} nats"
    if first <= 0 <= second or second <= 0 <= first:
        return f"The loss change of {c.second.name} is {size} {'above' if gap.value > 0 else 'below'} that of {c.first.name}"
    more = "more" if abs(second) > abs(first) else "less"
    return (
        f"The loss of {c.second.name} {'rises' if second > 0 else 'falls'} by {size} {more} than that of {c.first.name}"
    )


def lede(c: Comparison) -> list[str]:
    """The paired difference with its interval, and what it is a mean of; then the curvature and the baselines."""
    n, name = c.values["n_directions"], c.headline
    sides = "on both sides of the weights" if name == "delta_two_sided_mean" else f"at {c.first.side}"
    text = (
        f"Along the same {n:,} random directions, {sides} at {c.first.step}, the loss changes by {_pair(c, name)} nats. "
        f"The paired difference is {c.said(f'{name}_difference')} nats ({c.level} {c.interval(name)})."
    )
    lost = c.values[f"{name}_n_lost"]
    text += f" {lost} of {n} pairs are not finite and left out." if lost else ""
    more = f"The loss at the weights is {_baselines(c)} nats."
    if "curvature_mean" in c.statistics:
        how = "differs" if is_resolved(c.gap("curvature_mean")) else "cannot be told apart"
        more += (
            f" The mean curvature {how}: {_pair(c, 'curvature_mean')} nats per {c.first.unit}², "
            f"a difference of {c.said('curvature_mean_difference')}."
        )
    return [text, more]


def strip(c: Comparison, data: dict[str, Any]) -> list[Fact]:
    name = c.headline
    facts = [Fact("Loss change", c.said(f"{name}_difference"), f"nats, second − first; ± one standard error")]
    if "curvature_mean" in c.statistics:
        facts.append(
            Fact("Curvature", c.said("curvature_mean_difference"), f"nats per {c.first.unit}², second − first")
        )
    gain = c.of(f"{name}_pairing_gain")
    return [
        *facts,
        Fact("Gain of pairing", f"{number(gain, 2)}×", "so many times the directions would be needed without pairs"),
        Fact("Sampling", f"{data['num_scored']:,} × {c.values['n_directions']:,}", "scored positions × directions"),
    ]


def changes(c: Comparison) -> Section:
    """Loss changes of both models along each direction, and their differences."""
    first, second = c.first.changes[c.first.side], c.second.changes[c.second.side]
    gaps = {c.first.side: (second - first, "delta_mean")}
    if c.headline == "delta_two_sided_mean":
        mean = [sum(result.changes.values()) / 2 for result in c.results]
        gaps = {"both sides": (mean[1] - mean[0], c.headline), **gaps}
    blocks: list[str | Chart] = [_tested(c, c.headline, "loss change")]
    if len(gaps) > 1:
        blocks[0] = f"{blocks[0]} {_why_both(c)}"
    if np.isfinite(second - first).any():
        fig = samples.pairs(first, second, _short(c), name="loss change", unit="nats")
        blocks.append(Chart(fig, f"Loss changes at {c.first.side}. {_PAIRED}{_lost(second - first)}"))
    blocks += _differences(c, gaps, "difference of loss changes", "nats")
    return Section(f"Loss changes at {c.first.step}, pair by pair", blocks)


def curvature(c: Comparison) -> Section:
    """Curvatures of both models along each direction, and their differences."""
    first, second = (result.column("curvatures") for result in c.results)
    unit = f"nats per {c.first.unit}²"
    text = _tested(c, "curvature_mean", "curvature")
    if not c.first.is_exact:
        text += (
            " Curvatures by difference are 2 / h² times the mean loss change of both sides: this is that result in other "
            "units, and no second one."
        )
    blocks: list[str | Chart] = [text]
    if np.isfinite(second - first).any():
        fig = samples.pairs(first, second, _short(c), name="curvature", unit=unit)
        blocks.append(Chart(fig, f"{_PAIRED}{_lost(second - first)}"))
    blocks += _differences(c, {"": (second - first, "curvature_mean")}, "difference of curvatures", unit)
    return Section("Curvature, pair by pair", blocks)


def table(c: Comparison) -> Section:
    """Every compared statistic: difference, interval, test, effect sizes, what pairing was good for."""
    headers = ["second − first", *_short(c), "difference", c.level, "p", "rank-biserial", "d_z", "correlation",
               "gain", "pairs", "lost"]  # fmt: skip
    text = (
        "± is one standard error over pairs. p: Wilcoxon’s signed-rank test. Rank-biserial: the share of ranks of "
        "directions with the larger value in the second model, minus that of the others. d_z: mean difference over its "
        "standard deviation. Gain: the variance of the difference if the models were sampled apart, over the paired one. "
        "Spreads are no means over directions and have an interval by the jackknife, without a test."
    )
    return Section("The comparison", [text, Table(headers, [_row(c, name) for name in c.statistics])])


def reading(c: Comparison) -> Section:
    """What the comparison does not say."""
    p = f"{c.values['n_tests']} quantities are tested, and their p values are not corrected for that."
    if c.values["n_tests"] < 2:
        p = "The p value is that of one test."
    return Section(
        "How to read it",
        [
            "Direction i of the one model and direction i of the other are the same draw, and what they have in common "
            "cancels in the difference. A Mann-Whitney test would ignore the pairing, and most of the power with it.",
            "Intervals and p values are about other random directions of these two sets of weights on these texts. They "
            f"say nothing about other data, and nothing about other training seeds. {p}",
            "A model whose loss rises less around its weights is flatter along random directions on these texts. By "
            "itself that does not say that it generalises better.",
        ],
    )


def both(c: Comparison) -> Section:
    text = f"± is one standard error over directions. {directional_sections.NO_RANK}"
    return Section("All statistics of both models", [text, directional_sections.table(c.results, _short(c))])


def _half(c: Comparison) -> Section | None:
    """The steps of the models that compute in half precision."""
    half = [result for result in c.results if "realised_displacement" in result.values]
    if not half:
        return None
    blocks = [block for result in half for block in (result.name, *directional_sections.half_precision(result).blocks)]
    return Section("Half precision", blocks)


def _row(c: Comparison, name: str) -> list[str]:
    has_test = f"{name}_p_value" in c.values
    tested = [
        number(c.of(f"{name}_p_value"), 2),
        *(c.said(f"{name}_{what}") for what in ("rank_biserial", "cohen_dz", "correlation")),
    ]
    return [
        name,
        *(c.said(f"{name}_{what}") for what in ("first", "second", "difference")),
        c.interval(name),
        *(tested if has_test else [""] * 4),
        number(c.of(f"{name}_pairing_gain"), 2),
        *(str(c.values[f"{name}_{what}"]) for what in ("n_pairs", "n_lost")),
    ]


def _differences(c: Comparison, gaps: dict[str, tuple[Column, str]], name: str, unit: str) -> Sequence[Chart]:
    """The distribution of paired differences, a row for each, with the stored mean and interval."""
    shown = {label: values for label, (values, _) in gaps.items()}
    means = {label: c.gap(statistic) for label, (_, statistic) in gaps.items()}
    if not any(np.isfinite(values).any() for values in shown.values()):
        return []
    fig = samples.strips(shown, means, name=name, unit=unit, interval=c.level)
    zero = "" if samples.shows_zero(shown, means) else " Zero is not on the axis."
    caption = (
        f"Paired differences, {c.second.name} − {c.first.name}. Bar and tick: the middle half of the directions and the "
        f"median. Diamond: the mean with its {c.level}.{zero}"
    )
    return [Chart(fig, caption)]


def _tested(c: Comparison, name: str, what: str) -> str:
    """Difference, interval and test of a mean."""
    larger, num = c.of(f"{name}_rank_biserial"), c.values[f"{name}_n_pairs"]
    return (
        f"The mean {what} differs by {c.said(f'{name}_difference')} ({c.level} {c.interval(name)}, Wilcoxon’s p = "
        f"{number(c.of(f'{name}_p_value'), 2)}, rank-biserial correlation {number(larger, 2)}, {num} pairs). The two "
        f"models’ values have a correlation of {c.said(f'{name}_correlation')} over directions."
    )


def _why_both(c: Comparison) -> str:
    return (
        f"This is the mean of the changes at + and at −. It estimates the same as {c.first.side} alone, without what the "
        f"slope adds to one side: there the difference is {c.said('delta_mean_difference')}."
    )


def _lost(gaps: Column) -> str:
    few = int((~np.isfinite(gaps)).sum())
    return f"{few} of {len(gaps)} pairs are not finite in both models and not drawn." if few else ""


def _pair(c: Comparison, name: str) -> str:
    return f"{c.said(f'{name}_first')} ({c.first.name}) and {c.said(f'{name}_second')} ({c.second.name})"


def _baselines(c: Comparison) -> str:
    first, second = (number(c.of(f"baseline_loss_{which}"), 4) for which in ("first", "second"))
    return f"{first} ({c.first.name}) and {second} ({c.second.name})"


def _short(c: Comparison) -> tuple[str, str]:
    """Names for figures and headers; numbered where their short forms are the same."""
    first, second = (short(name) for name in c.names)
    return (first, second) if first != second else (f"1 {first}", f"2 {second}")
