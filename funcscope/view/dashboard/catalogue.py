"""The panels of the page, in its order. A panel reads the summary, or the file of one epoch (of two or three to compare)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ...study.runs import CROSS, Variant
from .. import renderers
from . import reading
from .panels import UNREADABLE, Absent, Drawn, Option, Panel, Plot, View, share_axes

FLATNESS, PLANE, CURVATURE = "landscape_flatness", "loss_plane", "hessian_curvature"
DIMENSION, DIRECTIONAL, TRAJECTORY = "effective_dimensionality", "directional_losses", "trajectory_plane"

WIDE = 560
"""Height of a figure of both columns, in pixels."""


def available(variant: Variant) -> list[Panel]:
    """The panels for which there is something."""
    return [panel for panel in PANELS if panel.needs(variant)]


def _stored(variant: Variant, analyzer: str, epoch: int, what: str) -> dict[str, Any]:
    found = reading.artifact(variant, analyzer, epoch)
    if found is None:
        near = reading.nearest(variant.epochs(analyzer), epoch)
        raise Absent(f"No {what} is stored at epoch {epoch:,}; the nearest is at epoch {near:,}.")
    summary, made_with = reading.summary(variant, analyzer), found["made_with"]
    wanted = summary.settings.get("settings", made_with) if summary is not None else made_with
    if other := [f"{name} {made_with.get(name)}" for name in wanted if made_with.get(name) != wanted[name]]:
        raise Absent(
            f"The {what} at epoch {epoch:,} was made with other settings ({', '.join(other)}) than the summary."
        )
    return found


def _summary(variant: Variant, analyzer: str) -> reading.Summary:
    found = reading.summary(variant, analyzer)
    if found is None:
        raise Absent("The summary of this analyzer is not written yet: it appears when the analysis ends.")
    return found


def _curves(view: View) -> Drawn:
    measured = reading.curves(view.variant)
    if measured is None:
        raise Absent("The curves are not written yet: they appear when training ends.")
    now = reading.phase(measured, view.epoch)
    at = f"At epoch {view.epoch:,}: train accuracy {now.train:.3f}, test accuracy {now.test:.3f}"
    return Drawn(
        renderers.render_training_curves(measured, current_epoch=view.epoch),
        "" if math.isnan(now.train) else f"{at}{f' ({now.name})' if now.name else ''}.",
    )


def _flatness(view: View) -> Drawn:
    found = _summary(view.variant, FLATNESS)
    metric = view.options.get("metric") or "mean_delta_loss"
    return Drawn(renderers.render_flatness_trajectory(found.arrays, view.epoch, metric=metric))


def _distribution(view: View) -> Drawn:
    data = _stored(view.variant, FLATNESS, view.epoch, "sample of perturbations")
    return Drawn(renderers.render_perturbation_distribution(data, view.epoch))


def _plane(view: View) -> Drawn:
    near = reading.nearest(view.variant.epochs(PLANE), view.epoch)
    plane = _stored(view.variant, PLANE, near, "plane")
    render = renderers.render_surface if view.options.get("form") == "surface" else renderers.render_contour
    at = "" if near == view.epoch else f" It is the nearest to epoch {view.epoch:,} that is stored."
    return Drawn(render(plane, title=f"Loss plane at epoch {near:,}"), f"Plane at epoch {near:,}.{at}")


def _trajectory(view: View) -> Drawn:
    found = reading.cross(view.variant, TRAJECTORY)
    if found is None:
        raise Absent("The plane of the trajectory is not written yet.")
    epochs = [int(epoch) for epoch in found["epochs"]]
    near = reading.nearest(tuple(epochs), view.epoch)
    render = renderers.render_surface if view.options.get("form") == "surface" else renderers.render_contour
    fig = render(found, trajectory=found, current=near, title="Loss on the plane of the trajectory")
    share = 100 * float(sum(found["explained"]))
    held = f"The two axes hold {share:.0f} % of the squared distances to the last checkpoint."
    return Drawn(fig, f"Epoch {near:,} is marked. {held}")


def _curvature(view: View) -> Drawn:
    return Drawn(renderers.render_curvature_trajectory(_summary(view.variant, CURVATURE).arrays, view.epoch))


def _dimension(view: View) -> Drawn:
    found = _summary(view.variant, DIMENSION)
    return Drawn(
        renderers.render_dimensionality_trajectory(found.arrays, view.epoch, tuple(found.settings.get("matrices", ())))
    )


def _directional(view: View) -> Drawn:
    """The epoch between the two phases; three files, however many epochs there are."""
    stored = view.variant.epochs(DIRECTIONAL)
    near = reading.nearest(stored, view.epoch)
    chosen = sorted({*reading.phases(reading.measured(view.variant), stored), near})
    results = [_stored(view.variant, DIRECTIONAL, epoch, "sample of directions") for epoch in chosen]
    at = "" if near == view.epoch else f" Epoch {near:,} is the nearest to epoch {view.epoch:,} that is stored."
    return Drawn(
        renderers.render_directional_violin(results, names=[f"epoch {epoch:,}" for epoch in chosen]),
        f"The epoch, between the memorising phase and the last one.{at}",
    )


def _pair(variant: Variant, options: Mapping[str, Any]) -> tuple[int, int]:
    """The two epochs that are compared; at first those of the phases, of epochs with a plane where these have both."""
    found, planes = reading.measured(variant), variant.epochs(PLANE)
    memorising = any(reading.phase(found, epoch).name == "memorising" for epoch in planes)
    first, last = reading.phases(found, planes if memorising else reading.epochs(variant))
    return int(options.get("first", first)), int(options.get("last", last))


def _two_planes(view: View) -> Drawn:
    pair = [reading.nearest(view.variant.epochs(PLANE), epoch) for epoch in _pair(view.variant, view.options)]
    planes = [_stored(view.variant, PLANE, epoch, "plane") for epoch in pair]
    titles = [_phase_title(view.variant, epoch) for epoch in pair]
    moved = "" if tuple(pair) == _pair(view.variant, view.options) else " The nearest epochs that have a plane."
    fig = renderers.render_planes_side_by_side(planes, titles, height=WIDE)
    return Drawn(fig, f"One colour scale for both.{moved}")


def _one_of_two(which: int) -> Callable[[View], Drawn]:
    def draw(view: View) -> Drawn:
        pair = _pair(view.variant, view.options)
        samples = [_stored(view.variant, FLATNESS, epoch, "sample of perturbations") for epoch in pair]
        title = _phase_title(view.variant, pair[which])
        figures = [
            renderers.render_perturbation_distribution(s, e, title=title) for s, e in zip(samples, pair, strict=True)
        ]
        return Drawn(share_axes(figures)[which], "The same scales on both sides.")

    return draw


def _phase_title(variant: Variant, epoch: int) -> str:
    name = reading.phase(reading.measured(variant), epoch).name
    return f"epoch {epoch:,}, {name}" if name else f"epoch {epoch:,}"


def _has(*analyzers: str) -> Callable[[Variant], bool]:
    return lambda variant: any(variant.epochs(analyzer) for analyzer in analyzers)


def _metrics(variant: Variant) -> dict[str, str]:
    """Those that the summary has; all of them where it cannot be read."""
    try:
        found = reading.summary(variant, FLATNESS)
    except UNREADABLE:
        found = None
    known = dict(renderers.FLATNESS_METRICS)
    return {name: label for name, label in known.items() if found is None or name in found.arrays} or known


def _choices(variant: Variant) -> dict[int, str]:
    measured = reading.measured(variant)
    named = ((epoch, reading.phase(measured, epoch).name) for epoch in reading.epochs(variant))
    return {epoch: f"{epoch:,} · {name}" if name else f"{epoch:,}" for epoch, name in named}


FORM = Option(
    "form",
    "Drawn as",
    lambda _: {"contour": "contour", "surface": "surface"},
    lambda _: "contour",
    radio=True,
)
PANELS = (
    Panel(
        "curves",
        "Training",
        lambda variant: (variant.path / "curves.npz").is_file(),
        (Plot("curves", "Training curves", _curves, selects=True),),
    ),
    Panel(
        "flatness",
        "Flatness over training",
        _has(FLATNESS),
        (Plot("flatness", "Flatness over training", _flatness, selects=True),),
        (
            Option(
                "metric",
                "Metric",
                _metrics,
                lambda variant: next(iter(_metrics(variant))),
            ),
        ),
    ),
    Panel(
        "distribution",
        "Perturbations at this epoch",
        _has(FLATNESS),
        (Plot("distribution", "Loss changes under random perturbations", _distribution, 350),),
    ),
    Panel(
        "plane",
        "Loss plane",
        _has(PLANE),
        (Plot("plane", "Loss on a plane through the weights", _plane, 480),),
        (FORM,),
    ),
    Panel(
        "trajectory",
        "The way through the landscape",
        lambda variant: (variant.folder(TRAJECTORY) / CROSS).is_file(),
        (Plot("trajectory", "Loss on the plane of the training trajectory", _trajectory, 480, selects=True),),
        (FORM,),
    ),
    Panel(
        "curvature",
        "Curvature over training",
        _has(CURVATURE),
        (Plot("curvature", "Curvature over training", _curvature, selects=True),),
    ),
    Panel(
        "dimensionality",
        "Effective dimensionality over training",
        _has(DIMENSION),
        (Plot("dimensionality", "Effective dimensionality over training", _dimension, selects=True),),
    ),
    Panel(
        "directional",
        "Directional losses",
        _has(DIRECTIONAL),
        (Plot("directional", "Losses along random directions", _directional),),
    ),
    Panel(
        "phases",
        "Two phases side by side",
        _has(FLATNESS, PLANE),
        (
            Plot("phases-planes", "Loss planes of two epochs", _two_planes, WIDE),
            Plot("phases-first", "Loss changes at the first epoch", _one_of_two(0), 350),
            Plot("phases-last", "Loss changes at the second epoch", _one_of_two(1), 350),
        ),
        (
            Option("first", "First epoch", _choices, lambda variant: _pair(variant, {})[0]),
            Option("last", "Second epoch", _choices, lambda variant: _pair(variant, {})[1]),
        ),
        wide=True,
    ),
)
