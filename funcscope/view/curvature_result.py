"""A stored curvature study: its spectrum, its blocks and its sharpness, with the words and units they are told in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from ..core.estimate import Estimate, jackknife_stderr
from ..core.keys import Key
from ..core.store import Stored
from ..linalg.summary import SpectrumSummary
from ..study.curvature_table import MATRICES
from ..study.spectrum import summary_of
from .curvature_figures import place
from .numbers import number, with_error

UNIT = "nats per unit of distance²"


class Block(NamedTuple):
    """The curvature of some parameters, the others held fixed."""

    name: str
    size: int
    trace: float
    trace_stderr: float
    share: float
    """Of the trace of the whole matrix, from the same products; nan where that cannot be told from zero."""
    share_stderr: float
    eigenvalue: float
    residual: float
    converged: bool


@dataclass(frozen=True, eq=False)
class Curvature:
    """What `study.curvature.run` has stored."""

    stored: Stored

    @property
    def meta(self) -> dict[str, Any]:
        return self.stored.meta

    @property
    def model(self) -> dict[str, Any]:
        return self.meta["models"][0]

    @property
    def settings(self) -> dict[str, Any]:
        return self.meta["settings"]

    @property
    def matrix(self) -> str:
        """Its name, for a sentence."""
        return MATRICES[self.settings["matrix"]]

    @property
    def sharpness(self) -> dict[str, Any]:
        return self.meta["stages"]["sharpness"]

    @property
    def num(self) -> int:
        """Parameters, and so eigenvalues."""
        return self.model["num_parameters"]

    @cached_property
    def summary(self) -> SpectrumSummary:
        """The spectrum's numbers, made again from the stored arrays."""
        told = self.meta["key"]
        return summary_of(self.stored.arrays, self.meta["stages"], Key(int(told["bits"], 16), told["seed"]))

    @property
    def trace(self) -> Estimate:
        found = self.summary.trace
        return Estimate(found.value, found.stderr, len(found.samples))

    @property
    def rounding(self) -> float:
        """The size of an eigenvalue that may be rounding."""
        return self.summary.density.rounding * self.summary.spectral_norm

    @cached_property
    def blocks(self) -> list[Block]:
        """In the order of the model; empty where they were not asked for."""
        arrays = self.stored.arrays
        if "block_trace_samples" not in arrays:
            return []
        whole = arrays["hutchinson_samples"]
        found = []
        for i, name in enumerate(self.meta["stages"]["block_traces"]["names"]):
            samples = arrays["block_trace_samples"][i]
            trace = Estimate.of(torch.from_numpy(samples))
            share = _share(samples, whole)
            at = (arrays[f"block_{column}"][i] for column in ("eigenvalues", "residuals", "converged"))
            eigenvalue, residual, converged = at
            found.append(
                Block(
                    name, int(arrays["block_sizes"][i]), float(trace.value), float(trace.stderr), *share,
                    float(eigenvalue), float(residual), bool(converged),
                )
            )  # fmt: skip
        return found

    @property
    def along_random(self) -> tuple[Estimate, str]:
        """The mean of d'Ad over random unit directions, and what these are."""
        if "hutchinson_samples" in self.stored.arrays:
            samples = torch.from_numpy(self.stored.arrays["hutchinson_samples"]) / self.num
            return Estimate.of(samples), "random signs over √P"
        trace = self.summary.density.trace
        return Estimate(trace.value / self.num, trace.stderr / self.num, trace.num), "normal draws over their length"

    def spectrum(self, threshold: float, width: float) -> tuple[Float[np.ndarray, " g"], ...]:
        """The density on the scale of `curvature_figures.place`: points, mean and standard error, per unit of that scale."""
        density = self.summary.density
        moved = replace(density, nodes=torch.from_numpy(place(density.nodes.numpy(), threshold)))
        points = moved.grid(600, width)
        return points.numpy(), *(x.numpy() for x in moved.density(points, width))


def is_resolved(found: Estimate) -> bool:
    """Whether 1.96 standard errors leave zero out."""
    return abs(float(found.value)) > 1.96 * float(found.stderr)


def said(found: Estimate) -> str:
    return with_error(float(found.value), float(found.stderr))


def percent(found: Estimate) -> str:
    """A share with its error.

    >>> percent(Estimate(torch.tensor(0.5), torch.tensor(0.013), 8))
    '50.0 ± 1.3 %'
    """
    return f"{with_error(100 * float(found.value), 100 * float(found.stderr))} %"


def negative_share(found: Curvature) -> str:
    """The share of negative eigenvalues with its error; where the steps leave it open, what it may be."""
    share, open_ = found.summary.negative_fraction, found.summary.density.negative_resolution()
    if open_.resolved:
        return percent(share)
    least, most = (100 * min(1.0, max(0.0, float(share.value) + sign * open_.bound)) for sign in (-1, 1))
    return f"between {number(least, 2)} and {number(most, 2)} % (not resolved by {found.summary.density.steps} steps)"


def _share(samples: np.ndarray, whole: np.ndarray) -> tuple[float, float]:
    """A ratio of two means over the same products, with its jackknife error."""
    part, total = torch.from_numpy(samples), torch.from_numpy(whole)
    if len(samples) < 2 or not is_resolved(Estimate.of(total)):
        return math.nan, math.nan
    left_out = (part.sum() - part) / (total.sum() - total)
    return float(part.sum() / total.sum()), float(jackknife_stderr(left_out))
