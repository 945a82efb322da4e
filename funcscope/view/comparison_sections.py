"""The sections of a comparison's page: what is said of two models, pair by pair, and the figures that show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..study import directional_rows
from . import directional_sections, samples
from .numbers import counted, number
from .page import Block, Chart, Quote, Section, Table, listed
from .pairing import Comparison
from .result import Column

FEW = 8
"""Pairs from which the signed-rank test can give a p value below 0.01."""
_PAIRED = (
    "A dot is a direction. On the diagonal both models have the same value, above it the second has the larger one. "
)


def changes(c: Comparison) -> Section:
    """Loss changes of both models along each direction, and their differences."""
    first, second = c.first.changes[c.first.side], c.second.changes[c.second.side]
    gaps = {c.first.side: (second - first, "delta_mean")}
    if c.headline == "delta_two_sided_mean":
        mean = [sum(result.changes.values()) / 2 for result in c.results]
        gaps = {"both sides": (mean[1] - mean[0], c.headline), **gaps}
    blocks: list[str | Chart] = [_tested(c, c.headline, "loss change", "nats")]
    if len(gaps) > 1:
        blocks[0] = f"{blocks[0]} {_why_both(c)}"
    if np.isfinite(second - first).any():
        fig = samples.pairs(first, second, c.short_names, name="loss change", unit="nats")
        blocks.append(Chart(fig, f"Loss changes at {c.first.side}. {_PAIRED}{_lost(second - first)}"))
    blocks += _differences(c, gaps, "difference of loss changes", "nats")
    return Section(f"Loss changes at {c.first.step}, pair by pair", blocks)


def curvature(c: Comparison) -> Section:
    """Curvatures of both models along each direction, and their differences."""
    first, second = (result.column("curvatures") for result in c.results)
    unit = f"nats per {c.first.unit}²"
    text = _tested(c, "curvature_mean", "curvature", unit)
    if not c.first.is_exact:
        text += (
            " Curvatures by difference are 2 / h² times the mean loss change of both sides: this is the same result in other "
            "units, not a second one."
        )
    blocks: list[str | Chart | Quote] = [text]
    for result in c.results:
        for kind in ("precision_note", "step_note"):
            blocks += directional_sections.note(result.values.get(kind), result.name)
    if np.isfinite(second - first).any():
        fig = samples.pairs(first, second, c.short_names, name="curvature", unit=unit)
        blocks.append(Chart(fig, f"{_PAIRED}{_lost(second - first)}"))
    blocks += _differences(c, {"": (second - first, "curvature_mean")}, "difference of curvatures", unit)
    return Section("Curvature, pair by pair", blocks)


def table(c: Comparison, meta: dict[str, Any]) -> Section:
    """Every compared statistic: difference, its errors, interval, tests, effect sizes, what pairing was good for."""
    text = (
        "Differences are second − first. Wilcoxon’s p and rank-biserial are over directions alone; rank-biserial: the share "
        "of ranks of directions with the larger value in the second model, minus that of the others. Spreads are no means "
        "over directions and have an interval by the jackknife, without a test."
    )
    more = (
        "Over directions alone, d_z: mean difference over its standard deviation; correlation: of the two models’ values. "
        "Gain: the variance of the difference if the models were sampled apart, over the paired one."
    )
    effects = Table(["", "d_z", "correlation", "gain", "pairs"], [_row(c, name) for name in c.statistics], "listed")
    listing = directional_rows.comparison_table(meta)
    headers = (listing.headers[0], *c.short_names, *listing.headers[3:])
    spread: list[Block] = [more, effects] if c.values["n_directions"] > 1 else []
    return Section("The comparison", [text, *listed(listing._replace(headers=headers)), *spread])


def reading(c: Comparison) -> Section:
    """What the comparison does not say."""
    gain = c.of(f"{c.headline}_pairing_gain")
    apart = f": sampled apart, the variance of the difference would be {number(gain, 2)} times as large"
    apart = "" if math.isnan(gain) else apart
    p = f"{c.values['n_tests']} quantities are tested, and their p values are not corrected for that."
    if math.isnan(c.of(f"{c.headline}_p_value")):
        p = "One pair has neither."
    elif c.values["n_tests"] < 2:
        p = "The p value is that of one test."
    num = c.values[f"{c.headline}_n_pairs"]
    if 2 <= num < FEW:
        p += f" With {num} pairs the test cannot give a p value below {number(2.0 ** (1 - num), 2)}."
    return Section(
        "How to read it",
        [
            "Direction i of the one model and direction i of the other are the same draw, and what they have in common "
            f"cancels in the difference. A Mann-Whitney test would ignore the pairing{apart}.",
            f"{_about(c)} {p}",
            "A model whose loss rises less around its weights is flatter along random directions on these texts. By "
            "itself that does not say that it generalises better.",
        ],
    )


def _about(c: Comparison) -> str:
    """What intervals and p values are about."""
    if c.over == "over directions":
        return (
            "Intervals and p values are about other random directions of these two sets of weights on these texts. They "
            "say nothing about other data, and nothing about other training seeds."
        )
    return (
        f"Intervals and p values have an error {c.over}, the texts taken for a random sample. They are about these two sets "
        "of weights, and say nothing about other training seeds."
    )


def both(c: Comparison, meta: dict[str, Any]) -> Section:
    tables: list[Block] = [
        block for result in c.results for block in (result.name, *directional_sections.statistics(result))
    ]
    rest = directional_sections.plain(c.results, c.short_names)
    text = [*directional_rows.explained(meta), directional_sections.NO_RANK]
    return Section("All statistics of both models", [*text, *tables, rest])


def half_precision(c: Comparison) -> Section | None:
    """The steps of the models that compute in half precision."""
    half = [result for result in c.results if "realised_displacement" in result.values]
    if not half:
        return None
    blocks = [block for result in half for block in (result.name, *directional_sections.half_precision(result).blocks)]
    return Section("Half precision", blocks)


def _row(c: Comparison, name: str) -> list[str]:
    num, lost = (c.values[f"{name}_{what}"] for what in ("n_pairs", "n_lost"))
    effects = [c.said(f"{name}_{what}") for what in ("cohen_dz", "correlation")]
    return [
        name,
        *(effects if f"{name}_p_value" in c.values else [""] * 2),
        number(c.of(f"{name}_pairing_gain"), 2),
        f"{num:,} ({lost:,} lost)" if lost else f"{num:,}",
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
    if c.values["n_directions"] == 1:
        caption = f"The difference, {c.second.name} − {c.first.name}: of one direction, which has no interval.{zero}"
    return [Chart(fig, caption)]


def _tested(c: Comparison, name: str, what: str, unit: str) -> str:
    """Difference, interval and test of a mean."""
    num = counted(c.values[f"{name}_n_pairs"], "pair")
    text = f"The mean {what} differs by {c.said(f'{name}_difference')} {unit}"
    if math.isnan(c.of(f"{name}_p_value")):
        return f"{text} ({num}: no interval and no test)."
    return (
        f"{text} ({interval(c, name)}; p\u00a0=\u00a0{number(c.of(f'{name}_p_value'), 2)}; {num}). "
        f"{_directions_alone(c, name)}; rank-biserial correlation {number(c.of(f'{name}_rank_biserial'), 2)}. "
        f"Over directions, the values of the two models have a correlation of {c.said(f'{name}_correlation')}."
    )


def interval(c: Comparison, name: str) -> str:
    """Of a difference, with its level; nothing where there is none."""
    return "" if math.isnan(c.gap(name).low) else f"{c.level} {c.interval(name)}"


def directions(c: Comparison) -> str:
    num = c.values["n_directions"]
    return "random direction" if num == 1 else f"{num:,} random directions"


def _directions_alone(c: Comparison, name: str) -> str:
    """What is known over directions, the texts being fixed."""
    rank = c.values.get(f"{name}_wilcoxon_p_value", c.values.get(f"{name}_p_value"))
    text = f"Over directions, on these texts: Wilcoxon’s p\u00a0=\u00a0{number(rank, 2)}"
    if c.values.get(f"{name}_sign_p_value") is None:
        return text
    above, below = (c.values[f"{name}_{name_of}"] for name_of in ("n_above", "n_below"))
    p = number(c.of(f"{name}_sign_p_value"), 2)
    return f"{text}, {above} differences above 0 and {below} below (sign test p\u00a0=\u00a0{p})"


def _why_both(c: Comparison) -> str:
    return (
        f"This is the mean of the changes at + and at −. It estimates the same as {c.first.side} alone, without what the "
        f"slope adds to one side: there the difference is {c.said('delta_mean_difference')} nats."
    )


def _lost(gaps: Column) -> str:
    few = int((~np.isfinite(gaps)).sum())
    return f"{few} of {len(gaps)} pairs are not finite in both models and not drawn." if few else ""
