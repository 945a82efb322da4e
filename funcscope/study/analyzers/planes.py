"""The landscape around checkpoints, on the plane of the whole training run, and on the path between its phases."""

from __future__ import annotations

import numpy as np
import torch

from ...core.directions import directions, stack
from ...core.keys import fold_in, key
from ...families.phases import phases
from ...landscape.axes import plane_directions, principal_directions
from ...landscape.path import linear_path
from ...landscape.planes import loss_lines, loss_plane
from ..analyzer import Analyzer, Subject, Subjects, Values

SUMMARY = ("roughness", "loss_min", "loss_max", "n_nonfinite")
MARGIN = 0.25
"""Of the plane through a trajectory: how far it goes beyond it, as a share of its extent."""


def plane(subject: Subject, *, num: int, span: float, normalize: str, split: str, seed: int) -> Values:
    """`fs.loss_plane` around one checkpoint, along the same two random draws at every checkpoint."""
    params = subject.net.layout.unravel(subject.theta)
    axes = plane_directions(subject.net, key=key(seed), normalize=normalize, base=params)  # type: ignore[arg-type]
    return loss_plane(subject.loss(split), subject.theta, axes, num=num, span=span).asdict()


def lines(subjects: Subjects, *, num_directions: int, num: int, span: float, split: str, seed: int) -> Values:
    """`fs.loss_lines` through the start, the phase of memorising and the end, a few directions each."""
    steps = phases(subjects.steps, subjects.curves)
    found = []
    for subject in (subjects[step] for step in steps):
        params = subject.net.layout.unravel(subject.theta)
        rows = stack(directions(subject.net, key=fold_in(key(seed), "profiles"), num=num_directions, base=params))
        found.append(loss_lines(subject.loss(split), subject.theta, rows, num=num, span=span).asdict())
    return {
        "alpha": found[0]["axis_values"],
        "step": np.array(steps),
        "loss": np.stack([one["losses"] for one in found]),
        "delta_stderr": np.stack([one["delta_stderr"] for one in found]),
    }


def trajectory(subjects: Subjects, *, num: int, split: str) -> Values:
    """The loss on the plane of the two principal directions of training, with the checkpoints projected on it.

    Running statistics, where the network tracks any, are re-estimated from the data at every point.
    """
    thetas = [subject.theta for subject in subjects]
    found = principal_directions(thetas, num=2, center="last")
    coordinates = found.coordinates.numpy()
    low, high = coordinates.min(0), coordinates.max(0)
    pad = MARGIN * np.maximum(high - low, 1e-3 * (high - low).max())
    span = tuple((float(a), float(b)) for a, b in zip(low - pad, high + pad, strict=True))
    loss = subjects[subjects.steps[-1]].loss(split)
    plane = {"num": num, "span": span, "buffers": "reestimate"}  # the checkpoints far from the last have others
    surface = loss_plane(loss, found.origin, found.axes, **plane)  # type: ignore[arg-type]
    return {
        **surface.asdict(),
        **found.asdict(),
        "step": np.array(subjects.steps),
    }


def path(subjects: Subjects, *, num: int, split: str) -> Values:
    """The straight line from the checkpoint that has memorised to the last one."""
    _, memorised, last = phases(subjects.steps, subjects.curves)
    start, end = subjects[memorised], subjects[last]
    with torch.no_grad():
        found = linear_path(start.loss(split), start.trained, end.trained, num=num)
    return {**found.asdict(), "start_step": memorised, "end_step": last}


LOSS_PLANE = Analyzer(
    name="loss_plane",
    analyze=plane,
    summary_keys=SUMMARY,
    compute_summary=lambda values: {name: values[name] for name in SUMMARY},
    settings={"num": 25, "span": 0.5, "normalize": "filter", "split": "train", "seed": 42},
    forwards=lambda settings: settings["num"] ** 2 + 2,
    steps=lambda subjects: sorted(set(phases(subjects.steps, subjects.curves))),
)
TRAJECTORY_PLANE = Analyzer(
    name="trajectory_plane",
    analyze=trajectory,
    settings={"num": 25, "split": "train"},
    forwards=lambda settings: settings["num"] ** 2 + 2,
    across=True,
)
PHASE_LINES = Analyzer(
    name="phase_lines",
    analyze=lines,
    settings={"num_directions": 8, "num": 41, "span": 0.5, "split": "train", "seed": 42},
    forwards=lambda settings: 3 * settings["num_directions"] * settings["num"],
    across=True,
)
PHASE_PATH = Analyzer(
    name="phase_path",
    analyze=path,
    settings={"num": 41, "split": "train"},
    forwards=lambda settings: settings["num"],
    across=True,
)
