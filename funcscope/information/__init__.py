"""How much activations and outputs say: entropies, mutual and usable information, its decomposition, calibration."""

from .calibration import Calibration, calibration, expected_calibration_error
from .calibration_sums import CalibrationSums, calibration_sums, confidence_of, equal_mass_edges, equal_width_edges
from .description_length import (
    CompressedWeights,
    DescriptionLength,
    compressed_weights,
    description_length,
    universal_integer_bits,
)
from .discrete_pid import pid
from .divergence import OutputDivergence, divergence_sums, js_divergence, kl_divergence, output_divergence
from .pid import PID, pid_broja, pid_min_mi, pid_williams_beer
from .probe_pid import probe_pid
from .probes import Selectivity, UsableInformation, probe_selectivity, usable_information
from .profile import InformationProfile, information_profile

__all__ = [
    "PID",
    "Calibration",
    "CalibrationSums",
    "CompressedWeights",
    "DescriptionLength",
    "InformationProfile",
    "OutputDivergence",
    "Selectivity",
    "UsableInformation",
    "calibration",
    "calibration_sums",
    "compressed_weights",
    "confidence_of",
    "description_length",
    "divergence_sums",
    "equal_mass_edges",
    "equal_width_edges",
    "expected_calibration_error",
    "information_profile",
    "js_divergence",
    "kl_divergence",
    "output_divergence",
    "pid",
    "pid_broja",
    "pid_min_mi",
    "pid_williams_beer",
    "probe_pid",
    "probe_selectivity",
    "universal_integer_bits",
    "usable_information",
]
