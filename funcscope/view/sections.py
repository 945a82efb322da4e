"""The sections of the demonstration's page: what is said, and the figure that shows it."""

from __future__ import annotations

import math

import numpy as np

from . import figures
from . import story as told
from .numbers import number, with_error
from .page import Chart, Quote, Section, Table
from .story import Story
from .theme import Timeline

VISIBLE_NOISE = 0.01
"""Rounding is drawn where it is at least this share of the mean curvature."""


def _timeline(story: Story) -> Timeline:
    return Timeline(int(story.array("curve_step")[-1]), story.marks)


def training(story: Story) -> Section:
    """Loss and accuracy over training."""
    step, loss = story.array("curve_step"), story.array("curve_test_loss")
    fig = figures.curves(
        step,
        {"train": story.array("curve_train_loss"), "test": loss},
        {"train": story.array("curve_train_accuracy"), "test": story.array("curve_test_accuracy")},
        story.array("step"),
        _timeline(story),
    )
    top, bottom = int(np.nanargmax(loss)), int(np.nanargmin(loss))
    text = (
        f"At the end the training loss is {number(story.array('curve_train_loss')[-1])} nats and the test loss {number(loss[-1])}. "
        f"The test loss is highest, {number(loss[top])}, at step {int(step[top]):,}, and lowest, {number(loss[bottom])}, "
        f"at step {int(step[bottom]):,}."
    )
    caption = "Loss and accuracy over training. Circles are the checkpoints at which the loss landscape was sampled."
    return Section("Training", [text, Chart(fig, caption)])


def curvature(story: Story) -> Section:
    """Mean curvature over training, then divided by the loss."""
    names = ("curvature_mean", "curvature_mean_stderr", "curvature_p10", "curvature_p90", "curvature_noise_floor")
    mean, stderr, p10, p90, noise = (story.column(name) for name in names)
    step, share = story.array("step"), noise / np.abs(mean)
    visible = np.where(share >= VISIBLE_NOISE, noise, np.nan)
    shown = np.isfinite(visible).any()
    fig = figures.curvature_trajectory(
        step, mean, stderr, p10, p90, _timeline(story), noise_floor=visible if shown else None
    )
    worst = int(np.nanargmax(share))
    caption = (
        "Second derivative of the training loss along random directions. "
        f"Rounding in float32 is of the order of {number(100 * share[worst], 2)} % of the mean at most (step {step[worst]:,})"
        + (f"; dotted where it reaches {VISIBLE_NOISE:.0%}." if shown else ", too small to draw.")
        + _not_on_log(step, mean, "mean")
        + _not_on_log(step, p10, "10th percentile")
    )
    base = story.column("baseline_loss")
    per_nat = figures.trajectory_with_error(
        step,
        mean / base,
        stderr / base,
        _timeline(story),
        name="mean",
        log=True,
        y_title="curvature / loss (per relative step²)",
    )
    return Section(
        "Curvature",
        [told.curvature_change(story), Chart(fig, caption), told.curvature_and_loss(story),
         Chart(per_nat, "Mean curvature divided by the training loss of the same checkpoint.")],
    )  # fmt: skip


def _not_on_log(step: np.ndarray, values: np.ndarray, name: str) -> str:
    found = [f"{number(values[i])} at step {step[i]:,}" for i in np.flatnonzero(values <= 0)]
    return f" Not on a logarithmic axis: the {name}, {', '.join(found)}." if found else ""


def lines(story: Story) -> Section:
    """The loss on lines through three checkpoints."""
    alpha, losses, steps = (story.array(f"profile_{name}") for name in ("alpha", "loss", "step"))
    phases = [_phase(story, int(step)) for step in steps]
    uniform = math.log(story.config["p"])
    fig = figures.line_profiles(
        alpha.astype(np.float64),
        losses.astype(np.float64),
        [f"<b>{name}</b><br>step {step:,}" for name, step in zip(phases, steps, strict=True)],
        span=story.settings["span"],
        level=(uniform, f"ln {story.config['p']}"),
    )
    middle = len(alpha) // 2
    rises = losses[:, :, [0, -1]] - losses[:, :, middle, None]
    medians = figures.quantiles(rises.reshape(len(steps), -1).astype(np.float64), (0.5,))[0]
    said = ", ".join(f"{number(rise)} nats at step {step:,}" for rise, step in zip(medians, steps, strict=True))
    lost = int((~np.isfinite(losses)).sum())
    text = f"At a relative step of {alpha[-1]:g} the loss changes by a median of {said}."
    text += f" {lost:,} of {losses.size:,} losses are not finite; they are holes." if lost else ""
    caption = (
        f"Training loss along {losses.shape[1]} random directions through three checkpoints. Grey: the span of ±{story.settings['span']:g} "
        f"sampled elsewhere on this page. Dotted: ln {story.config['p']} = {number(uniform)} nats, the loss of a uniform guess."
    )
    return Section("The loss along lines", [text, Chart(fig, caption)])


def _phase(story: Story, step: int) -> str:
    if step == story.rows[0]["step"]:
        return "start"
    if step == story.rows[-1]["step"]:
        return "end"
    return "memorised" if story.memorised is not None and step >= story.memorised else "on the way"


