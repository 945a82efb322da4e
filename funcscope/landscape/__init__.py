"""The loss around a point and between points: directions, lines, planes, paths, flatness; one model or two."""

from ..curvature.directional import DifferenceStep, DirectionalCurvatures, difference_step, directional_curvatures
from .axes import Axes, Trajectory, eigenvector_axes, plane_directions, principal_directions, project
from .barriers import BarrierMatrix, LossPath
from .bezier import Connection, bezier, bezier_path, connect
from .compare import compare_directional
from .compare_result import Comparison
from .directional import directional_losses
from .directional_result import DirectionalLosses
from .directional_shards import sharded_directional_losses
from .flatness import flatness, flatness_profile
from .flatness_result import Flatness
from .learning_coefficient import learning_coefficient
from .learning_coefficient_result import LearningCoefficient
from .learning_coefficient_sweep import LearningCoefficientSweep, learning_coefficient_sweep
from .path import barrier_matrix, linear_path
from .planes import LossLines, LossPlane, loss_lines, loss_plane
from .sampling import CommonDirections, common_directions

__all__ = [
    "Axes",
    "BarrierMatrix",
    "CommonDirections",
    "Comparison",
    "Connection",
    "DifferenceStep",
    "DirectionalCurvatures",
    "DirectionalLosses",
    "Flatness",
    "LearningCoefficient",
    "LearningCoefficientSweep",
    "LossLines",
    "LossPath",
    "LossPlane",
    "Trajectory",
    "barrier_matrix",
    "bezier",
    "bezier_path",
    "common_directions",
    "compare_directional",
    "connect",
    "difference_step",
    "directional_curvatures",
    "directional_losses",
    "eigenvector_axes",
    "flatness",
    "flatness_profile",
    "learning_coefficient",
    "learning_coefficient_sweep",
    "linear_path",
    "loss_lines",
    "loss_plane",
    "plane_directions",
    "principal_directions",
    "project",
    "sharded_directional_losses",
]
