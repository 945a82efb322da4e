"""The weights themselves: their spectra and codes, what can be pruned, how models are merged, how modular they are."""

from .early_bird import EarlyBird, early_bird
from .function_distance import (
    Elasticity,
    FunctionDistance,
    WeightDistance,
    elasticity,
    function_distance,
    weight_distance,
)
from .interference import TaskInterference, task_interference
from .layer_spectra import LayerSpectra, layer_spectra
from .linear_inputs import InputNorms, input_norms
from .magnitude_cuts import Cut, global_cut
from .masked_training import masked_training
from .merge_curves import input_moments, merge_curves
from .merge_curves_result import MergeCurves
from .merging import merge
from .modularity import Modularity, block_coupling, modularity_score
from .permutation_groups import Axis, PermutationGroup, permutation_groups
from .plasticity import Plasticity, plasticity
from .power_law import PowerLaw, fit_power_law, log_normal_ratio
from .prunable import prunable_leaves, sparse_mask
from .pruning import pruning_robustness, structured_pruning
from .pruning_result import PruningRobustness
from .saliency import saliency, taylor_saliency, wanda_saliency
from .separability import Separability, gram_separability, separability
from .task_vectors import TaskVectors, apply_task_vectors, task_vectors
from .ticket_overlap import TicketOverlap, ticket_overlap
from .tickets import IterativePruning, iterative_magnitude_pruning
from .units import Units, head_units, neuron_units, unit_mask, unit_saliency
from .weight_matching import WeightMatching, permutation_index, weight_matching
from .weight_modularity import WeightModularity, weight_modularity
from .winning_tickets import WinningTickets, winning_tickets

__all__ = [
    "Axis",
    "Cut",
    "EarlyBird",
    "Elasticity",
    "FunctionDistance",
    "InputNorms",
    "IterativePruning",
    "LayerSpectra",
    "MergeCurves",
    "Modularity",
    "PermutationGroup",
    "Plasticity",
    "PowerLaw",
    "PruningRobustness",
    "Separability",
    "TaskInterference",
    "TaskVectors",
    "TicketOverlap",
    "Units",
    "WeightDistance",
    "WeightMatching",
    "WeightModularity",
    "WinningTickets",
    "apply_task_vectors",
    "block_coupling",
    "early_bird",
    "elasticity",
    "fit_power_law",
    "function_distance",
    "global_cut",
    "gram_separability",
    "head_units",
    "input_moments",
    "input_norms",
    "iterative_magnitude_pruning",
    "layer_spectra",
    "log_normal_ratio",
    "masked_training",
    "merge",
    "merge_curves",
    "modularity_score",
    "neuron_units",
    "permutation_groups",
    "permutation_index",
    "plasticity",
    "prunable_leaves",
    "pruning_robustness",
    "saliency",
    "separability",
    "sparse_mask",
    "structured_pruning",
    "task_interference",
    "task_vectors",
    "taylor_saliency",
    "ticket_overlap",
    "unit_mask",
    "unit_saliency",
    "wanda_saliency",
    "weight_distance",
    "weight_matching",
    "weight_modularity",
    "winning_tickets",
]
