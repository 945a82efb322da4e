"""The Fisher information of tasks: what each needs, where tasks conflict, and which heads they share."""

from .heads import HeadPart, Heads, head_part, head_views

__all__ = ["HeadPart", "Heads", "head_part", "head_views"]
