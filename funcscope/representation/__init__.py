"""How activations are laid out: units, superposition, similarity, dimension, what moves through the layers."""

from .gains import PerturbationGains, ResidualGains, gain_sums, gains_of, perturbation_gains, residual_gains
from .gradient_dead import GradientDead, gradient_dead
from .of_units import activation_sparsity, dead_neurons, stream_gains, weight_superposition
from .overlap_moments import mean_abs_coordinate, welch_bound
from .ricci import RicciCurvature, graph_ricci, ollivier_ricci, wasserstein_1
from .selectivity import Selectivity, class_numbers, class_sums, selectivity, selectivity_of, unit_numbers
from .sparsity import Sparsity, gini, gini_reference, hoyer, hoyer_reference, sparsity, sparsity_of, sparsity_sums
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
    "GradientDead",
    "PerturbationGains",
    "ResidualGains",
    "RicciCurvature",
    "Selectivity",
    "Sparsity",
    "Superposition",
    "UnitActivity",
    "VolumeGrowth",
    "activation_sparsity",
    "activity_of",
    "class_numbers",
    "class_sums",
    "dead_neurons",
    "effective_features",
    "feature_dimensionality",
    "feature_matrices",
    "feature_overlap",
    "gain_sums",
    "gains_of",
    "gini",
    "gini_reference",
    "gradient_dead",
    "graph_ricci",
    "hoyer",
    "hoyer_reference",
    "mean_abs_coordinate",
    "ollivier_ricci",
    "perturbation_gains",
    "residual_gains",
    "selectivity",
    "selectivity_of",
    "sparsity",
    "sparsity_of",
    "sparsity_sums",
    "stream_gains",
    "superposition",
    "unit_activity",
    "unit_numbers",
    "unit_sums",
    "volume_growth",
    "wasserstein_1",
    "weight_superposition",
    "welch_bound",
]
