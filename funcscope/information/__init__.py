"""How much activations and outputs say: entropies, mutual and usable information, its decomposition, calibration."""

from ..core.divergences import js_divergence, kl_divergence
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
from .divergence import OutputDivergence, divergence_sums, output_divergence
from .entropy import Entropy, discrete_entropy, entropy_of_counts, entropy_sums, output_entropy
from .gaussian_information import mutual_information_gaussian
from .infonce import mutual_information_infonce
from .mutual_information import MutualInformation, mutual_information_discrete
from .neighbor_information import mutual_information_ksg, mutual_information_ross
from .of_layers import LayerEntropy, LayerInformation, layer_entropy, layer_information
from .of_outputs import output_calibration, pid_analysis, prediction_divergence, usable_information_by_layer
from .pid import PID, pid_broja, pid_min_mi, pid_williams_beer
from .probe_pid import probe_pid
from .probes import ProbeSelectivity, UsableInformation, probe_selectivity, usable_information
from .profile import InformationProfile, information_profile
from .sequence_sums import SequenceSums
from .spectral_entropy import SpectralEntropy, covariance_entropy, spectral_entropy

__all__ = [
    "PID",
    "Calibration",
    "CalibrationSums",
    "CompressedWeights",
    "DescriptionLength",
    "Entropy",
    "InformationProfile",
    "LayerEntropy",
    "LayerInformation",
    "MutualInformation",
    "OutputDivergence",
    "ProbeSelectivity",
    "SequenceSums",
    "SpectralEntropy",
    "UsableInformation",
    "calibration",
    "calibration_sums",
    "compressed_weights",
    "confidence_of",
    "covariance_entropy",
    "description_length",
    "discrete_entropy",
    "divergence_sums",
    "entropy_of_counts",
    "entropy_sums",
    "equal_mass_edges",
    "equal_width_edges",
    "expected_calibration_error",
    "information_profile",
    "js_divergence",
    "kl_divergence",
    "layer_entropy",
    "layer_information",
    "mutual_information_discrete",
    "mutual_information_gaussian",
    "mutual_information_infonce",
    "mutual_information_ksg",
    "mutual_information_ross",
    "output_calibration",
    "output_divergence",
    "output_entropy",
    "pid",
    "pid_analysis",
    "pid_broja",
    "pid_min_mi",
    "pid_williams_beer",
    "prediction_divergence",
    "probe_pid",
    "probe_selectivity",
    "spectral_entropy",
    "universal_integer_bits",
    "usable_information",
    "usable_information_by_layer",
]
