"""Flatness of the landscape at every checkpoint: loss changes in random directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...core.keys import key
from ...landscape.flatness import flatness_profile
from ..analyzer import Analyzer, Subject, Values

SUMMARY = (
    "baseline_loss", "mean_delta_loss", "median_delta_loss", "max_delta_loss", "std_delta_loss", "p90_delta_loss",
    "flatness_ratio", "p10_delta_loss", "mean_delta_loss_stderr", "flatness_fraction", "pair_mean", "pair_mean_stderr",
    "epsilon_relative", "param_norm", "n_nonfinite",
)  # fmt: skip
"""The seven documented keys, then ours."""


def analyze(
    subject: Subject,
    *,
    n_directions: int,
    epsilon: float,
    relative: bool,
    normalize: str,
    split: str,
    seed: int,
    more_epsilons: Sequence[float],
) -> Values:
    """`fs.flatness` at one checkpoint, and its mean at other epsilons, on the same directions at every checkpoint."""
    found = flatness_profile(
        subject.loss(split),
        subject.theta,
        key=key(seed),
        epsilons=(epsilon, *more_epsilons),
        n_directions=n_directions,
        relative=relative,
        normalize=normalize,  # type: ignore[arg-type]
    )
    values: dict[str, Any] = dict(found[0].asdict())
    if more_epsilons:
        rows = [one.asdict() for one in found]
        for name in ("epsilon", "mean_delta_loss", "pair_mean", "pair_mean_stderr"):
            values[f"profile_{name}"] = _column(rows, name)
    return values


def _column(rows: Sequence[Values], name: str) -> Any:
    return np.array([row[name] for row in rows])


LANDSCAPE_FLATNESS = Analyzer(
    name="landscape_flatness",
    analyze=analyze,
    summary_keys=SUMMARY,
    compute_summary=lambda values: {name: values[name] for name in SUMMARY},
    settings={
        "n_directions": 50,
        "epsilon": 0.1,
        "relative": False,
        "normalize": "global",
        "split": "probe",
        "seed": 42,
        "more_epsilons": (),
    },
    forwards=lambda settings: 2 + 2 * settings["n_directions"] * (1 + len(settings["more_epsilons"])),
)
