"""The weights themselves: their spectra and codes, what can be pruned, how models are merged, how modular they are."""

from .interference import TaskInterference, task_interference
from .modularity import Modularity, block_coupling, modularity_score
from .separability import Separability, gram_separability, separability
from .weight_modularity import WeightModularity, weight_modularity

__all__ = [
    "Modularity",
    "Separability",
    "TaskInterference",
    "WeightModularity",
    "block_coupling",
    "gram_separability",
    "modularity_score",
    "separability",
    "task_interference",
    "weight_modularity",
]