def distribution(story: Story) -> Section:
    """Loss changes at both ends of the span, per checkpoint."""
    step, span = story.array("step"), story.settings["span"]
    sides = {f"+{span:g}": story.deltas("losses"), f"−{span:g}": story.deltas("losses_negative")}
    fig = figures.delta_distribution(step, sides, _timeline(story), y_title="loss change (nats)")
    medians = figures.quantiles(sides[f"+{span:g}"], (0.5,))[0]
    shown = ([] if story.reference is None else [story.reference]) + [len(step) - 1]
    said = " and ".join(f"{number(medians[i])} nats at step {step[i]:,}" for i in shown)
    caption = "Thin line: all directions. Thick line: the middle half. Dot: the median. "
    downhill = [
        (int(at), int((values[i] <= 0).sum()), name) for name, values in sides.items() for i, at in enumerate(step)
    ]
    found = [f"{count} at {name} at step {at:,}" for at, count, name in downhill if count]
    if found:
        caption += f"Directions that do not raise the loss, below a logarithmic axis: {', '.join(found)}. "
    return Section(
        f"Loss changes at a relative step of {span:g}",
        [f"The median change at +{span:g} is {said}.", Chart(fig, caption + _lost(story))],
    )


def _lost(story: Story) -> str:
    lost = [(row["step"], row["n_nonfinite_pos"], row["n_nonfinite_neg"]) for row in story.rows]
    found = [f"step {step:,}: {pos} at + and {neg} at −" for step, pos, neg in lost if pos or neg]
    return f"Losses that are not finite, left out: {'; '.join(found)}." if found else "Every sampled loss is finite."


def roughness(story: Story) -> Section:
    """Roughness over training, and why it does not rank models."""
    value, stderr = story.column("landscape_roughness"), story.column("landscape_roughness_stderr")
    fig = figures.trajectory_with_error(
        story.array("step"), value, stderr, _timeline(story), name="roughness", y_title="roughness (sd / |mean|)"
    )
    first, last = story.rows[story.reference or 0], story.rows[-1]
    text = (
        "Roughness is the standard deviation of the loss over directions divided by the absolute value of its mean. "
        "It rises when the mean loss falls, so it does not rank models. "
        f"From step {first['step']:,} to step {last['step']:,} the standard deviation goes from {number(first['loss_std'])} to "
        f"{number(last['loss_std'])} nats, the mean from {number(first['loss_mean'])} to {number(last['loss_mean'])} nats, and "
        f"the roughness from {_of(first, 'landscape_roughness')} to {_of(last, 'landscape_roughness')}."
    )
    caption = f"Losses at +{story.settings['span']:g}. Intervals are ±1.96 jackknife standard errors; a wide one may cross zero."
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
        "curvature and higher orders move the loss, or that there are too few directions; it does not say that the gradient is wrong."
    )
    noted = [row for row in story.rows if row["note"] and row["dir_grad_delta_corr"] is not None]
    lowest = min(noted, key=lambda row: row["dir_grad_delta_corr"], default=None)
    quote = (
        []
        if lowest is None
        else [Quote(lowest["note"], f"The note stored with step {lowest['step']:,}, the lowest value")]
    )
    caption = (
        f"{len(noted)} of {len(story.rows)} checkpoints carry such a note."
        if noted
        else "No checkpoint carries a note."
    )
    return Section("Gradient-delta correlation", [text, *quote, Chart(fig, caption)])


def table(story: Story) -> Section:
    """Every checkpoint with its errors."""
    columns: list[tuple[str, str]] = [
        ("curvature", "curvature_mean"),
        ("loss change", "delta_mean"),
        ("sd of change", "delta_std"),
        ("roughness", "landscape_roughness"),
        ("correlation", "dir_grad_delta_corr"),
    ]
    plain = [("10th pct", "curvature_p10"), ("90th pct", "curvature_p90"), ("rounding", "curvature_noise_floor")]
    headers = [
        "step",
        "train loss",
        "test loss",
        "train acc",
        "test acc",
        *(head for head, _ in columns + plain),
        "not finite",
    ]
    rows = [
        [
            f"{row['step']:,}",
            *(number(row[name]) for name in ("train_loss", "test_loss")),
            *(f"{row[name]:.3f}" for name in ("train_accuracy", "test_accuracy")),
            *(_of(row, name) for _, name in columns),
            *(number(row[name]) for _, name in plain),
            f"{row['n_nonfinite_pos']} + {row['n_nonfinite_neg']}",
        ]
        for row in story.rows
    ]
    text = (
        f"Losses in nats, curvatures in nats per relative step²; loss changes at +{story.settings['span']:g}. ± is one standard error "
        "over directions. The percentiles are those of the curvature over directions, rounding is what float32 can do to one "
        "curvature. Not finite: losses at + and at −."
    )
    return Section("All checkpoints", [text, Table(headers, rows)])


def _of(row: dict, name: str) -> str:
    return with_error(row[name], row[f"{name}_stderr"])
