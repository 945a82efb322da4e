"""The weights themselves: their spectra and codes, what can be pruned, how models are merged, how modular they are."""

from .function_distance import (
    Elasticity,
    FunctionDistance,
    WeightDistance,
    elasticity,
    function_distance,
    weight_distance,
)
from .magnitude_cuts import Cut, global_cut
from .merge_curves import input_moments, merge_curves
from .merge_curves_result import MergeCurves
from .merging import merge
from .permutation_groups import Axis, PermutationGroup, permutation_groups
from .task_vectors import TaskVectors, apply_task_vectors, task_vectors
from .weight_matching import WeightMatching, permutation_index, weight_matching

__all__ = [
    "Axis",
    "Cut",
    "Elasticity",
    "FunctionDistance",
    "MergeCurves",
    "PermutationGroup",
    "TaskVectors",
    "WeightDistance",
    "WeightMatching",
    "apply_task_vectors",
    "elasticity",
    "function_distance",
    "global_cut",
    "input_moments",
    "merge",
    "merge_curves",
    "permutation_groups",
    "permutation_index",
    "task_vectors",
    "weight_distance",
    "weight_matching",
]
