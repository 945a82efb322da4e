"""The weights themselves: their spectra and codes, what can be pruned, how models are merged, how modular they are."""

from .interference import TaskInterference, task_interference
from .separability import Separability, gram_separability, separability

__all__ = ["Separability", "TaskInterference", "gram_separability", "separability", "task_interference"]
