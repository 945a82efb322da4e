"""Figures that axes do not say how to draw, by class of result and quantity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..core.standard_errors import ratio_stderr
from ..core.tables import counted
from ..study.cache import Outcome
from . import samples
from .circuit_figure import circuit_graph
from .curves import Line, bars, lines, training
from .drawing import lost, tells_decades, titled
from .numbers import number
from .path_figures import barrier
from .reading import Drawn, Look, captioned, gone, named, seen_in, titles_of
from .reliability import reliability
from .spectrum_figures import spectrum
from .token_figures import attention_viewer, attribution_text, lens_table, visible

MOST_EDGES = 40
"""Of a circuit that is drawn."""
MOST_LINES = 12
"""That a legend tells apart."""
Custom = Callable[[Sequence[Outcome], Look], Iterator[Drawn]]


def _density(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        result: Any = outcome.result
        pairs = getattr(result, "ends", None)
        density = result if pairs is None else result.density  # that of a density is a method
        fig = spectrum(density, *((None, None) if pairs is None else (pairs.values.numpy(), pairs.residuals.numpy())))
        starts = f"{counted(density.num_probes, 'start')} of {density.steps} products"
        titled(fig, f"Spectral density{_of(whose, outcomes)}", f"{density.num_parameters:,} eigenvalues, {starts}")
        yield Drawn(
            fig, "Share of eigenvalues per decade with the 95 % interval over probes; below, single eigenvalues."
        )


def _path(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        result: Any = outcome.result
        paths = [result.path, result.line] if hasattr(result, "line") else [result]
        fig, notes = barrier(paths, None, outcome.in_unit("loss"))
        caption = "The loss on the way with 95 % intervals, the chord, and the barrier where it is largest."
        yield Drawn(titled(fig, f"Loss on the path{_of(whose, outcomes)}", *notes), caption)


def _lines(outcomes: Sequence[Outcome], look: Look) -> Iterator[Drawn]:
    """The change of the loss along directions, with paired errors; the loss itself where that tells_decades over decades."""
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        (one,) = seen_in([outcome], "losses")
        is_linear = not tells_decades(one.value, one.half)
        if is_linear:
            (one,) = seen_in([outcome], "delta_losses")
        rows = zip(named(one.coords["axis"]), one.value, one.half, strict=True)
        each = [Line(name, one.along(1), value, half) for name, value, half in rows]
        across = one.axis(1)
        fig, notes = lines(
            each, name=one.label, unit=one.unit, at=across, current=look.current, height=400, is_linear=is_linear
        )
        fig.update_layout(showlegend=len(each) <= MOST_LINES)
        base: Any = outcome.result
        there = f"the loss at theta is {number(float(base.baseline_loss), 4)} {outcome.in_unit('loss')}".strip()
        how = f"along the {across}, a line per direction, with 95 % intervals over sequences"
        title = whose if len(outcomes) > 1 else ""
        yield captioned(fig, one, how, gone([one], "values"), there, *notes, whose=title)


def _changes(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    """Loss changes of both sides."""
    rows: dict[str, np.ndarray] = {}
    unit = outcomes[0].in_unit("loss")
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        rows |= {f"{whose}<br>{side}": change for side, (_, change) in _sides(outcome.result).items()}
    fig, notes = samples.distribution(rows, name="loss change", unit=unit, axis="direction")
    gone = lost(np.concatenate(list(rows.values())), "dots")
    said = "; ".join(
        ["Loss changes per direction, a dot each, with the middle half and the mean", *filter(None, [gone, *notes])]
    )
    yield Drawn(titled(fig, "Loss changes along random directions"), f"{said}.")
    if len(outcomes) == 2 and len({getattr(each.result, "key", each) for each in outcomes}) == 1:
        first, second = (_sides(each.result) for each in outcomes)
        sides = {side: (first[side][1], second[side][1]) for side in first if side in second}
        one, other = (f"{whose}<br>loss change" for whose in titles_of(outcomes))
        line, units = (1.0, "equal"), (unit, unit)
        fig = samples.scatter(sides, line, names=(one, other), units=units, axis="direction", square=True)
        yield Drawn(titled(fig, "Loss changes of both"), "Loss changes along the same directions, a dot each.")


def _slopes(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    """Loss changes against what slopes say of them, on both sides."""
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        sides, h = _sides(outcome.result), float(outcome.result.actual_span)  # type: ignore[union-attr]
        units = outcome.in_unit("loss per h"), outcome.in_unit("loss")
        names = ("slope along the step", "loss change")
        fig = samples.scatter(sides, (h, "slope alone"), names=names, units=units, axis="direction")
        both = "on both sides of it, " if len(sides) > 1 else ""
        gone = lost(np.concatenate([change for _, change in sides.values()]), "dots")
        caption = f"Loss changes against slopes, {both}a dot per direction; the line is change = slope × step"
        yield Drawn(
            titled(fig, f"Slope and loss change{_of(whose, outcomes)}"), f"{caption}{f'; {gone}' if gone else ''}."
        )


def _shared(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    """What two masks share beside what chance gives them."""
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        result: Any = outcome.result
        each = {"of the two": result.jaccard, "by chance": result.chance_jaccard}
        fig = _grouped(result.blocks, {name: value.numpy() for name, value in each.items()}, "Jaccard index")
        caption = "Parameters that both keep over those that one of them does, per block, beside random masks as large."
        yield Drawn(titled(fig, f"Overlap{_of(whose, outcomes)}"), caption)


def _halves(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        result: Any = outcome.result
        values = dict(zip(result.names, result.halves.T.numpy(), strict=True))
        fig = _grouped(result.blocks, values, "overlap above chance")
        caption = "Between halves of the sequences: of different tasks, and of one, which is what noise leaves of 1."
        yield Drawn(titled(fig, f"Overlap of halves{_of(whose, outcomes)}"), caption)


def _grouped(places: Sequence[str], each: Mapping[str, np.ndarray], name: str) -> go.Figure:
    """Bars of several kinds beside each other."""
    lines = [Line(kind, np.arange(len(value)), value, np.full(len(value), np.nan)) for kind, value in each.items()]
    return bars(named(places), lines, name=name, unit="")


def _of(whose: str, outcomes: Sequence[Outcome]) -> str:
    return f", {whose}" if len(outcomes) > 1 else ""


def _sides(result: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Slope along the step and loss change, by side."""
    data = result.asdict()
    base = data["baseline_loss"]
    if "delta_losses" in data:
        changes = {"+d": data["delta_losses"], "−d": data.get("delta_losses_negative")}
    else:
        negative = data.get("losses_negative")
        changes = {"+d": data["losses"] - base, "−d": None if negative is None else negative - base}
    there = {side: np.asarray(change, dtype=np.float64) for side, change in changes.items() if change is not None}
    slope = np.asarray(data.get("slopes", np.full(len(there["+d"]), np.nan)), dtype=np.float64)
    return {side: (slope if side == "+d" else -slope, change) for side, change in there.items()}


