"""The analyzers, by name: each is a few lines of data about a pure function."""

from __future__ import annotations

from ..analyzer import Analyzer
from .curvature import HESSIAN_CURVATURE
from .dimensionality import EFFECTIVE_DIMENSIONALITY
from .directional import DIRECTIONAL_LOSSES
from .flatness import FLATNESS_PROFILE, LANDSCAPE_FLATNESS
from .planes import LOSS_PLANE, PHASE_LINES, PHASE_PATH, TRAJECTORY_PLANE

ANALYZERS: dict[str, Analyzer] = {
    one.name: one
    for one in (
        LANDSCAPE_FLATNESS,
        FLATNESS_PROFILE,
        EFFECTIVE_DIMENSIONALITY,
        HESSIAN_CURVATURE,
        DIRECTIONAL_LOSSES,
        LOSS_PLANE,
        TRAJECTORY_PLANE,
        PHASE_LINES,
        PHASE_PATH,
    )
}


def analyzer(name: str) -> Analyzer:
    """The analyzer of that name. Raises ValueError for an unknown one, with those there are."""
    if name not in ANALYZERS:
        raise ValueError(f"no analyzer {name!r}: there are {', '.join(ANALYZERS)}.")
    return ANALYZERS[name]


def register(one: Analyzer) -> Analyzer:
    """Make an analyzer of your own known by its name, and return it. Raises ValueError for a name that is taken."""
    if ANALYZERS.setdefault(one.name, one) is not one:
        raise ValueError(f"the name {one.name!r} is taken by another analyzer.")
    return one
