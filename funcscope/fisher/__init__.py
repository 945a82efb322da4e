"""The Fisher information of tasks: what each needs, where tasks conflict, and which heads they share."""

from ..core.architectures import Heads
from ..core.heads import HeadPart, head_part, head_views
from ..curvature.label_permutation import LabelTest, label_test
from ..curvature.mask_overlap import MaskOverlap, mask_overlap
from ..curvature.pruning_masks import PruningMask, obd_saliency, pruning_mask
from ..curvature.whitening import whitened_grams
from .accumulators import Ema, Welford
from .collection import DiagonalFisher, fisher_diagonal
from .conflicts import TaskConflicts, gram_conflicts, task_conflicts
from .groups import GroupedFisher, fisher_groups
from .importance import Importance, importance, importance_vector
from .interference import HeadInterference, head_interference
from .methods import MethodComparison, compare_methods
from .precomputed import gradient_gram
from .spectrum import fisher_spectrum, gram_spectrum
from .spectrum_result import GramSpectrum
from .tasks import FisherOverlap, fisher_importance, fisher_overlap, qkov_interference

__all__ = [
    "DiagonalFisher",
    "Ema",
    "FisherOverlap",
    "GramSpectrum",
    "GroupedFisher",
    "HeadInterference",
    "HeadPart",
    "Heads",
    "Importance",
    "LabelTest",
    "MaskOverlap",
    "MethodComparison",
    "PruningMask",
    "TaskConflicts",
    "Welford",
    "compare_methods",
    "fisher_diagonal",
    "fisher_groups",
    "fisher_importance",
    "fisher_overlap",
    "fisher_spectrum",
    "gradient_gram",
    "gram_conflicts",
    "gram_spectrum",
    "head_interference",
    "head_part",
    "head_views",
    "importance",
    "importance_vector",
    "label_test",
    "mask_overlap",
    "obd_saliency",
    "pruning_mask",
    "qkov_interference",
    "task_conflicts",
    "whitened_grams",
]
