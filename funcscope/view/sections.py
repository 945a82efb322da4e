"""The sections of the demonstration's page: what is said, and the figure that shows it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from . import figures
from . import story as told
from .numbers import number, with_error
from .page import Chart, Quote, Section, Table
from .story import Story
from .theme import Timeline

VISIBLE_NOISE = 0.01
"""Rounding is drawn where it is at least this share of the mean curvature."""


def training(story: Story) -> Section:
    """Loss and accuracy over training."""
    step = story.array("curve_step")
    loss, accuracy = (
        {split: story.array(f"curve_{split}_{name}") for split in ("train", "test")} for name in ("loss", "accuracy")
    )
    fig = figures.curves(step, loss, accuracy, story.array("step"), _timeline(story))
    text = f"At the end the training loss is {_nats(loss['train'][-1])} and the test loss {_nats(loss['test'][-1])}."
    if (top := told.largest(loss["test"])) is not None and (bottom := told.largest(-loss["test"])) is not None:
        text += (
            f" The test loss is highest at step {int(step[top]):,}, {_nats(loss['test'][top])}, "
            f"and lowest at step {int(step[bottom]):,}, {_nats(loss['test'][bottom])}."
        )
    caption = "Loss and accuracy over training. Circles are the checkpoints at which the loss landscape was sampled."
    return Section("Training", [text, Chart(fig, caption)])


def curvature(story: Story) -> Section:
    """Mean curvature over training, and the same divided by the loss."""
    mean, stderr, p10, p90 = (story.column(f"curvature_{name}") for name in ("mean", "mean_stderr", "p10", "p90"))
    step, noise = story.array("step"), story.column("curvature_noise_floor")
    share = told.ratio(noise, np.abs(mean))
    drawn = np.where(share >= VISIBLE_NOISE, noise, np.nan) if (share >= VISIBLE_NOISE).any() else None
    fig = figures.curvature_trajectory(step, mean, stderr, p10, p90, _timeline(story), noise_floor=drawn)
    caption = (
        f"Second derivative of the training loss along random directions.{_rounding(step, share)}"
        f"{_not_on_log(step, mean, 'mean')}{_not_on_log(step, p10, '10th percentile')}"
    )
    relative = figures.trajectory_with_error(
        step,
        *told.per_nat(story),
        _timeline(story),
        name="mean",
        log=True,
        y_title="curvature / loss (per relative step²)",
    )
    beside = Chart(relative, "Mean curvature divided by the training loss of the same checkpoint.")
    return Section(
        "Curvature", [told.curvature_peak(story), Chart(fig, caption), told.curvature_and_loss(story), beside]
    )


def sharpness(story: Story) -> Section:
    """Largest eigenvalue and trace of the Hessian, and SAM's sharpness relative to the loss."""
    step = story.array("step")
    top, trace, sam = (story.column(name) for name in ("hessian_max_eigenvalue", "hessian_trace", "sam_relative"))
    errors = (
        story.column("hessian_max_eigenvalue_residual"),
        figures.Z95 * story.column("hessian_trace_stderr"),
        figures.Z95 * story.column("sam_relative_stderr"),
    )
    fig = figures.hessian_and_sharpness(step, (top, trace, sam), errors, _timeline(story))
    caption = (
        "Above: trace and largest eigenvalue of the Hessian of the training loss, in nats per unit of distance². Below: the "
        f"rise of that loss in a step of {told.SAM_STEP:g} up its gradient, divided by the loss. Bars: 1.96 standard errors, "
        "over random signs for the trace and over training pairs for the sharpness; the residual for the eigenvalue. Most "
        "are smaller than the dots. The network has ReLU units: this is the Hessian of its linear pieces, and the kinks "
        f"between them, which a finite step crosses, are not in it.{_not_on_log(step, top, 'largest eigenvalue')}"
        f"{_not_on_log(step, trace, 'trace')}{_not_on_log(step, sam, 'sharpness')}"
    )
    return Section("Hessian and sharpness", [told.sharpness_change(story), Chart(fig, caption)])


