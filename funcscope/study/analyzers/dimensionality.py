"""Effective dimensionality at every checkpoint: how many directions each weight matrix uses."""

from __future__ import annotations

import numpy as np

from ...linalg.ranks import Ranks, matrix_ranks
from ..analyzer import Analyzer, Bench, Subject, Values


def analyze(subject: Subject) -> Values:
    """The three ranks of every weight matrix (leaves of two dimensions), in the order of the layout."""
    params = subject.net.layout.unravel(subject.theta)
    ranks = [matrix_ranks(params[name]) for name in matrices(subject.bench)]
    if not ranks:
        raise ValueError("the model has no weight matrix: none of its parameters has two dimensions.")
    return {name: np.array(column) for name, column in zip(Ranks._fields, zip(*ranks, strict=True), strict=True)}


def matrices(bench: Bench) -> list[str]:
    return [leaf.name for leaf in bench.net.layout.leaves if len(leaf.shape) == 2]


EFFECTIVE_DIMENSIONALITY = Analyzer(
    name="effective_dimensionality",
    analyze=analyze,
    summary_keys=Ranks._fields,
    compute_summary=dict,
    described=lambda bench: {"matrices": matrices(bench)},
    needs_loss=False,
    forwards=lambda _: 0,
)
