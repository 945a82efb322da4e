"""The loss around a point: along random directions."""

from .directional import directional_losses
from .samples import DirectionalLosses

__all__ = ["DirectionalLosses", "directional_losses"]
