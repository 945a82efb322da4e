"""How much activations and outputs say: entropies, mutual and usable information, its decomposition, calibration."""

from .calibration import (
    Calibration,
    CalibrationSums,
    calibration,
    calibration_sums,
    confidence_of,
    equal_mass_edges,
    equal_width_edges,
    expected_calibration_error,
)
from .divergence import OutputDivergence, divergence_sums, js_divergence, kl_divergence, output_divergence

__all__ = [
    "Calibration",
    "CalibrationSums",
    "OutputDivergence",
    "calibration",
    "calibration_sums",
    "confidence_of",
    "divergence_sums",
    "equal_mass_edges",
    "equal_width_edges",
    "expected_calibration_error",
    "js_divergence",
    "kl_divergence",
    "output_divergence",
]
