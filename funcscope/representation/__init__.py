"""How activations are laid out: units, superposition, similarity, dimension, what moves through the layers."""

from .dimension import LayerDimensions, TwoNN, layer_dimensions, two_nn
from .layer_similarity import LayerSimilarity, layer_similarity
from .reconstruction import LinearReconstruction, linear_reconstruction
from .scales import DimensionByScale, gride, levina_bickel, local_pca
from .similarity import Similarity, canonical_correlation, cka, mutual_neighbours, procrustes
from .spectrum import ActivationSpectra, activation_spectra, moments_spectra

__all__ = [
    "ActivationSpectra",
    "DimensionByScale",
    "LayerDimensions",
    "LayerSimilarity",
    "LinearReconstruction",
    "Similarity",
    "TwoNN",
    "activation_spectra",
    "canonical_correlation",
    "cka",
    "gride",
    "layer_dimensions",
    "layer_similarity",
    "levina_bickel",
    "linear_reconstruction",
    "local_pca",
    "moments_spectra",
    "mutual_neighbours",
    "procrustes",
    "two_nn",
]
