"""The weights themselves: their spectra and codes, what can be pruned, how models are merged, how modular they are."""

from .layer_spectra import LayerSpectra, layer_spectra
from .power_law import PowerLaw, fit_power_law, log_normal_ratio

__all__ = [
    "LayerSpectra",
    "PowerLaw",
    "fit_power_law",
    "layer_spectra",
    "log_normal_ratio",
]
