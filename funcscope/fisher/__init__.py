"""The Fisher information of tasks: what each needs, where tasks conflict, and which heads they share."""

from .conflicts import TaskConflicts, gram_conflicts, task_conflicts
from .heads import HeadPart, Heads, head_part, head_views
from .label_permutation import LabelTest, label_test
from .whitening import whitened_grams

__all__ = [
    "HeadPart",
    "Heads",
    "LabelTest",
    "TaskConflicts",
    "gram_conflicts",
    "head_part",
    "head_views",
    "label_test",
    "task_conflicts",
    "whitened_grams",
]