def lines(story: Story) -> Section:
    """The loss on lines through three checkpoints."""
    alpha, losses = (story.array(f"profile_{name}").astype(np.float64) for name in ("alpha", "loss"))
    steps, span, p = story.array("profile_step"), story.settings["span"], story.config["p"]
    titles = [f"<b>{_phase(story, int(step))}</b><br>step {step:,}" for step in steps]
    fig = figures.line_profiles(alpha, losses, titles, span=span, level=(math.log(p), f"ln {p}"))
    rises = losses[:, :, [0, -1]] - losses[:, :, len(alpha) // 2, None]
    medians = figures.quantiles(rises.reshape(len(steps), -1), (0.5,))[0]
    said = ", ".join(f"{_nats(rise)} at step {step:,}" for rise, step in zip(medians, steps, strict=True))
    lost = int((~np.isfinite(losses)).sum())
    text = f"At a relative step of {alpha[-1]:g} the median change of the loss is {said}."
    text += f" {lost:,} of {losses.size:,} losses are not finite and left out." if lost else ""
    caption = (
        f"Training loss along {losses.shape[1]} random directions through three checkpoints. "
        f"Grey: the span of ±{span:g} that is sampled in the other sections. "
        f"Dotted: ln {p} = {_nats(math.log(p))}, the loss of a uniform guess."
    )
    return Section("The loss along lines", [text, Chart(fig, caption)])


def distribution(story: Story) -> Section:
    """Loss changes at both ends of the span, per checkpoint."""
    step, span = story.array("step"), story.settings["span"]
    sides = {f"+{span:g}": story.deltas("losses"), f"−{span:g}": story.deltas("losses_negative")}
    fig = figures.delta_distribution(step, sides, _timeline(story), y_title="loss change (nats)")
    medians = figures.quantiles(sides[f"+{span:g}"], (0.5,))[0]
    shown = [i for i in (story.reference, len(step) - 1) if i is not None]
    said = " and ".join(f"{_nats(medians[i])} at step {step[i]:,}" for i in shown)
    caption = "Thin line: all directions. Thick line: the middle half. Dot: the median. "
    caption += f"{_downhill(step, sides)}{_lost(story)}"
    title = f"Loss changes at a relative step of {span:g}"
    return Section(title, [f"The median change at +{span:g} is {said}.", Chart(fig, caption)])


def roughness(story: Story) -> Section:
    """Roughness over training, and why it does not rank models."""
    value, stderr = story.column("landscape_roughness"), story.column("landscape_roughness_stderr")
    fig = figures.trajectory_with_error(
        story.array("step"), value, stderr, _timeline(story), name="roughness", y_title="roughness (sd / |mean|)"
    )
    first, last = story.rows[story.reference or 0], story.rows[-1]
    text = (
        "Roughness is sd / |mean| of the loss over directions. It rises when the mean loss falls faster than the "
        f"standard deviation, so it does not rank models. From step {first['step']:,} to step {last['step']:,} the "
        f"standard deviation goes from {_nats(first['loss_std'])} to {_nats(last['loss_std'])}, the mean "
        f"from {_nats(first['loss_mean'])} to {_nats(last['loss_mean'])}, and the roughness "
        f"from {_of(first, 'landscape_roughness')} to {_of(last, 'landscape_roughness')}."
    )
    caption = f"Losses at +{story.settings['span']:g}. Intervals: 1.96 jackknife standard errors on each side."
    if (value < figures.Z95 * stderr).any():
        caption += " They are symmetric, so that a wide one reaches below zero."
    return Section("Roughness", [text, Chart(fig, caption)])


def correlation(story: Story) -> Section:
    """How well slopes predict loss changes, and what it means when they do not."""
    value, stderr = story.column("dir_grad_delta_corr"), story.column("dir_grad_delta_corr_stderr")
    num = story.column("n_samples_for_corr")
    chance = figures.Z95 / np.sqrt(np.where(num > 1, num - 1, np.nan))
    fig = figures.trajectory_with_error(
        story.array("step"), value, stderr, _timeline(story), name="correlation", y_title="correlation", chance=chance
    )
    text = (
        "This is the correlation, over directions, between the slope at the checkpoint and the loss change at "
        f"+{story.settings['span']:g}. Near 1 the gradient predicts the change. A low value says that at this distance "
        "curvature and higher orders move the loss, or that there are too few directions to tell. It does not say that "
        "the gradient is wrong."
    )
    noted = sum(row["note"] is not None for row in story.rows)
    caption = (
        "Grey: where 95 % of the correlations of unrelated numbers lie, for this many directions. "
        f"{noted} of {len(story.rows)} checkpoints carry a note on their value."
    )
    return Section("Gradient-delta correlation", [text, *_lowest_note(story), Chart(fig, caption)])


def table(story: Story) -> Section:
    """Every checkpoint with its errors."""
    measured = {
        "curvature": "curvature_mean",
        "loss change": "delta_mean",
        "roughness": "landscape_roughness",
        "correlation": "dir_grad_delta_corr",
    }
    plain = {"10th pct": "curvature_p10", "90th pct": "curvature_p90", "rounding": "curvature_noise_floor"}
    headers = ["step", "train loss", "test loss", "train acc", "test acc", *measured, *plain, "not finite"]
    rows = [
        [
            f"{row['step']:,}",
            *(number(row[f"{split}_loss"]) for split in ("train", "test")),
            *(f"{row[f'{split}_accuracy']:.3f}" for split in ("train", "test")),
            *(_of(row, name) for name in measured.values()),
            *(number(row[name]) for name in plain.values()),
            f"{row['n_nonfinite_pos']} + {row['n_nonfinite_neg']}",
        ]
        for row in story.rows
    ]
    text = (
        f"Losses in nats, curvatures in nats per relative step², loss changes at +{story.settings['span']:g}. ± is one "
        "standard error over directions. The percentiles are those of the curvature over directions; rounding is what "
        "float32 can do to one curvature; not finite are the losses at + and at −."
    )
    return Section("All checkpoints", [text, Table(headers, rows)])


def _timeline(story: Story) -> Timeline:
    return Timeline(int(story.array("curve_step")[-1]), story.marks)


def _nats(value: float | None) -> str:
    return f"{number(value)} nats"


def _of(row: dict[str, Any], name: str) -> str:
    return with_error(row[name], row[f"{name}_stderr"])


def _rounding(step: Int[np.ndarray, " k"], share: Float[np.ndarray, " k"]) -> str:
    if (worst := told.largest(share)) is None:
        return ""
    text = f" Rounding in float32 is of the order of {number(100 * share[worst], 2)} % of the mean at most "
    text += f"(step {step[worst]:,})"
    seen = share[worst] >= VISIBLE_NOISE
    return text + (f"; dotted where it reaches {100 * VISIBLE_NOISE:g} %." if seen else ", too small to draw.")


def _not_on_log(step: Int[np.ndarray, " k"], values: Float[np.ndarray, " k"], name: str) -> str:
    found = [f"{number(values[i])} at step {step[i]:,}" for i in np.flatnonzero(values <= 0)]
    return f" Not on a logarithmic axis: the {name}, {', '.join(found)}." if found else ""


def _phase(story: Story, step: int) -> str:
    if step in (story.rows[0]["step"], story.rows[-1]["step"]):
        return "start" if step == story.rows[0]["step"] else "end"
    if story.generalised is not None and step >= story.generalised:
        return "generalised"
    return "memorising" if story.memorised is not None and step >= story.memorised else "on the way"


def _downhill(step: Int[np.ndarray, " k"], sides: dict[str, Float[np.ndarray, "k n"]]) -> str:
    """Changes that are not on the axis, counted."""
    found = [
        f"{int((values[i] <= 0).sum())} of {len(values[i])} at {name} at step {at:,}"
        for i, at in enumerate(step)
        for name, values in sides.items()
        if (values[i] <= 0).any()
    ]
    return f"Directions that do not raise the loss are below a logarithmic axis: {', '.join(found)}. " if found else ""


def _lost(story: Story) -> str:
    lost = [(row["step"], row["n_nonfinite_pos"], row["n_nonfinite_neg"]) for row in story.rows]
    found = [f"{pos} at + and {neg} at − at step {step:,}" for step, pos, neg in lost if pos or neg]
    return f"Losses that are not finite, left out: {'; '.join(found)}." if found else "Every sampled loss is finite."


def _lowest_note(story: Story) -> list[Quote]:
    """The stored note of the lowest correlation."""
    noted = [row for row in story.rows if row["note"] is not None and row["dir_grad_delta_corr"] is not None]
    lowest = min(noted, key=lambda row: row["dir_grad_delta_corr"], default=None)
    return [] if lowest is None else [Quote(lowest["note"], f"Stored with step {lowest['step']:,}, the lowest value.")]
