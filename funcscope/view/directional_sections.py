"""The sections of one model's page: what is said of its directional losses, and the figure that shows it."""

from __future__ import annotations

import math
import re

import numpy as np

from ..study import directional_rows
from . import samples
from .numbers import number, setting, with_error
from .page import Block, Chart, Fact, Quote, Section, Table, Terms, listed
from .result import Result, lost
from .samples import Mark

VISIBLE = 0.004
"""The rounding band is drawn where it is at least this share of the axis wide on each side of zero."""
NO_RANK = "Roughness rises when the mean loss falls faster than the standard deviation, so it does not rank models."
_BARE = (
    "displacement",
    "param_norm",
    "landscape_roughness",
    "dir_grad_delta_corr",
    "relative_step",
    "curvature_settling",
    "unmoved",
)
"""Numbers without a unit."""
MANY = 200
"""Rings around more dots than these would hide them."""
_DOTS = (
    "A dot is a direction; its height only keeps dots apart. Bar and tick: the middle half of the directions and the "
    "median. Diamond: the mean with its 95 % interval. "
)
_UNITS = {
    "baseline_loss": "nats",
    "loss": "nats",
    "delta": "nats",
    "dir_grad": "nats per {}",
    "curvature": "nats per {}²",
}
_PLAIN = (
    "loss_min", "loss_max", "n_sequences", "curvature_noise_floor", "n_curvatures_undecided",
    "curvature_settling", "delta_sign_p_value", "dir_grad_sign_p_value", "curvature_sign_p_value", "delta_largest_share",
    "n_samples", "n_samples_for_corr", "n_nonfinite_pos", "n_nonfinite_neg", "actual_span", "displacement", "param_norm",
    "relative_step",
    "unmoved",
)  # fmt: skip
"""Stored numbers that are no estimates."""


def loss_changes(result: Result) -> Section:
    """The distribution of loss changes over directions, at both ends of the step."""
    changes, means = result.changes, result.mean_changes
    said = [f"{_middle(values, side)} {_downhill(values)}" for side, values in changes.items()]
    blocks: list[str | Chart] = [" ".join(said).strip()]
    if any(np.isfinite(values).any() for values in changes.values()):
        fig = samples.strips(changes, means, name="loss change", unit="nats")
        caption = f"{_dots(result)}{_off_axis(changes, means)}{lost(changes, 'sampled loss')}"
        blocks.append(Chart(fig, caption))
    return Section(f"Loss changes at {result.step}", [*blocks, _roughness(result)])


def curvature(result: Result) -> Section:
    """The distribution of curvatures, and what rounding can do to them."""
    values, unit = result.column("curvatures"), f"nats per {result.unit}²"
    blocks: list[str | Chart | Quote] = [_bend(result, unit), *note(result.values["precision_note"])]
    blocks += note(result.values.get("step_note"))
    if np.isfinite(values).any():
        shown, means = {"": values}, {"": result.mean("curvature_mean", "curvatures")}
        extent = samples.extent(shown, means)
        band = _visible_band(result, extent)
        fig = samples.strips(shown, means, name="curvature", unit=unit, band=band)
        caption = f"{_dots(result)}{_off_axis(shown, means)}{_rounding(result, band, extent)}{lost(shown, 'curvature')}"
        blocks.append(Chart(fig, caption))
    return Section("Curvature", blocks)


