"""Losses, slopes and curvatures along random directions at every checkpoint."""

from __future__ import annotations

from ...core.keys import key
from ...landscape import directional_losses
from ...landscape.truncation import num_refined
from ..analyzer import Analyzer, Subject, Values

_WITH_ERROR = ("landscape_roughness", "curvature_mean", "dir_grad_delta_corr", "delta_mean")
SUMMARY = (
    "baseline_loss", "curvature_p10", "curvature_p90", "curvature_noise_floor",
    *_WITH_ERROR, *(f"{name}_stderr" for name in _WITH_ERROR),
)  # fmt: skip


def analyze(subject: Subject, *, n_samples: int, span: float, split: str, seed: int) -> Values:
    """`fs.directional_losses` on both sides: the same draws at every checkpoint, so that differences over training are not
    noise of the draw."""
    return directional_losses(
        subject.loss(split),
        subject.theta,
        key=key(seed),
        n_samples=n_samples,
        span=span,
        two_sided=True,
        compute_gradient=True,
        compute_curvature=True,
    ).asdict()


DIRECTIONAL_LOSSES = Analyzer(
    name="directional_losses",
    analyze=analyze,
    summary_keys=SUMMARY,
    compute_summary=lambda values: {name: values[name] for name in SUMMARY},
    settings={"n_samples": 50, "span": 0.1, "split": "train", "seed": 42},
    forwards=lambda settings: 5 + 2 * settings["n_samples"] + 4 * num_refined(settings["n_samples"]),
)
