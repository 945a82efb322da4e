"""The loss around a point: along random directions, of one model or of two on the same ones."""

from .compare import Comparison, compare_directional
from .directional import directional_losses
from .quadratic import DifferenceStep, DirectionalCurvatures, difference_step, directional_curvatures
from .samples import DirectionalLosses

__all__ = [
    "Comparison",
    "DifferenceStep",
    "DirectionalCurvatures",
    "DirectionalLosses",
    "compare_directional",
    "difference_step",
    "directional_curvatures",
    "directional_losses",
]
