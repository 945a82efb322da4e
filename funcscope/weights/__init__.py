"""The weights themselves: their spectra and codes, what can be pruned, how models are merged, how modular they are."""

from .early_bird import EarlyBird, early_bird
from .interference import TaskInterference, task_interference
from .layer_spectra import LayerSpectra, layer_spectra
from .linear_inputs import InputNorms, input_norms
from .masked_training import masked_training
from .modularity import Modularity, block_coupling, modularity_score
from .power_law import PowerLaw, fit_power_law, log_normal_ratio
from .prunable import prunable_leaves, sparse_mask
from .pruning import pruning_robustness, structured_pruning
from .pruning_result import PruningRobustness
from .saliency import saliency, taylor_saliency, wanda_saliency
from .separability import Separability, gram_separability, separability
from .ticket_overlap import TicketOverlap, ticket_overlap
from .tickets import IterativePruning, iterative_magnitude_pruning
from .units import Units, head_units, neuron_units, unit_mask, unit_saliency
from .weight_modularity import WeightModularity, weight_modularity
from .winning_tickets import WinningTickets, winning_tickets

__all__ = [
    "EarlyBird",
    "InputNorms",
    "IterativePruning",
    "LayerSpectra",
    "Modularity",
    "PowerLaw",
    "PruningRobustness",
    "Separability",
    "TaskInterference",
    "TicketOverlap",
    "Units",
    "WeightModularity",
    "WinningTickets",
    "block_coupling",
    "early_bird",
    "fit_power_law",
    "gram_separability",
    "head_units",
    "input_norms",
    "iterative_magnitude_pruning",
    "layer_spectra",
    "log_normal_ratio",
    "masked_training",
    "modularity_score",
    "neuron_units",
    "prunable_leaves",
    "pruning_robustness",
    "saliency",
    "separability",
    "sparse_mask",
    "structured_pruning",
    "task_interference",
    "taylor_saliency",
    "ticket_overlap",
    "unit_mask",
    "unit_saliency",
    "wanda_saliency",
    "weight_modularity",
    "winning_tickets",
]
