"""The panels of the page, in its order. A panel reads the summary, or the file of one step (of two or three to compare)."""

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


def _stored(variant: Variant, analyzer: str, step: int, what: str) -> dict[str, Any]:
    found = reading.artifact(variant, analyzer, step)
    if found is None:
        near = reading.nearest(variant.steps(analyzer), step)
        raise Absent(f"No {what} is stored at step {step:,}; the nearest is at step {near:,}.")
    summary, made_with = reading.summary(variant, analyzer), found["made_with"]
    wanted = summary.settings.get("settings", made_with) if summary is not None else made_with
    if other := [f"{name} {made_with.get(name)}" for name in wanted if made_with.get(name) != wanted[name]]:
        raise Absent(f"The {what} at step {step:,} was made with other settings ({', '.join(other)}) than the summary.")
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
    now = reading.phase(measured, view.step)
    at = f"At step {view.step:,}: train accuracy {now.train:.3f}, test accuracy {now.test:.3f}"
    return Drawn(
        renderers.render_training_curves(measured, current_epoch=view.step),
        "" if math.isnan(now.train) else f"{at}{f' ({now.name})' if now.name else ''}.",
    )


def _flatness(view: View) -> Drawn:
    found = _summary(view.variant, FLATNESS)
    metric = view.options.get("metric") or "mean_delta_loss"
    return Drawn(renderers.render_flatness_trajectory(found.arrays, view.step, metric=metric))


def _distribution(view: View) -> Drawn:
    data = _stored(view.variant, FLATNESS, view.step, "sample of perturbations")
    return Drawn(renderers.render_perturbation_distribution(data, view.step))


def _plane(view: View) -> Drawn:
    near = reading.nearest(view.variant.steps(PLANE), view.step)
    plane = _stored(view.variant, PLANE, near, "plane")
    render = renderers.render_surface if view.options.get("form") == "surface" else renderers.render_contour
    at = "" if near == view.step else f" It is the nearest to step {view.step:,} that is stored."
    return Drawn(render(plane, title=f"Loss plane at step {near:,}"), f"Plane at step {near:,}.{at}")


def _trajectory(view: View) -> Drawn:
    found = reading.cross(view.variant, TRAJECTORY)
    if found is None:
        raise Absent("The plane of the trajectory is not written yet.")
    steps = [int(step) for step in found["step"]]
    near = reading.nearest(tuple(steps), view.step)
    render = renderers.render_surface if view.options.get("form") == "surface" else renderers.render_contour
    fig = render(found, trajectory=found, current=near, title="Loss on the plane of the trajectory")
    share = 100 * float(sum(found["explained"]))
    held = f"The two axes hold {share:.0f} % of the squared distances to the last checkpoint."
    return Drawn(fig, f"Step {near:,} is marked. {held}")


def _curvature(view: View) -> Drawn:
    return Drawn(renderers.render_curvature_trajectory(_summary(view.variant, CURVATURE).arrays, view.step))


def _dimension(view: View) -> Drawn:
    found = _summary(view.variant, DIMENSION)
    return Drawn(
        renderers.render_dimensionality_trajectory(found.arrays, view.step, tuple(found.settings.get("matrices", ())))
    )


def _directional(view: View) -> Drawn:
    """The step between the two phases; three files, however many steps there are."""
    stored = view.variant.steps(DIRECTIONAL)
    near = reading.nearest(stored, view.step)
    chosen = sorted({*reading.phases(reading.measured(view.variant), stored), near})
    results = [_stored(view.variant, DIRECTIONAL, step, "sample of directions") for step in chosen]
    at = "" if near == view.step else f" Step {near:,} is the nearest to step {view.step:,} that is stored."
    return Drawn(
        renderers.render_directional_violin(results, names=[f"step {step:,}" for step in chosen]),
        f"The step, between the memorising phase and the last one.{at}",
    )


def _pair(variant: Variant, options: Mapping[str, Any]) -> tuple[int, int]:
    """The two steps that are compared; at first those of the phases, of steps with a plane where these have both."""
    found, planes = reading.measured(variant), variant.steps(PLANE)
    memorising = any(reading.phase(found, step).name == "memorising" for step in planes)
    first, last = reading.phases(found, planes if memorising else reading.steps(variant))
    return int(options.get("first", first)), int(options.get("last", last))


def _two_planes(view: View) -> Drawn:
    pair = [reading.nearest(view.variant.steps(PLANE), step) for step in _pair(view.variant, view.options)]
    planes = [_stored(view.variant, PLANE, step, "plane") for step in pair]
    titles = [_phase_title(view.variant, step) for step in pair]
    moved = "" if tuple(pair) == _pair(view.variant, view.options) else " The nearest steps that have a plane."
    fig = renderers.render_planes_side_by_side(planes, titles, height=WIDE)
    return Drawn(fig, f"One colour scale for both.{moved}")


def _one_of_two(which: int) -> Callable[[View], Drawn]:
    def draw(view: View) -> Drawn:
        pair = _pair(view.variant, view.options)
        samples = [_stored(view.variant, FLATNESS, step, "sample of perturbations") for step in pair]
        title = _phase_title(view.variant, pair[which])
        figures = [
            renderers.render_perturbation_distribution(s, e, title=title) for s, e in zip(samples, pair, strict=True)
        ]
        return Drawn(share_axes(figures)[which], "The same scales on both sides.")

    return draw


def _phase_title(variant: Variant, step: int) -> str:
    name = reading.phase(reading.measured(variant), step).name
    return f"step {step:,}, {name}" if name else f"step {step:,}"


def _has(*analyzers: str) -> Callable[[Variant], bool]:
    return lambda variant: any(variant.steps(analyzer) for analyzer in analyzers)


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
    named = ((step, reading.phase(measured, step).name) for step in reading.steps(variant))
    return {step: f"{step:,} · {name}" if name else f"{step:,}" for step, name in named}


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
        "Perturbations at this step",
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
            Plot("phases-planes", "Loss planes of two steps", _two_planes, WIDE),
            Plot("phases-first", "Loss changes at the first step", _one_of_two(0), 350),
            Plot("phases-last", "Loss changes at the second step", _one_of_two(1), 350),
        ),
        (
            Option("first", "First step", _choices, lambda variant: _pair(variant, {})[0]),
            Option("last", "Second step", _choices, lambda variant: _pair(variant, {})[1]),
        ),
        wide=True,
    ),
)
