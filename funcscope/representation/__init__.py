"""How activations are laid out: units, superposition, similarity, dimension, what moves through the layers."""

from .dimension import LayerDimensions, TwoNN, layer_dimensions, two_nn
from .gains import PerturbationGains, ResidualGains, gain_sums, gains_of, perturbation_gains, residual_gains
from .gradient_dead import GradientDead, gradient_dead
from .layer_similarity import LayerSimilarity, layer_similarity
from .of_layers import (
    curvature_of_stream,
    dimension_by_scale,
    feature_geometry,
    intrinsic_dimension,
    reconstruction_of_layers,
    similarity_of_layers,
)
from .of_units import activation_sparsity, dead_neurons, perturbation_growth, stream_gains, weight_superposition
from .over_training import SimilarityToLast, similarity_to_last
from .overlap_moments import mean_abs_coordinate, welch_bound
from .reconstruction import LinearReconstruction, linear_reconstruction
from .ricci import RicciCurvature, graph_ricci, ollivier_ricci, wasserstein_1
from .scales import DimensionByScale, gride, levina_bickel, local_pca
from .selectivity import Selectivity, class_numbers, class_sums, selectivity, selectivity_of, unit_numbers
from .similarity import Similarity, canonical_correlation, cka, mutual_neighbours, procrustes
from .sparsity import Sparsity, gini, gini_reference, hoyer, hoyer_reference, sparsity, sparsity_of, sparsity_sums
from .spectrum import ActivationSpectra, activation_spectra, moments_spectra
from .superposition import (
    Superposition,
    effective_features,
    feature_dimensionality,
    feature_matrices,
    feature_overlap,
    superposition,
)
from .units import UnitActivity, activity_of, unit_activity, unit_sums
from .volume import VolumeGrowth, volume_growth

__all__ = [
    "ActivationSpectra",
    "DimensionByScale",
    "GradientDead",
    "LayerDimensions",
    "LayerSimilarity",
    "LinearReconstruction",
    "PerturbationGains",
    "ResidualGains",
    "RicciCurvature",
    "Selectivity",
    "Similarity",
    "SimilarityToLast",
    "Sparsity",
    "Superposition",
    "TwoNN",
    "UnitActivity",
    "VolumeGrowth",
    "activation_sparsity",
    "activation_spectra",
    "activity_of",
    "canonical_correlation",
    "cka",
    "class_numbers",
    "class_sums",
    "curvature_of_stream",
    "dead_neurons",
    "dimension_by_scale",
    "effective_features",
    "feature_dimensionality",
    "feature_geometry",
    "feature_matrices",
    "feature_overlap",
    "gain_sums",
    "gains_of",
    "gini",
    "gini_reference",
    "gradient_dead",
    "graph_ricci",
    "gride",
    "hoyer",
    "hoyer_reference",
    "intrinsic_dimension",
    "layer_dimensions",
    "layer_similarity",
    "levina_bickel",
    "linear_reconstruction",
    "local_pca",
    "mean_abs_coordinate",
    "moments_spectra",
    "mutual_neighbours",
    "ollivier_ricci",
    "perturbation_gains",
    "perturbation_growth",
    "procrustes",
    "reconstruction_of_layers",
    "residual_gains",
    "selectivity",
    "selectivity_of",
    "similarity_of_layers",
    "similarity_to_last",
    "sparsity",
    "sparsity_of",
    "sparsity_sums",
    "stream_gains",
    "superposition",
    "two_nn",
    "unit_activity",
    "unit_numbers",
    "unit_sums",
    "volume_growth",
    "wasserstein_1",
    "weight_superposition",
    "welch_bound",
]
