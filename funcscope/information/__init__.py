"""How much activations and outputs say: entropies, mutual and usable information, its decomposition, calibration."""

from .entropy import Entropy, SequenceSums, discrete_entropy, entropy_of_counts, entropy_sums, output_entropy
from .gaussian_information import mutual_information_gaussian
from .infonce import mutual_information_infonce
from .mutual_information import MutualInformation, mutual_information_discrete
from .neighbor_information import mutual_information_ksg, mutual_information_ross
from .of_layers import LayerEntropy, LayerInformation, layer_entropy, layer_information
from .spectral_entropy import SpectralEntropy, covariance_entropy, spectral_entropy

__all__ = [
    "Entropy",
    "LayerEntropy",
    "LayerInformation",
    "MutualInformation",
    "SequenceSums",
    "SpectralEntropy",
    "covariance_entropy",
    "discrete_entropy",
    "entropy_of_counts",
    "entropy_sums",
    "layer_entropy",
    "layer_information",
    "mutual_information_discrete",
    "mutual_information_gaussian",
    "mutual_information_infonce",
    "mutual_information_ksg",
    "mutual_information_ross",
    "output_entropy",
    "spectral_entropy",
]
