"""The analyzers, by name: each is a few lines of data about a pure function."""

from __future__ import annotations

import re

from ..analyzer import Analyzer
from ..runs import NAME
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


_OURS = frozenset(ANALYZERS)


def register(one: Analyzer) -> Analyzer:
    """Make an analyzer of your own known by its name, and return it; one registered before under that name is replaced.

    Raises ValueError for the name of one of ours, and for a name that is no folder's.
    """
    if one.name in _OURS:
        raise ValueError(f"the name {one.name!r} is that of an analyzer of funcscope: choose another.")
    if not re.fullmatch(NAME, one.name):
        raise ValueError(f"an analyzer is named by small letters, digits and underscores, got {one.name!r}.")
    ANALYZERS[one.name] = one
    return one
