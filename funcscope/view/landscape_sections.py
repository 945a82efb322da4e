"""Sections of the demonstration's page: both phases side by side, flatness, the whole run on a plane, a path through it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from ..study.demo import EPSILON
from . import story as told
from .numbers import number, with_error
from .page import Chart, Section, Table
from .renderers import (
    render_barrier,
    render_contour,
    render_dimensionality_trajectory,
    render_flatness_trajectory,
    render_perturbation_distribution,
    render_planes_side_by_side,
)
from .story import Story

RESOLVED = 10
"""A mean is resolved where it is so many times what rounding does."""
AGREE = 0.1
"""Relative difference up to which a measured mean and its expectation are called the same."""


def sections(story: Story) -> list[Section]:
    """All of them; none for numbers that were stored without a landscape."""
    if "trajectory_grid_losses" not in story.stored.arrays:
        return []
    return [planes(story), flatness(story), lengths(story), trajectory(story), path(story), dimensionality(story)]


def planes(story: Story) -> Section:
    """The loss on the same random plane through the memorising and the generalising phase."""
    steps = _phases(story)
    drawn = [_part(story, f"plane_{step}_") for step in steps]
    fig = render_planes_side_by_side(drawn, [f"{_name(story, step)}, step {step:,}" for step in steps])
    ends = ", ".join(
        f"{number(float(np.nanmedian(_edge(plane['grid_losses']))))} nats at step {step:,}"
        for plane, step in zip(drawn, steps, strict=True)
    )
    centres = ", ".join(
        f"{number(float(plane['baseline_loss']))} nats at step {step:,}"
        for plane, step in zip(drawn, steps, strict=True)
    )
    lost = sum(int(plane["n_nonfinite"]) for plane in drawn)
    text = (
        f"Training loss on a plane of two random directions, the same draws for both phases. In the centre it is {centres}; "
        f"on the rim of the square its median is {ends}."
    )
    text += f" {lost:,} points are not finite and left open." if lost else ""
    caption = (
        "The two directions are scaled filter by filter to the weights of each checkpoint and are orthogonal, so that the "
        "distances are shares of the weights’ own norm. One colour scale for both."
    )
    return Section("Two phases side by side", [text, Chart(fig, caption)])


def flatness(story: Story) -> Section:
    """Mean loss change in a step of fixed length over training, and its distribution in both phases."""
    summary = _part(story, "flatness_")
    steps = _phases(story)
    at = {int(step): i for i, step in enumerate(summary["step"])}
    said = ", ".join(
        f"{with_error(summary['mean_delta_loss'][at[step]], summary['mean_delta_loss_stderr'][at[step]])} nats at "
        f"step {step:,} ({number(float(summary['epsilon_relative'][at[step]]), 2)} of ‖θ‖)"
        for step in steps
    )
    fig = render_flatness_trajectory(summary, steps[0], title="Mean loss change over training")
    blocks: list[Any] = [
        f"A random step of length {EPSILON:g} raises the training loss by {said} on average. The step has one length while "
        "the weights’ norm changes: its share of the norm is given with it.",
        Chart(fig, "Mean over random directions of norm 1, the same ones at every checkpoint. The vertical line is the "
              "memorising phase below."),
    ]  # fmt: skip
    for step in steps:
        data = _part(story, f"changes_{step}_") | {
            name: float(values[at[step]]) for name, values in summary.items() if np.ndim(values) == 1
        }
        fig = render_perturbation_distribution(data, step, title=f"{_name(story, step)}, step {step:,}")
        blocks.append(Chart(fig, f"Loss changes in steps of length {EPSILON:g} at step {step:,}."))
    return Section("Flatness", blocks)


def lengths(story: Story) -> Section:
    """Where the mean loss change is what the Hessian says, and where kinks make it larger."""
    rows, told_apart = [], []
    for step in _phases(story):
        data = _part(story, f"lengths_{step}_")
        mean, expected = data["pair_mean"], data["expected_delta_loss"]
        ratio = told.ratio(mean, expected)
        parts = (told.ratio(data[f"{name}_stderr"], data[name]) for name in ("pair_mean", "expected_delta_loss"))
        error = np.hypot(*parts) * np.abs(ratio)
        lost = np.abs(mean) < RESOLVED * float(data["rounding_delta_loss"])
        rows += [
            [
                f"{step:,}",
                f"{data['epsilon'][i]:g}",
                with_error(mean[i], data["pair_mean_stderr"][i]),
                with_error(expected[i], data["expected_delta_loss_stderr"][i]),
                "lost in rounding" if lost[i] else with_error(ratio[i], error[i]),
            ]
            for i in range(len(mean))
        ]
        told_apart.append(_parting(step, data["epsilon"][~lost], ratio[~lost], error[~lost]))
    text = (
        "For a smooth loss the mean loss change in steps of length ε is ε² tr(H) / 2P up to order ε⁴. This network has ReLU "
        "units: a step crosses kinks between the linear pieces, which the Hessian does not contain and which enter at the "
        "same order, but for steps that are short against the distance to the next kink; units whose weights have decayed "
        f"to almost nothing have kinks at every distance. {' '.join(told_apart)}"
    )
    headers = ["step", "ε", "mean change (nats)", "ε² tr(H) / 2P (nats)", "ratio"]
    below = (
        "Computed in float64: float32 does not resolve the loss changes of the shortest steps. “Lost in rounding”: the mean "
        f"is below {RESOLVED} times what rounding makes of steps that are far too short to change the loss."
    )
    return Section("Flatness and the trace of the Hessian", [text, Table(headers, rows), below])


def trajectory(story: Story) -> Section:
    """The training run on the plane of its two principal directions."""
    data = _part(story, "trajectory_")
    walk = {"coordinates": data["coordinates"], "step": data["step"]}
    fig = render_contour(data, walk, title="The run on its own plane", current=int(data["step"][-1]))
    shares = " and ".join(f"{100 * share:.0f} %" for share in data["explained"][:2])
    off = float(np.nanmax(data["residuals"]) / data["param_norm"]) if data["param_norm"] else math.nan
    text = (
        f"The two principal directions of the checkpoints, seen from the last one, hold {shares} of the squared distances. "
        f"Checkpoints lie up to {number(off, 2)} ‖θ‖ off this plane, so that the loss under a dot is not the loss there."
    )
    caption = "Training loss on the plane through the last checkpoint (star), and the checkpoints projected on it."
    return Section("The whole run on one plane", [text, Chart(fig, caption)])


def path(story: Story) -> Section:
    """The straight line from memorising to generalising."""
    data = _part(story, "path_")
    start, end = int(data["start_step"]), int(data["end_step"])
    fig = render_barrier(data | {"kind": "line"}, title=f"From step {start:,} to step {end:,} in a straight line")
    barrier = with_error(float(data["barrier_linear"]), float(data["barrier_linear_stderr"]))
    text = (
        f"Between the weights that know the training pairs by heart (step {start:,}) and the last ones (step {end:,}) the "
        f"training loss rises to {number(float(np.nanmax(data['losses'])))} nats on the straight line, a barrier of "
        f"{barrier} nats over the chord; the error is over training pairs."
    )
    caption = (
        f"Training loss at {len(data['coefficients'])} points of the line, with 95 % intervals. Dashed: the chord between "
        "the ends, which a convex loss would stay below."
    )
    return Section("From memorising to generalising", [text, Chart(fig, caption)])


def dimensionality(story: Story) -> Section:
    """How many directions the weight matrices use."""
    names = story.stored.meta["matrices"]
    data = _part(story, "dimensionality_")
    steps = _phases(story)
    fig = render_dimensionality_trajectory(data, steps[0], names)
    at = {int(step): i for i, step in enumerate(data["step"])}
    first, last = (data["participation_ratio"][at[step]] for step in steps)
    falls = [name for name, a, b in zip(names, first, last, strict=True) if b < a]
    text = (
        f"From step {steps[0]:,} to the end the participation ratio falls in {len(falls)} of {len(names)} weight matrices; "
        f"that of {names[_most(first, last)]} changes most, from {number(float(first[_most(first, last)]))} to "
        f"{number(float(last[_most(first, last)]))}."
    )
    caption = "Participation ratio (Σσ²)² / Σσ⁴ of the singular values: k for k equal ones."
    return Section("Dimensions of the weights", [text, Chart(fig, caption)])


def _phases(story: Story) -> tuple[int, int]:
    """The steps that are called memorising and generalising here."""
    _, memorised, last = story.stored.meta["phases"]
    return memorised, last


def _name(story: Story, step: int) -> str:
    if step == story.rows[-1]["step"]:
        return "generalising" if story.generalised is not None else "at the end"
    return "memorising" if story.memorised is not None and step >= story.memorised else "half way"


def _part(story: Story, prefix: str) -> dict[str, Any]:
    """The arrays whose name has this prefix, under the rest of their name."""
    found = {name.removeprefix(prefix): value for name, value in story.stored.arrays.items() if name.startswith(prefix)}
    for start, names in story.stored.meta["axis_names"].items():
        if prefix.startswith(start):
            found["axis_names"] = names
    return found


def _edge(grid: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " k"]:
    edge = np.concatenate([grid[0], grid[-1], grid[1:-1, 0], grid[1:-1, -1]])
    return np.where(np.isfinite(edge), edge, np.nan)


def _most(first: Float[np.ndarray, " k"], last: Float[np.ndarray, " k"]) -> int:
    return int(np.nanargmax(np.abs(np.log(told.ratio(last, first)))))


def _parting(
    step: int, epsilon: Float[np.ndarray, " m"], ratio: Float[np.ndarray, " m"], error: Float[np.ndarray, " m"]
) -> str:
    """In words: at which lengths the two are apart by more than a tenth and more than chance."""
    apart = [i for i in range(len(ratio)) if abs(ratio[i] - 1) > max(AGREE, 1.96 * error[i])]
    if not len(ratio):
        return f"At step {step:,} rounding decides at every length."
    if not apart:
        return f"At step {step:,} the two agree at every length that is resolved, within the errors."
    low, high = (number(float(ratio[i]), 2) for i in (apart[0], apart[-1]))
    where = f"from ε = {epsilon[apart[0]]:g} on" if apart == list(range(apart[0], len(ratio))) else "at some lengths"
    ends = f"the ratio is {low} at ε = {epsilon[apart[0]]:g} and {high} at {epsilon[apart[-1]]:g}"
    return f"At step {step:,} the two part {where}: {ends}."
