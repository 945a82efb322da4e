"""The loss around a point: along random directions, of one model or of two on the same ones."""

from .compare import Comparison, compare_directional
from .directional import directional_losses
from .samples import DirectionalLosses

__all__ = ["Comparison", "DirectionalLosses", "compare_directional", "directional_losses"]