def slopes(result: Result) -> Section:
    """Slopes against loss changes: how much of the change the gradient predicts."""
    slope, change = result.column("slopes"), result.changes[result.side]
    predicted = {"slope alone": result.span * slope}
    if result.has("curvatures"):
        predicted["slope and curvature"] = result.span * slope + result.span**2 / 2 * result.column("curvatures")
    text = (
        "The correlation over directions, between the slope at the weights and the loss change at "
        f"{result.side}, is {result.said('dir_grad_delta_corr')}. Near 1 the gradient predicts which direction changes the "
        "loss more. A low value says that at this distance curvature and higher orders move the loss, or that there are "
        "too few directions to tell. It does not say that the gradient is wrong."
    )
    blocks: list[str | Chart | Quote] = [text, *note(result.values["note"])]
    seen = int(np.isfinite(slope + change).sum())
    if seen:
        quadratic = predicted.get("slope and curvature") if seen <= MANY else None
        unit = f"nats per {result.unit}"
        fig = samples.predictions(slope, change, result.span, quadratic=quadratic, slope_unit=unit)
        far = "; ".join(f"{name} {_distance(change - values)}" for name, values in predicted.items())
        caption = (
            f"A dot is a direction. Line: the change that the slope alone predicts, h s with h = {setting(result.span)}. "
            f"{_rings(result, quadratic is not None)}Root mean square distance of the predictions from the dots: {far}."
            f"{_unseen(seen, len(slope))}"
        )
        blocks.append(Chart(fig, caption))
    return Section("Slopes and loss changes", blocks)


def half_precision(result: Result) -> Section:
    """What rounding to half precision leaves of the step, measured on the first direction."""
    of = {name: result.of(f"realised_{name}")[0] for name in ("displacement", "error", "asymmetry", "unmoved")}
    off = result.of("realised_loss_error")[0]
    dtype = result.model["compute_dtype"].removeprefix("torch.")
    text = (
        f"The model computes in {dtype}: weights can only move from one number of that type to the next. Measured on "
        "the first direction:"
    )
    items = [
        ("Length", [f"Asked to move by {number(result.values['displacement'])}, the weights move by "
                    f"{number(of['displacement'])}."]),
        ("Error", [f"The step that is taken differs from the one asked for by {_percent(of['error'])} of its length."]),
        ("Still", [f"{_percent(of['unmoved'])} of the weights do not move at all."]),
        ("Opposite", [f"The steps at + and at − fail to be opposite by {_percent(of['asymmetry'])} of their length."]),
    ]  # fmt: skip
    if not math.isnan(off):
        items.append(("Loss", [f"Rounding inside the model moves the loss by about {number(off)} nats."]))
    return Section("Half precision", [text, Terms(items)])


def _roughness(result: Result) -> str:
    """Roughness, and why it does not rank models."""
    value = result.said("landscape_roughness")
    return f"Roughness, sd / |mean| of the losses at {result.side}, is {value}. {NO_RANK}"


def _bend(result: Result, unit: str) -> str:
    values = result.column("curvatures")
    if not np.isfinite(values).any():
        return "No curvature is finite."
    how = "a second derivative, exact" if result.is_exact else "the second difference of the three losses"
    half_square = with_error(*(result.span**2 / 2 * x for x in result.of("curvature_mean")))
    text = (
        f"The curvature along a direction is {how}. Its mean is {result.said('curvature_mean')} {unit}, its standard "
        f"deviation over directions {result.said('curvature_std')}; {_negative(values)}. "
        f"The mean alone, h² c / 2, makes {half_square} nats of the loss change."
    )
    if result.is_relative:
        text += f" Per squared unit of distance in parameter space it is {result.said('rayleigh_mean')} nats."
    return text


def note(text: str | None, source: str = "the result") -> list[Quote]:
    """What the result itself says of its numbers."""
    if text is None:
        return []
    text = directional_rows.without_unknown(text)
    return [Quote(f"{text[0].upper()}{text[1:]}", f"Stored with {source}.")]


def estimated(label: str, value: float, stderr: float, detail: str) -> Fact:
    """A fact with its standard error in the line below."""
    found = re.fullmatch(r"\(?([^(]+) ± ([^)]+)\)?( × .+)?", with_error(value, stderr))
    if found is None:
        return Fact(label, number(value), f"{detail}; error unknown" if math.isnan(stderr) else detail)
    shown, error, power = found.groups(default="")
    return Fact(label, f"{shown}{power}", f"± {error}{power} {detail}")


def statistics(result: Result) -> list[Block]:
    """Every estimate with its errors, as the terminal has it, and its unit; what the result says of them."""
    listing = directional_rows.model_table(result.model)
    rows = tuple((*row, _unit(row[0], result)) for row in listing.rows)
    return listed(listing._replace(headers=(*listing.headers, "unit"), rows=rows), "listed")


