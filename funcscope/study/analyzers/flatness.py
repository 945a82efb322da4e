"""Flatness of the landscape: at every checkpoint, and at the phases over several lengths of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...core.keys import fold_in, key
from ...core.objective import Loss
from ...curvature.hessian import hessian
from ...families.phases import phases
from ...landscape.flatness import flatness, flatness_profile
from ...linalg.trace import hutchinson_trace
from ..analyzer import Analyzer, Subject, Values

SUMMARY = (
    "baseline_loss", "mean_delta_loss", "median_delta_loss", "max_delta_loss", "std_delta_loss", "p90_delta_loss",
    "flatness_ratio", "p10_delta_loss", "mean_delta_loss_stderr", "flatness_fraction", "pair_mean", "pair_mean_stderr",
    "epsilon_relative", "param_norm", "n_nonfinite",
)  # fmt: skip
"""The seven documented keys, then ours."""
EPSILONS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
STILL = 1e-4
"""Share of the shortest step at which only rounding is left: there the loss changes by 1e-8 of what it does at that step."""


def one_length(
    subject: Subject, *, n_directions: int, epsilon: float, relative: bool, normalize: str, split: str, seed: int
) -> Values:
    """`fs.flatness` at one checkpoint, on the same directions at every checkpoint."""
    return flatness(
        subject.loss(split),
        subject.theta,
        key=key(seed),
        n_directions=n_directions,
        epsilon=epsilon,
        relative=relative,
        normalize=normalize,  # type: ignore[arg-type]
        directions=subject.bench.directions(seed, n_directions) if normalize == "global" else None,
    ).asdict()


def many_lengths(
    subject: Subject, *, n_directions: int, epsilons: Sequence[float], products: int, split: str, seed: int
) -> Values:
    """The mean loss change at several epsilons beside eps^2 tr(H) / 2P: where the two part, the Hessian does not describe it.

    The trace is Hutchinson's, of the same loss, from `products` random signs. All of it in float64: the losses of the
    shortest steps differ by less than float32 resolves. `rounding_delta_loss` is what is left of the pair mean in steps that
    are far too short to change the loss, its root mean square over directions: a pair mean near it is rounding.
    """
    loss, theta = in_float64(subject.loss(split)), subject.theta.double()
    *found, still = flatness_profile(
        loss, theta, key=key(seed), epsilons=(*epsilons, STILL * min(epsilons)), n_directions=n_directions
    )
    root = fold_in(key(seed), "trace")
    trace = hutchinson_trace(hessian(loss, theta), theta, key=root, num=products)
    expected = [one.expected_from_trace(trace) for one in found]
    return {
        "epsilon": np.array(epsilons),
        "mean_delta_loss": np.array([float(one.estimates["mean_delta_loss"].value) for one in found]),
        "pair_mean": np.array([float(one.pair_mean.value) for one in found]),
        "pair_mean_stderr": np.array([float(one.pair_mean.stderr) for one in found]),
        "expected_delta_loss": np.array([float(one.value) for one in expected]),
        "expected_delta_loss_stderr": np.array([float(one.stderr) for one in expected]),
        "rounding_delta_loss": float(still.even.square().mean().sqrt()),
        "hessian_trace": float(trace.value),
        "hessian_trace_stderr": float(trace.stderr),
        "baseline_loss": found[0].baseline_loss,
        "param_norm": found[0].param_norm,
    }


def in_float64(loss: Loss) -> Loss:
    """The same loss, computed in float64 throughout."""
    batches = tuple((_wide(inputs), targets) for inputs, targets in loss.batches)
    return replace(loss, net=loss.net.in_dtype(torch.float64), batches=batches)


def _wide(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, Mapping):
        return {name: _wide(value) for name, value in tree.items()}
    return type(tree)(_wide(value) for value in tree) if isinstance(tree, (tuple, list)) else tree


LANDSCAPE_FLATNESS = Analyzer(
    name="landscape_flatness",
    analyze=one_length,
    summary_keys=SUMMARY,
    compute_summary=lambda values: {name: values[name] for name in SUMMARY},
    settings={
        "n_directions": 50,
        "epsilon": 0.1,
        "relative": False,
        "normalize": "global",
        "split": "probe",
        "seed": 42,
    },
    forwards=lambda settings: 2 + 2 * settings["n_directions"],
)
FLATNESS_PROFILE = Analyzer(
    name="flatness_profile",
    analyze=many_lengths,
    settings={"n_directions": 50, "epsilons": EPSILONS, "products": 32, "split": "train", "seed": 42},
    forwards=lambda settings: (
        2 + 2 * settings["n_directions"] * (1 + len(settings["epsilons"])) + 6 * settings["products"]
    ),
    steps=lambda subjects: sorted(set(phases(subjects.steps, subjects.curves))),
)
