"""What the parts of a transformer do: which tokens heads look at, and which heads complete repeated text."""

from .attention import AttentionPatterns, attention_patterns
from .induction import InductionHeads, induction_heads, repeated_tokens
from .rollout import attention_flow, attention_rollout
from .scores import SCORES, pattern_scores

__all__ = [
    "SCORES",
    "AttentionPatterns",
    "InductionHeads",
    "attention_flow",
    "attention_patterns",
    "attention_rollout",
    "induction_heads",
    "pattern_scores",
    "repeated_tokens",
]