def plain(results: tuple[Result, ...], headers: tuple[str, ...]) -> Table:
    """Stored numbers that are no estimates, a column per model."""
    names = [name for name in _PLAIN if name in results[0].values]
    rows = [
        [name, *(_exactly(result.values.get(name)) for result in results), _unit(name, results[0])] for name in names
    ]
    return Table(["stored number", *headers, "unit"], rows, "listed")


def _exactly(value: float | int | None) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return number(value) if value is None else setting(value)


def _unit(name: str, result: Result) -> str:
    if name in _BARE or name.endswith(("_p_value", "_share")) or name.startswith("n_"):
        return ""
    if name == "rayleigh_mean":
        return "nats per unit of distance²"
    if name == "actual_span":
        return result.unit
    return next((unit.format(result.unit) for first, unit in _UNITS.items() if name.startswith(first)), "")


def _middle(values: samples.Column, side: str) -> str:
    finite = values[np.isfinite(values)]
    if finite.size < 2:
        return f"At {side} " + ("no loss is finite." if not finite.size else f"the change is {number(finite[0])} nats.")
    lower, middle, upper = (number(float(x)) for x in np.quantile(finite, (0.25, 0.5, 0.75)))
    return f"At {side} the median change is {middle} nats and the middle half lies between {lower} and {upper}."


def _downhill(values: samples.Column) -> str:
    few, num = int((values < 0).sum()), int(np.isfinite(values).sum())
    if not num:
        return ""
    if num == 1:
        return ""
    if not few:
        return "No direction lowers the loss."
    return f"{few} of {num} directions {'lowers' if few == 1 else 'lower'} the loss."


def _negative(values: samples.Column) -> str:
    few, num = int((values < 0).sum()), int(np.isfinite(values).sum())
    return f"{few} of {num} {'is' if few == 1 else 'are'} negative" if few else "none is negative"


def _dots(result: Result) -> str:
    return _DOTS if result.num > 1 else "The dot is the direction, which is its own mean and has no interval. "


def _off_axis(shown: dict[str, samples.Column], means: dict[str, Mark]) -> str:
    return "" if samples.shows_zero(shown, means) else "Zero is not on the axis. "


def _visible_band(result: Result, extent: tuple[float, float]) -> float | None:
    low, high = extent
    floor = result.of("curvature_noise_floor")[0]
    return floor if low <= floor and high >= -floor and floor >= VISIBLE * (high - low) > 0 else None


def _rounding(result: Result, band: float | None, extent: tuple[float, float]) -> str:
    """What rounding does to a curvature, and whether it is drawn."""
    if result.is_exact:
        return ""
    floor, few = result.of("curvature_noise_floor")[0], result.values["n_curvatures_undecided"]
    if band is None:
        return f"Rounding moves a curvature by about {number(floor, 2)}, too little to draw. "
    low, high = extent
    grey = "Grey, the whole axis here" if floor >= max(-low, high) else "Grey"
    return (
        f"{grey}: within {number(floor, 2)} of zero rounding may decide the sign of a curvature, as for {few} of them. "
    )


def _rings(result: Result, drawn: bool) -> str:
    """The prediction with the curvature, and how much it owes to the losses that it predicts."""
    if not result.has("curvatures"):
        return ""
    own = (
        ""
        if result.is_exact
        else ", where c has the measured losses in it and leaves out the odd orders from the third"
    )
    return f"{'Rings' if drawn else 'Not drawn'}: slope and curvature, h s + h² c / 2{own}. "


def _distance(residual: samples.Column) -> str:
    finite = residual[np.isfinite(residual)]
    return f"{number(float(np.sqrt(np.mean(finite**2))))} nats" if finite.size else "undefined"


def _unseen(seen: int, num: int) -> str:
    return "" if seen == num else f" {num - seen} of {num} directions have no finite slope and loss, and are not drawn."


def _percent(share: float) -> str:
    return "undefined" if math.isnan(share) else f"{number(100 * share, 2)} %"
