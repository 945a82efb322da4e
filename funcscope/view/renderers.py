"""Figures of documented arrays: a result, or a mapping of arrays by their documented names, to a plotly `Figure`.

None changes what it is given. Values that are not finite are holes. Figures of all other quantities: `quantities.figures`.
"""

from .flatness_figures import FLATNESS_METRICS, render_flatness_trajectory, render_perturbation_distribution
from .path_figures import render_barrier
from .plane_figures import render_surface

__all__ = [
    "FLATNESS_METRICS", "render_barrier", "render_flatness_trajectory", "render_perturbation_distribution", "render_surface",
]  # fmt: skip
