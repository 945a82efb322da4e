"""A stored curvature study: its spectrum, its blocks and its sharpness, with the words and units they are told in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from ..core.estimate import Estimate
from ..core.keys import Key
from ..core.store import Stored
from ..linalg.summary import SpectrumSummary
from ..study import curvature_rows
from ..study.curvature_rows import MATRICES, Block, Row
from ..study.spectrum import summary_of
from .curvature_figures import place
from .numbers import with_error


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
        return curvature_rows.blocks(self.stored)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """The spectrum's numbers as the terminal prints them, by name."""
        return curvature_rows.spectrum_rows(self.summary, self.stored)

    @property
    def has_data_errors(self) -> bool:
        """Whether it is known what other texts would change in the outermost eigenvalues."""
        return bool(self.rows["largest eigenvalue"].data)

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


def said(found: Estimate) -> str:
    return with_error(float(found.value), float(found.stderr))