def _training(outcomes: Sequence[Outcome], look: Look) -> Iterator[Drawn]:
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        result: Any = outcome.result
        fig = training(result.asdict() | {"step": np.asarray(result.coords["step"])}, look.current)
        caption = "Loss above accuracy, on the training and the test data, over the steps of training."
        yield Drawn(titled(fig, f"Training{_of(whose, outcomes)}"), caption)


def _attention(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        result: Any = outcome.result
        fig = attention_viewer(result.patterns.numpy().round(4), result.tokens, start=result.follower)
        title = f"Attention on a text{_of(whose, outcomes)}"
        caption = (
            "Where each query looks; the menu has every head, the first to be shown is the one that attends most to "
        )
        titled(fig, title).layout.margin.t += 44  # of the menu
        yield Drawn(fig, f"{caption}what followed the same token before.")


def _lens(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        result: Any = outcome.result
        fig = lens_table(
            result.probability.numpy(),
            result.predictions,
            result.tokens,
            result.target_probability.numpy(),
            result.entropy.numpy(),
        )
        caption = "What each residual stream holds to be the next token, the model's own prediction on top; "
        yield Drawn(titled(fig, f"Logit lens on a text{_of(whose, outcomes)}"), f"{caption}as dark as it is probable.")


def _attribution(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        result: Any = outcome.result
        fig = attribution_text(result.tokens, result.attribution.numpy(), unit="nats")
        caption = (
            f"What each token adds to the log-probability of “{visible(result.predicted)}” behind the text (vermilion) "
        )
        yield Drawn(
            titled(fig, f"Attribution on a text{_of(whose, outcomes)}"),
            f"{caption}or takes from it (blue), beside the mean embedding in its place.",
        )


def _reliability(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    fields = ("bin_confidence", "bin_accuracy", "bin_low", "bin_high", "bin_weight")
    each = [tuple(getattr(outcome.result, name).double().numpy() for name in fields) for outcome in outcomes]
    fig = reliability(dict(zip(titles_of(outcomes), each, strict=True)))  # type: ignore[arg-type]
    caption = (
        "Accuracy over confidence by bin, with 95 % intervals; dots are as large as their bins, and on the dotted line "
    )
    yield Drawn(titled(fig, "Reliability"), f"{caption}a model is right as often as it says.")


def _circuit(outcomes: Sequence[Outcome], _: Look) -> Iterator[Drawn]:
    for outcome, whose in zip(outcomes, titles_of(outcomes), strict=True):
        result: Any = outcome.result
        order = result.order[:MOST_EDGES]
        edges = [(sender, receiver) for sender, _, receiver in (result.names[i].partition(" -> ") for i in order)]
        nodes = [*result.senders, "logits"]
        errors = ratio_stderr(result.samples, result.reference)[order].numpy()
        fig = circuit_graph(nodes, edges, result.shares[order].numpy(), stderr=errors)
        caption = (
            f"The {len(order)} of {len(result.names)} edges that carry the largest estimated shares of the difference: "
        )
        caption += "as wide as their share, vermilion above 0, blue below."
        yield Drawn(titled(fig, f"Circuit{_of(whose, outcomes)}"), caption)


CUSTOM: dict[tuple[str, str], Custom | None] = {
    ("SpectrumSummary", "eigenvalues"): _density,
    **{("SpectrumSummary", name): None for name in ("residuals", "top_eigenvalues", "bottom_eigenvalues")},
    ("SpectralDensity", "nodes"): _density,
    ("SpectralDensity", "weights"): None,
    ("LossPath", "losses"): _path,
    ("Connection", "losses"): _path,
    ("Connection", "line_losses"): None,
    ("LossLines", "losses"): _lines,
    ("LossLines", "delta_losses"): None,
    ("DirectionalLosses", "delta_losses"): _changes,
    ("DirectionalLosses", "slopes"): _slopes,
    ("Flatness", "delta_losses"): _changes,
    ("Flatness", "delta_losses_negative"): None,
    ("FisherOverlap", "jaccard"): _shared,
    ("FisherOverlap", "halves"): _halves,
    ("TextAttention", "patterns"): _attention,
    ("TextLens", "probability"): _lens,
    ("TextLens", "target_probability"): None,
    ("TextLens", "entropy"): None,
    ("TextAttribution", "attribution"): _attribution,
    ("Calibration", "bin_accuracy"): _reliability,
    **{("Calibration", f"bin_{name}"): None for name in ("confidence", "low", "high", "weight")},
    ("EdgeAttribution", "scores"): _circuit,
    ("InductionCircuit", "scores"): _circuit,
    ("TrainingCurves", "train_loss"): _training,
    ("TrainingCurves", "test_loss"): None,
    ("TrainingCurves", "train_accuracy"): None,
    ("TrainingCurves", "test_accuracy"): None,
    **{
        ("Comparison", name): None  # statistics of many units: a table has them
        for name in ("first", "second", "difference", "over_directions", "low", "high", "p_value", "rank_biserial")
    },
}
"""None for what another figure of the result has, or a table alone."""
