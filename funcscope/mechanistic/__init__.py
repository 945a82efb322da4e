"""What the parts of a transformer do: which tokens heads look at, and which heads complete repeated text."""

from .attention import AttentionPatterns, attention_patterns
from .scores import SCORES, pattern_scores

__all__ = ["SCORES", "AttentionPatterns", "attention_patterns", "pattern_scores"]
